"""Thinking markers and bridges, as token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .end_search import TextSearch, TokenBytes, TokenSearch
from .templates import advise_open, find_think_end, find_think_start, template_of, thinking_state
from .templates import render_prompt as render_prompt  # most users of this module need it as well

# Text that closes a trace that is cut, chosen by a mark in the rendered prompt. ChatML models get Qwen's own text, all
# others the one released with the paper for DeepSeek-R1-Distill.
_TRUNCATION_BRIDGES = (
    (
        "<|im_start|>",
        "\n\nConsidering the limited time by the user, I have to give the solution based on the thinking directly "
        "now.\n{think_end}",
    ),
    ("", "...\n\n...\n\n{think_end}"),
)
# Text that may stand before and after the end of a trace
_NEIGHBOURS = ((".", ""), (" ", ""), (")", "\n"), ("\n", "\n\n"), ("4", "4"), ("a", "a"))
_ANSWER_BRIDGE = "\n\n**Final Answer**\n"


@dataclass(frozen=True)
class ThinkingMarkers:
    """
    Markers that end a trace, and bridges that are inserted after it.

    A marker that is one token is found by its id. Text that spells it does not count. A marker that tokenizers write
    in more than one way is found in the text of the tokens. This needs the tokenizer ([`with_tokenizer`]). The
    thinking then ends with the token that completes the marker.

    Args:
        think_end (`str`):
            Text that ends the thinking.
        think_end_ids (`tuple[int, ...]`):
            Its token ids.
        truncation_bridge (`str`):
            Text that closes a trace that is cut before its end.
        truncation_bridge_ids (`tuple[int, ...]`):
            Its token ids.
        answer_bridge (`str`):
            Text that opens the summary, after a trace that ended by itself or was closed.
        answer_bridge_ids (`tuple[int, ...]`):
            Its token ids.
        in_text (`bool`, *optional*):
            Whether the end is found in the text of the tokens. Always true if it has several tokens.
    """

    think_end: str
    think_end_ids: tuple[int, ...]
    truncation_bridge: str
    truncation_bridge_ids: tuple[int, ...]
    answer_bridge: str
    answer_bridge_ids: tuple[int, ...]
    in_text: bool = False

    def __post_init__(self) -> None:
        if len(self.think_end_ids) > 1:
            object.__setattr__(self, "in_text", True)

    def with_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> "ThinkingMarkers":
        """Return the same markers, able to find their end in the text of this tokenizer's tokens."""
        return self.with_token_bytes(TokenBytes(tokenizer, self.think_end_ids)) if self.in_text else self

    def with_token_bytes(self, token_bytes: Callable[[int], bytes]) -> "ThinkingMarkers":
        """Return the same markers, where `token_bytes` says what a token adds to the text."""
        markers = replace(self)
        markers.__dict__["_search"] = TextSearch(self.think_end, token_bytes)
        return markers

    @cached_property
    def _search(self) -> TokenSearch | TextSearch:
        if self.in_text:
            raise ValueError(
                f"The end of thinking {self.think_end!r} is found in the text of the tokens, but the tokenizer is "
                "missing. Pass it with `AnytimeConfig.with_tokenizer(tokenizer)`."
            )
        return TokenSearch(self.think_end_ids[0])

    @property
    def max_bridge_length(self) -> int:
        """Return the number of tokens of the longest bridge."""
        return len(self.truncation_bridge_ids) + len(self.answer_bridge_ids)

    def is_forced(self, bridge: Sequence[int]) -> bool:
        """Return whether a bridge closes a trace by force, which did not end by itself."""
        return len(bridge) > len(self.answer_bridge_ids)

    @property
    def max_end_length(self) -> int:
        """Return the most tokens that the end of thinking may be spread over."""
        return self._search.most_tokens

    def count_think_end(self, token_ids: Sequence[int]) -> int:
        """Count the occurrences of the end of thinking in `token_ids`."""
        return self._search.count(token_ids)

    def end_of_thinking(self, token_ids: Sequence[int]) -> int | None:
        """Return the index just behind the token that completes the first end of thinking, or `None`."""
        return self._search.first(token_ids)[0]


class EndScan:
    """
    Search for the end of a trace that grows. It looks at each token once.

    Args:
        markers ([`ThinkingMarkers`]):
            Markers of the thinking's end.
    """

    def __init__(self, markers: ThinkingMarkers):
        self._search = markers._search
        self._num_searched = self._state = 0
        self._end: int | None = None

    def end_of_thinking(self, token_ids: Sequence[int]) -> int | None:
        """
        Find the end as [`ThinkingMarkers.end_of_thinking`] does.

        `token_ids` must begin with those of the last call.
        """
        if self._end is None:
            new = token_ids[self._num_searched :]
            found, self._state = self._search.first(new, self._state)
            self._end = None if found is None else self._num_searched + found
            self._num_searched += len(new)
        return self._end


def find_markers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    generation_prompt: str | None = None,
    think_end: str | None = None,
    truncation_bridge: str | None = None,
    answer_bridge: str | None = None,
    *,
    conversation: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ThinkingMarkers:
    """
    Find the markers and bridges of a model, from a rendered prompt and from settings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str`):
            A rendered prompt.
        generation_prompt (`str`, *optional*):
            Part at the prompt's end that the chat template added for the answer. `None` for a prompt without a
            template.
        think_end (`str`, *optional*):
            Text that ends the thinking. If not set, it is found from prompt, template and vocabulary.
        truncation_bridge (`str`, *optional*):
            Text that closes a trace that is cut. It contains `think_end` exactly once. If not set, it depends on the
            template's family.
        answer_bridge (`str`, *optional*, defaults to `"\\n\\n**Final Answer**\\n"`):
            Text that opens the summary.
        conversation (`list[dict]`, *optional*):
            Conversation that `prompt` was rendered from, used to try other arguments of the chat template. Any
            conversation if not set.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Arguments that `prompt` was rendered with.

    Raises:
        `ValueError`: If the prompt has closed the thinking, no markers are known, or the tokenizer cannot encode them.
    """
    if think_end is None:
        think_end = find_think_end(tokenizer, prompt, generation_prompt)
    if think_end is None:
        raise ValueError(
            "Neither the prompt nor the tokenizer has a thinking marker such as '</think>', so there is no thinking "
            "to cut. Train a reasoning model, or teach this one to think (docs/from_a_chat_model.md). If it thinks "
            "with other markers, set `think_end` to the text that ends the thinking."
        )
    think_start = find_think_start(think_end, prompt, template_of(tokenizer))
    if thinking_state(prompt, generation_prompt, think_start, think_end) == "closed":
        advice = "Remove the closed thinking from the end of the prompts."
        if generation_prompt is not None or (conversation is not None and not isinstance(conversation, str)):
            advice = advise_open(tokenizer, conversation, chat_template_kwargs or {}, think_start, think_end)
        raise ValueError(
            f"The rendered prompt has already closed the thinking: it ends with {prompt[-40:]!r}. {advice}"
        )

    if truncation_bridge is None:
        family = next(text for mark, text in _TRUNCATION_BRIDGES if mark in prompt)
        truncation_bridge = family.format(think_end=think_end)
    answer_bridge = _ANSWER_BRIDGE if answer_bridge is None else answer_bridge

    # The marker is encoded alone, so that it cannot melt into its neighbours
    before, *after = truncation_bridge.split(think_end)
    if len(after) != 1:
        raise ValueError(
            f"`truncation_bridge` is {truncation_bridge!r}. Set a text that contains the end-of-thinking marker "
            f"{think_end!r} exactly once."
        )
    if think_end in answer_bridge:
        raise ValueError(
            f"`answer_bridge` is {answer_bridge!r}. It follows the end of the thinking, so set a text without "
            f"{think_end!r}."
        )
    if not answer_bridge:
        raise ValueError("`answer_bridge` has no tokens. Set a text such as '\\n\\n'.")
    think_end_ids = _encode(tokenizer, think_end, "think_end")
    markers = ThinkingMarkers(
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
        in_text=len(think_end_ids) > 1 or _melts(tokenizer, think_end, think_end_ids[0]),
    ).with_tokenizer(tokenizer)
    if markers.count_think_end(markers.truncation_bridge_ids) != 1:
        raise ValueError(
            f"The end of thinking {think_end!r} cannot be found in the tokens of {truncation_bridge!r}. Add "
            f"{think_end!r} to the tokenizer as a token, or set `think_end` to another text."
        )
    return markers


def _melts(tokenizer: PreTrainedTokenizerBase, think_end: str, token_id: int) -> bool:
    """Return whether a marker that is one token alone becomes other tokens next to other text."""
    for before, after in _NEIGHBOURS:
        try:
            token_ids = tokenizer(before + think_end + after, add_special_tokens=False)["input_ids"]
        except Exception:  # a vocabulary without [UNK] raises nothing more specific for a text that it cannot write
            continue
        if token_id not in token_ids and tokenizer.unk_token_id not in token_ids:
            return True
    return False


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, setting: str) -> tuple[int, ...]:
    if not text:
        return ()
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    # Word-level tokenizers do not keep spaces, which does no harm
    decoded = str(tokenizer.decode(token_ids))
    if not token_ids or tokenizer.unk_token_id in token_ids or "".join(decoded.split()) != "".join(text.split()):
        raise ValueError(
            f"The tokenizer cannot encode {text!r}, which decodes to {decoded!r}. Set `{setting}` to a text that the "
            "tokenizer knows, or add the marker to its vocabulary."
        )
    return tuple(token_ids)
