"""What chat templates do with the thinking, read off rendered prompts and never off a model's name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

# (start, end) of the thinking of the families of reasoning models
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, Olmo, Phi
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>", "<channel|>"),  # Gemma 4, which goes on with "thought\n"
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1 and other distilled models
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
# How markers of other models name their two ends, beside a slash
_OPPOSITES = (("end", "start"), ("end", "begin"), ("close", "open"), ("stop", "start"), ("suffix", "prefix"))
# Most arguments of a template that are tried out: one rendering each takes about a millisecond
_MOST_SWITCHES = 32
_MOST_ROWS = 64


def find_think_end(tokenizer: PreTrainedTokenizerBase, prompt: str, generation_prompt: str | None) -> str | None:
    """
    Find the text that ends the thinking of a model, or `None`.

    What the generation prompt (or the last word of a plain prompt) has opened comes first, then what the template
    knows, then the vocabulary. Text of the prompt, in which a user may talk about other markers, comes last.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str`):
            A rendered prompt.
        generation_prompt (`str`, *optional*):
            Its end, that the chat template added for the answer; `None` for a prompt without a template.
    """
    tail = "".join(prompt.split()[-1:]) if generation_prompt is None else generation_prompt
    for places in (tail, template_of(tokenizer), tokenizer.get_vocab(), prompt):
        for start, end in MARKERS:
            if end in places or (isinstance(places, str) and start in places):
                return end
    return None


def find_think_start(think_end: str, *texts: str) -> str:
    """
    Find the text that starts a trace which ends with `think_end`, or `""` if nothing tells it.

    Args:
        think_end (`str`):
            Text that ends the thinking.
        *texts (`str`):
            Where the start may occur, such as the prompt and the chat template. Decides between several.
    """
    end = think_end.strip()
    starts = [start for start, known_end in MARKERS if known_end == end]
    if "/" in end:
        starts.append(end.replace("/", "", 1))
    for closing, opening in _OPPOSITES:
        starts += [
            end.replace(change(closing), change(opening), 1)
            for change in (str.lower, str.upper, str.capitalize)
            if change(closing) in end
        ]
    if end.endswith("|>") and not end.startswith("<|"):
        starts.append(f"<|{end[1:-2]}>")
    return next((start for start in starts if any(start in text for text in texts)), starts[0] if starts else "")


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template that conversations are rendered with; `""` without one."""
    return "" if tokenizer.chat_template is None else str(tokenizer.get_chat_template())


def thinking_state(prompt: str, generation_prompt: str | None, think_start: str, think_end: str) -> str:
    """
    What a rendered prompt has done with the thinking.

    Args:
        prompt (`str`):
            The rendered prompt.
        generation_prompt (`str`, *optional*):
            Its end, that the chat template added for the answer; `None` for a prompt without a template.
        think_start (`str`):
            Text that starts the thinking; `""` if it is not known.
        think_end (`str`):
            Text that ends the thinking.

    Returns:
        `str`: `"opened"` (the model goes on thinking), `"closed"` (the model must answer at once) or `"model_decides"`
        (starting to think is left to the model).
    """
    tail = prompt if generation_prompt is None else generation_prompt
    start, end = think_start.strip(), think_end.strip()
    started, ended = tail.rfind(start) if start else -1, tail.rfind(end)
    # Without a template, earlier text may talk about the markers: then only the very end can have closed the thinking
    if prompt.rstrip().endswith(end) if generation_prompt is None else ended > started:
        return "closed"
    return "opened" if started > ended else "model_decides"


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


# Arguments of the template

_ANY_CONVERSATION = [{"role": "user", "content": "?"}]


def _tried(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str, str | None]]:
    """Render a prompt with each argument of the template that may concern thinking: name, value, rendering."""
    names = dict.fromkeys(re.findall(r"\b\w*(?:think|reason)\w*", template_of(tokenizer)))
    for name in list(names)[:_MOST_SWITCHES]:
        for value in ("high",) if "effort" in name else (True, False):
            try:
                yield name, value, *render_prompt(tokenizer, prompt, {**chat_template_kwargs, name: value})
            except Exception:  # what a template makes of a value that it does not expect may be anything
                continue


def advise_open(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    chat_template_kwargs: Mapping[str, Any],
    think_start: str,
    think_end: str,
) -> str:
    """
    Say how a template that closes the thinking can be told not to, as tried out.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`list[dict]`, *optional*):
            The conversation whose thinking is closed. Any, if not set.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template that are set.
        think_start, think_end (`str`):
            Texts that start and end the thinking.

    Returns:
        `str`: A sentence; the general one if no argument of the template keeps the thinking open.
    """
    prompt = _ANY_CONVERSATION if prompt is None else prompt
    states = {
        (name, value): thinking_state(rendered, generation_prompt, think_start, think_end)
        for name, value, rendered, generation_prompt in _tried(tokenizer, prompt, chat_template_kwargs)
    }
    closed_as_it_is = (
        thinking_state(*render_prompt(tokenizer, prompt, chat_template_kwargs), think_start, think_end) == "closed"
    )
    closing = {name for (name, _), state in states.items() if state == "closed"}
    for wanted in ("opened", "model_decides"):
        for (name, value), state in states.items():
            if state == wanted and (closed_as_it_is or name in closing):
                kwargs = {**chat_template_kwargs, name: value}
                return f"The chat template has the argument `{name}`: set `chat_template_kwargs={kwargs}`."
    return "Change the chat template, or the messages that make it close the thinking."


def find_unset_switch(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]) -> str | None:
    """Find the argument by which the template would ask the model to think, if there is one that is not set."""
    if tokenizer.chat_template is None:
        return None
    plain = render_prompt(tokenizer, _ANY_CONVERSATION, chat_template_kwargs)[0]
    for name, value, rendered, _ in _tried(tokenizer, _ANY_CONVERSATION, chat_template_kwargs):
        if value is True and name not in chat_template_kwargs and rendered != plain:
            return name
    return None


# Rows of data sets


def sample_rows(conversations: Sequence[list[dict[str, Any]]]) -> list[int]:
    """
    Choose the rows that stand for all, at most 64.

    Args:
        conversations (`Sequence[list[dict]]`):
            The prompts of a data set.

    Returns:
        `list[int]`: The first row of each kind (another system message, other roles or keys, another command such as
        `/no_think` at the end), and evenly spaced ones.
    """
    first_of_kind: dict[Any, int] = {}
    for row, conversation in enumerate(conversations):
        first_of_kind.setdefault(_kind(conversation), row)
    firsts = _spaced(list(first_of_kind.values()), _MOST_ROWS // 2)
    return sorted({*firsts, *_spaced(range(len(conversations)), _MOST_ROWS - len(firsts))})


def _kind(conversation: list[dict[str, Any]]) -> Any:
    last = str(conversation[-1].get("content")).split()[-1:]
    command = last if last and last[0].startswith("/") else []
    system = [message.get("content") for message in conversation if message.get("role") in ("system", "developer")]
    return str((system, command, [(message.get("role"), *sorted(message)) for message in conversation]))


def _spaced(rows: Sequence[int], most: int) -> Sequence[int]:
    return rows[:: max(1, -(-len(rows) // most))]


def states_of_rows(
    tokenizer: PreTrainedTokenizerBase,
    data: Mapping[str, Sequence[Any]],
    chat_template_kwargs: Mapping[str, Any],
    think_start: str,
    think_end: str,
) -> dict[str, list[tuple[str, int]]]:
    """
    Sort the rows of data sets by what has been done with the thinking: all that are text, and a sample of those that
    are conversations.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        data (`Mapping[str, Sequence]`):
            The prompts of each data set, by the set's name.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.
        think_start, think_end (`str`):
            Texts that start and end the thinking.

    Returns:
        `dict[str, list[tuple[str, int]]]`: the data sets and numbers of the rows, by their state (see
        [`thinking_state`]).
    """
    rows: dict[str, list[tuple[str, int]]] = {}
    for name, prompts in data.items():
        for row in range(len(prompts)) if isinstance(prompts[0], str) else sample_rows(prompts):
            rendered, generation_prompt = render_prompt(tokenizer, prompts[row], chat_template_kwargs)
            state = thinking_state(rendered, generation_prompt, think_start, think_end)
            rows.setdefault(state, []).append((name, row))
    return rows
