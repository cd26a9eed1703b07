"""What chat templates do with the thinking, found from rendered prompts and never from a model's name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

# (start, end) of the thinking in families of reasoning models
MARKERS = (
    ("<think>", "</think>"),  # DeepSeek, Qwen, GLM, Nemotron, Olmo, Phi
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<|channel>", "<channel|>"),  # Gemma 4, which continues with "thought\n"
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # Sky-T1 and other distilled models
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
)
# Words by which markers of other models name their two ends, besides a slash
_OPPOSITES = (("end", "start"), ("end", "begin"), ("close", "open"), ("stop", "start"), ("suffix", "prefix"))
# Most arguments of a template that are tried. Each rendering takes about a millisecond.
_MOST_SWITCHES = 32
_MOST_ROWS = 64


def find_think_end(tokenizer: PreTrainedTokenizerBase, prompt: str, generation_prompt: str | None) -> str | None:
    """
    Find the text that ends the thinking of a model, or `None`.

    The first choice is a marker that the generation prompt (or the last word of a plain prompt) has opened. Then come
    the template and the vocabulary. The text of the prompt comes last, because a user may write about other markers
    there.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str`):
            A rendered prompt.
        generation_prompt (`str`, *optional*):
            Part at the prompt's end that the chat template added for the answer. `None` for a prompt without a
            template.
    """
    tail = "".join(prompt.split()[-1:]) if generation_prompt is None else generation_prompt
    for places in (tail, template_of(tokenizer), tokenizer.get_vocab(), prompt):
        for start, end in MARKERS:
            if end in places or (isinstance(places, str) and start in places):
                return end
    return None


def find_think_start(think_end: str, *texts: str) -> str:
    """
    Find the text that starts a trace which ends with `think_end`, or `""` if it is not known.

    Args:
        think_end (`str`):
            Text that ends the thinking.
        *texts (`str`):
            Texts where the start may occur, such as the prompt and the chat template. They decide between several
            candidates.
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
    """Return the chat template that conversations are rendered with, or `""` without one."""
    return "" if tokenizer.chat_template is None else str(tokenizer.get_chat_template())


def thinking_state(prompt: str, generation_prompt: str | None, think_start: str, think_end: str) -> str:
    """
    Return what a rendered prompt has done with the thinking.

    Args:
        prompt (`str`):
            The rendered prompt.
        generation_prompt (`str`, *optional*):
            Part at the prompt's end that the chat template added for the answer. `None` for a prompt without a
            template.
        think_start (`str`):
            Text that starts the thinking. `""` if it is not known.
        think_end (`str`):
            Text that ends the thinking.

    Returns:
        `str`: `"opened"` (the model continues thinking), `"closed"` (the model must answer at once) or
        `"model_decides"` (the model decides whether to start thinking).
    """
    tail = prompt if generation_prompt is None else generation_prompt
    start, end = think_start.strip(), think_end.strip()
    started, ended = tail.rfind(start) if start else -1, tail.rfind(end)
    # Without a template, earlier text may mention the markers. Then only the very end can have closed the thinking.
    if prompt.rstrip().endswith(end) if generation_prompt is None else ended > started:
        return "closed"
    return "opened" if started > ended else "model_decides"


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> tuple[str, str | None]:
    """
    Render a prompt as the model will see it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            Text, which is left unchanged, or a conversation.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.

    Returns:
        `tuple`: the rendered prompt, and the part at its end that the chat template added for the answer, or `None`.

    Raises:
        `ValueError`: If the prompt is a conversation and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        return prompt, None
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversational, but the tokenizer has no chat template. Set "
            "`processing_class.chat_template`, or pass prompts as text."
        )
    render = partial(tokenizer.apply_chat_template, prompt, tokenize=False, **chat_template_kwargs)
    without, rendered = str(render(add_generation_prompt=False)), str(render(add_generation_prompt=True))
    # Some templates always add it
    added = rendered.startswith(without) and rendered != without
    return rendered, rendered.removeprefix(without) if added else None


# Arguments of the template

_ANY_CONVERSATION = [{"role": "user", "content": "?"}]


def _tried(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, str, str | None]]:
    """
    Render a prompt with each argument of the template that may concern thinking.

    Yields name, value and rendering.
    """
    names = dict.fromkeys(re.findall(r"\b\w*(?:think|reason)\w*", template_of(tokenizer)))
    for name in list(names)[:_MOST_SWITCHES]:
        for value in ("high",) if "effort" in name else (True, False):
            try:
                yield name, value, *render_prompt(tokenizer, prompt, {**chat_template_kwargs, name: value})
            except Exception:  # a template may raise anything for a value that it does not expect
                continue


def advise_open(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    chat_template_kwargs: Mapping[str, Any],
    think_start: str,
    think_end: str,
) -> str:
    """
    Say how to make a template keep the thinking open, after trying its arguments.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`list[dict]`, *optional*):
            Conversation whose thinking is closed. Any conversation if not set.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template that are set.
        think_start, think_end (`str`):
            Texts that start and end the thinking.

    Returns:
        `str`: A sentence of advice. It is a general one if no argument of the template keeps the thinking open.
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
                return f"The chat template has the argument `{name}`. Set `chat_template_kwargs={kwargs}`."
    return "Change the chat template, or the messages that make it close the thinking."


def find_unset_switch(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]) -> str | None:
    """Find an unset argument of the template that would ask the model to think, or return `None`."""
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
    Choose at most 64 rows that represent all of them.

    Args:
        conversations (`Sequence[list[dict]]`):
            The prompts of a data set.

    Returns:
        `list[int]`: The first row of each kind, and evenly spaced rows. A kind is another system message, other roles
        or keys, or another command such as `/no_think` at the end.
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
    Sort the rows of data sets by what has been done with the thinking.

    All rows that are text are sorted, and a sample of those that are conversations.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        data (`Mapping[str, Sequence]`):
            Prompts of each data set, by the set's name.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.
        think_start, think_end (`str`):
            Texts that start and end the thinking.

    Returns:
        `dict[str, list[tuple[str, int]]]`: for each state (see [`thinking_state`]), the data set and number of each
        row.
    """
    rows: dict[str, list[tuple[str, int]]] = {}
    for name, prompts in data.items():
        for row in range(len(prompts)) if isinstance(prompts[0], str) else sample_rows(prompts):
            rendered, generation_prompt = render_prompt(tokenizer, prompts[row], chat_template_kwargs)
            state = thinking_state(rendered, generation_prompt, think_start, think_end)
            rows.setdefault(state, []).append((name, row))
    return rows
