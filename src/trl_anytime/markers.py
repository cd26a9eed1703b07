"""
Thinking markers and bridges, as token ids.

What a chat template does with the thinking is read off the rendered prompt, never off the model's name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from transformers import PreTrainedTokenizerBase

# (start, end) of the thinking in the templates of the reasoning models
_MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))

# Text that closes a thinking that is cut, by a mark in the rendered prompt. Qwen's own text for its ChatML models,
# else the one released with the paper for DeepSeek-R1-Distill.
_TRUNCATION_BRIDGES = (
    (
        "<|im_start|>",
        "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly "
        "now.\n{think_end}",
    ),
    ("", "...\n\n...\n\n{think_end}"),
)
_ANSWER_BRIDGE = "\n\n**Final Answer**\n"


@dataclass(frozen=True)
class ThinkingMarkers:
    """
    What ends a thinking and what is spliced in after it.

    Args:
        think_end (`str`):
            Text that ends the thinking.
        think_end_ids (`tuple[int, ...]`):
            Its token ids.
        truncation_bridge (`str`):
            Text that closes a thinking that is cut before its end.
        truncation_bridge_ids (`tuple[int, ...]`):
            Its token ids.
        answer_bridge (`str`):
            Text that opens the summary, after a thinking that ended by itself or was closed.
        answer_bridge_ids (`tuple[int, ...]`):
            Its token ids.
    """

    think_end: str
    think_end_ids: tuple[int, ...]
    truncation_bridge: str
    truncation_bridge_ids: tuple[int, ...]
    answer_bridge: str
    answer_bridge_ids: tuple[int, ...]

    @property
    def max_bridge_length(self) -> int:
        """Tokens of the longest bridge."""
        return len(self.truncation_bridge_ids) + len(self.answer_bridge_ids)

    def count_think_end(self, token_ids: Sequence[int]) -> int:
        """How often the end of thinking occurs in `token_ids`."""
        return len(_occurrences(token_ids, self.think_end_ids))

    def end_of_thinking(self, token_ids: Sequence[int]) -> int | None:
        """Index just behind the first end of thinking in `token_ids`, or `None`."""
        found = _occurrences(token_ids, self.think_end_ids)
        return found[0] + len(self.think_end_ids) if found else None


def _occurrences(token_ids: Sequence[int], pattern: tuple[int, ...]) -> list[int]:
    starts = (i for i, token in enumerate(token_ids) if token == pattern[0])
    return [i for i in starts if tuple(token_ids[i : i + len(pattern)]) == pattern]


def thinking_state(prompt: str, generation_prompt: str | None, think_start: str, think_end: str) -> str:
    """
    What a rendered prompt has done with the thinking.

    Args:
        prompt (`str`):
            The rendered prompt.
        generation_prompt (`str`, *optional*):
            Its end, that the chat template added for the answer; `None` for a prompt without a template.
        think_start (`str`):
            Text that starts the thinking.
        think_end (`str`):
            Text that ends the thinking.

    Returns:
        `str`: `"opened"` (the model goes on thinking), `"closed"` (the model must answer at once) or `"left"`
        (starting to think is left to the model).
    """
    # Without a template, earlier text may talk about the markers: then only the very end can have closed the thinking
    closed = (
        prompt.rstrip().endswith(think_end)
        if generation_prompt is None
        else generation_prompt.rfind(think_end) > generation_prompt.rfind(think_start)
    )
    if closed:
        return "closed"
    tail = prompt if generation_prompt is None else generation_prompt
    return "opened" if tail.rfind(think_start) > tail.rfind(think_end) else "left"


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> tuple[str, str | None]:
    """
    A prompt as the model will see it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            A text, which is left as it is, or a conversation.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.

    Returns:
        `tuple`: the rendered prompt, and its end that the chat template added for the answer, if it did.

    Raises:
        `ValueError`: For a conversation if the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt, None
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversational but the tokenizer has no chat template: set "
            "`processing_class.chat_template`, or pass prompts as text."
        )
    render = partial(tokenizer.apply_chat_template, prompt, tokenize=False, **chat_template_kwargs)
    without, rendered = str(render(add_generation_prompt=False)), str(render(add_generation_prompt=True))
    # Some templates add it always
    added = rendered.startswith(without) and rendered != without
    return rendered, rendered.removeprefix(without) if added else None


def find_markers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    generation_prompt: str | None = None,
    think_end: str | None = None,
    truncation_bridge: str | None = None,
    answer_bridge: str | None = None,
) -> ThinkingMarkers:
    """
    Markers and bridges for a model, from a rendered prompt and from settings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str`):
            A rendered prompt.
        generation_prompt (`str`, *optional*):
            Its end, that the chat template added for the answer; `None` for a prompt without a template.
        think_end (`str`, *optional*):
            Text that ends the thinking. Found from prompt, template and vocabulary if not set.
        truncation_bridge (`str`, *optional*):
            Text that closes a cut thinking; contains `think_end` exactly once. By family of template if not set.
        answer_bridge (`str`, *optional*, defaults to `"\\n\\n**Final Answer**\\n"`):
            Text that opens the summary.

    Raises:
        `ValueError`: If the prompt has closed the thinking, no markers are known, or the tokenizer cannot encode them.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    if think_end is None:
        known = [
            end
            for start, end in _MARKERS
            if start in prompt or end in prompt or end in template or end in tokenizer.get_vocab()
        ]
        if not known:
            raise ValueError(
                "Neither the prompt nor the tokenizer knows a thinking marker such as '</think>', so there is no "
                "thinking to cut. Train a reasoning model, or set `think_end` to the text that ends the thinking."
                + _template_advice(template)
            )
        think_end = known[0]
    think_start = think_end.replace("/", "", 1)

    if thinking_state(prompt, generation_prompt, think_start, think_end) == "closed":
        raise ValueError(
            f"The rendered prompt has already closed the thinking: it ends in {prompt[-40:]!r}."
            + (_template_advice(template) or " Remove the closed thinking from the end of the prompts.")
        )

    if truncation_bridge is None:
        family = next(text for mark, text in _TRUNCATION_BRIDGES if mark in prompt)
        truncation_bridge = family.format(think_end=think_end)
    answer_bridge = _ANSWER_BRIDGE if answer_bridge is None else answer_bridge

    # The marker is encoded by itself, so that it cannot melt into its neighbours
    before, *after = truncation_bridge.split(think_end)
    if len(after) != 1:
        raise ValueError(
            f"`truncation_bridge` must contain the end-of-thinking marker {think_end!r} exactly once, got "
            f"{truncation_bridge!r}."
        )
    if think_end in answer_bridge:
        raise ValueError(
            f"`answer_bridge` follows the end of the thinking and must not contain {think_end!r}, got "
            f"{answer_bridge!r}."
        )
    if not answer_bridge:
        raise ValueError("`answer_bridge` must have at least one token: set a text such as '\\n\\n'.")
    think_end_ids = _encode(tokenizer, think_end, "think_end")
    return ThinkingMarkers(
        think_end=think_end,
        think_end_ids=think_end_ids,
        truncation_bridge=truncation_bridge,
        truncation_bridge_ids=(
            _encode(tokenizer, before, "truncation_bridge")
            + think_end_ids
            + _encode(tokenizer, after[0], "truncation_bridge")
        ),
        answer_bridge=answer_bridge,
        answer_bridge_ids=_encode(tokenizer, answer_bridge, "answer_bridge"),
    )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, setting: str) -> tuple[int, ...]:
    if not text:
        return ()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Word-level tokenizers do not keep spaces, which is no loss
    decoded = str(tokenizer.decode(token_ids))
    if not token_ids or tokenizer.unk_token_id in token_ids or "".join(decoded.split()) != "".join(text.split()):
        raise ValueError(
            f"The tokenizer cannot encode {text!r}: it comes back as {decoded!r}. Set `{setting}` "
            "to a text that the tokenizer knows, or add the marker to its vocabulary."
        )
    return tuple(token_ids)


def _template_advice(template: str) -> str:
    try:
        names = meta.find_undeclared_variables(Environment().parse(template))
    except TemplateSyntaxError:  # templates may use tags of transformers' own environment
        names = {name for name in ("enable_thinking", "thinking") if name in template}
    switches = sorted(name for name in names if "think" in name)
    if not switches:
        return ""
    return (
        f" The chat template has the argument `{switches[0]}`: set `chat_template_kwargs={{'{switches[0]}': True}}`."
    )
