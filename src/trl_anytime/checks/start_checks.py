"""Checks of prompts, splices, context and rewards, shared by the trainer's start and `trl-anytime doctor`."""

import random
import re
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..brpo_config import BRPOConfig
from ..data.tasks import ADVICE, AnswerLengths
from ..rewards import AnswerReward, MathReward, TaskReward
from ..rewards.task import ENTRY_COLUMN
from ..rewards.tasks.boxes import write_box
from ..rewards.verifier.gold_answers import column_values, count_words, has_column
from ..rollout.markers import ThinkingMarkers
from ..rollout.templates import (
    advise_open,
    find_think_start,
    find_unset_switch,
    render_prompt,
    states_of_rows,
    template_of,
    thinking_state,
)
from ..rollout.types import Rollout, Thinking
from .finding import ERROR, OK, WARNING, Finding

# Grading this pair needs sympy, so it tests the worker processes too
_GOLD, _RIGHT, _WRONG = r"\sqrt{8}", r"2\sqrt{2}", r"3\sqrt{2}"
_SAMPLES = 8
# Warn if one word is the answer of a larger share of the rows than this
_SHARED = 0.01
_ANSWERING_WORDS = frozenset(["yes", "no", "true", "false"])
_MANY_WORDS = 5
# Half of ten times 1e-6, the default and the rate of all recipes, which train all weights
_LEAST_ADAPTER_RATE = 5e-6
_TEXT_COMMAND = re.compile(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}")
_LETTERS = re.compile(r"[^\W\d_][^\W\d_ /'-]*(?:[ /'-]+[^\W\d_ /'-]+)*")
_SKIP_BAD_GOLDS = "Or set `on_bad_gold` to 'skip', in the reward or the recipe, to drop rows without a usable answer."


def sampled_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Return a few rows, always the same ones."""
    indices = sorted(random.Random(0).sample(range(len(dataset)), min(_SAMPLES, len(dataset))))
    return [dataset[i] for i in indices]


def text_of(prompt: Any) -> str:
    """Return the text of a prompt, or of the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


# Template and markers


def template_findings(
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    generation_prompt: str | None,
    args: BRPOConfig,
    markers: ThinkingMarkers,
) -> list[Finding]:
    """
    Report how the chat template starts the thinking, and which tokens the markers have.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        rendered (`str`):
            A prompt as the model will see it.
        generation_prompt (`str`, *optional*):
            The end of the prompt, which the chat template added for the answer. `None` without a template.
        args ([`BRPOConfig`]):
            Settings.
        markers ([`ThinkingMarkers`]):
            Markers that were found in the same prompt. A template that closes the thinking has none.
    """
    end = markers.think_end
    start = find_think_start(end, rendered, template_of(tokenizer))
    opened = thinking_state(rendered, generation_prompt, start, end) == "opened"
    opening = f"opens the thinking with {start!r}" if opened else "lets the model decide whether to think"
    size = len(markers.think_end_ids)
    message = (
        f"The prompt ends in {rendered[-30:]!r} and {opening}. {end!r} is "
        f"{'one token' if size == 1 else f'{size} tokens'}, found "
        f"{'in the text of the tokens' if markers.in_text else 'by its id'}. "
        f"{markers.truncation_bridge!r} ({len(markers.truncation_bridge_ids)} tokens) closes a cut trace. "
        f"{markers.answer_bridge!r} ({len(markers.answer_bridge_ids)} tokens) opens a summary."
    )
    findings = [Finding("template", OK, message)]

    def warn(found: str, change: str) -> None:
        findings.append(Finding("template", WARNING, found, change))

    if markers.in_text and not opened:
        warn(
            f"The prompt does not open the thinking, and {end!r} is several tokens. A model that was not taught to "
            "write it never ends a trace.",
            "Teach the model to think: set `chat_template_path` to a template that opens the thinking, and warm-start "
            "it by SFT (docs/from_a_chat_model.md). Or train one that was taught.",
        )
    if markers.in_text and (
        (args.use_vllm and args.vllm_mode == "server") or args.use_transformers_continuous_batching
    ):
        warn(
            f"This backend cannot stop at {end!r} in the text, so every trace continues to the last budget.",
            "Set `vllm_mode: colocate`, or `use_vllm: false`.",
        )
    kwargs = cast(dict[str, Any], args.chat_template_kwargs or {})
    switch = None if opened or generation_prompt is None else find_unset_switch(tokenizer, kwargs)
    if switch is not None:
        warn(
            f"The chat template has the switch `{switch}`, which is not set. The model may not think without it.",
            f"Set `chat_template_kwargs: {{{switch}: true}}`, or false if it should be off.",
        )
    return findings


def prompt_findings(
    tokenizer: PreTrainedTokenizerBase,
    datasets: Mapping[str, Any],
    chat_template_kwargs: Mapping[str, Any],
    markers: ThinkingMarkers,
) -> list[Finding]:
    """
    Check that all prompts leave the thinking open, and in the same way.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        datasets (`Mapping[str, Dataset]`):
            Data sets by name. Streams and data sets without prompts are left out.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.
        markers ([`ThinkingMarkers`]):
            Markers of the model.

    Returns:
        `list[Finding]`: an error for closed thinking, a warning for prompts of several kinds, or nothing.
    """
    prompts = {
        name: dataset["prompt"][:]
        for name, dataset in datasets.items()
        if isinstance(dataset, Dataset) and "prompt" in dataset.column_names and len(dataset)
    }
    end = markers.think_end
    some = [
        render_prompt(tokenizer, dataset_prompts[0], chat_template_kwargs)[0] for dataset_prompts in prompts.values()
    ]
    start = find_think_start(end, *some, template_of(tokenizer))
    rows = states_of_rows(tokenizer, prompts, chat_template_kwargs, start, end)
    num_seen = sum(map(len, rows.values()))
    if closed := rows.get("closed"):
        name, row = closed[0]
        prompt, advice = prompts[name][row], "Remove the closed thinking from the end of these prompts."
        if not isinstance(prompt, str):
            advice = advise_open(tokenizer, prompt, chat_template_kwargs, start, end)
        return [
            Finding(
                "template",
                ERROR,
                f"{len(closed)} of {num_seen} checked prompts already close the thinking with {end!r}, so there is "
                f"no trace to cut: {_names_of(closed)}.",
                f"{advice} Or drop such rows.",
            )
        ]
    if len(rows) > 1:
        opened, left = rows["opened"], rows["model_decides"]
        return [
            Finding(
                "template",
                WARNING,
                f"{len(opened)} of {num_seen} checked prompts open the thinking with {start!r} "
                f"({_names_of(opened)}). The other {len(left)} let the model decide ({_names_of(left)}).",
                "Use the same kind of prompt in all rows, with the same system message.",
            )
        ]
    return []


def _names_of(rows: Sequence[tuple[str, int]], most: int = 5) -> str:
    by_set: dict[str, list[str]] = {}
    for name, row in rows[:most]:
        by_set.setdefault(name, []).append(str(row))
    named = "; ".join(f"{name}, row {', '.join(numbers)}" for name, numbers in by_set.items())
    return f"{named} and others" if len(rows) > most else named


# Splices


def _no_box(what_the_tokenizer_does: str) -> Finding:
    return Finding(
        "splice",
        WARNING,
        f"The tokenizer {what_the_tokenizer_does}, so the reward cannot find an answer.",
        r"Use a tokenizer that can write `\boxed{}`, or a reward that does not need it.",
    )


def splice_findings(
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    thinking: str,
    markers: ThinkingMarkers,
    eos_token_ids: Container[int],
    answers_in_boxes: bool,
) -> list[Finding]:
    r"""
    Assemble a rollout from token ids, as training does, and check it against its text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        rendered (`str`):
            A prompt as the model will see it.
        thinking (`str`):
            Text that is used as a trace and cut in the middle.
        markers ([`ThinkingMarkers`]):
            Markers and bridges to splice in.
        eos_token_ids (`Container[int]`):
            Tokens that end a summary.
        answers_in_boxes (`bool`):
            Whether a reward looks for a `\boxed{}` in the text of a summary.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    thinking_ids = summary = encode(thinking)
    if answers_in_boxes:
        try:
            summary = encode(r"\boxed{42}")
        except Exception as error:  # what a vocabulary without [UNK] raises has no narrower type
            return [_no_box(f"cannot write '\\boxed{{42}}' ({error})")]
    cut = max(len(thinking_ids) // 2, 1)
    rollout = Rollout.from_budgets(
        encode(rendered), Thinking.from_tokens(thinking_ids, markers, eos_token_ids), [cut], markers, [[summary]]
    )
    parts = {
        "prompt": rollout.prompt_ids,
        "thinking": rollout.thinking.token_ids[: rollout.cuts[0]],
        "bridge": list(rollout.bridges[0]),
        "summary": summary,
    }
    if not rollout.well_formed(markers)[0][0]:
        return [
            Finding(
                "splice",
                ERROR,
                f"Trace, bridge and summary do not contain {markers.think_end!r} exactly once. No summary could earn "
                "a reward.",
                f"Set `truncation_bridge` to a text with {markers.think_end!r} exactly once.",
            )
        ]
    findings = []
    text = str(tokenizer.decode(summary, skip_special_tokens=True))
    if answers_in_boxes and "".join(text.split()) != r"\boxed{42}":
        findings.append(_no_box(rf"turns the summary '\boxed{{42}}' into {text!r}"))

    spliced = [token for ids in parts.values() for token in ids]
    again = encode(str(tokenizer.decode(spliced)))
    kept = spliced[len(parts["prompt"]) :]
    if not findings:
        differs = _first_difference(parts, again)
        message = f"The {len(kept)} tokens of trace, bridge and summary survive decoding and encoding."
        if differs is not None:
            message = (
                f"Decoding and encoding gives different tokens {differs}. This is harmless, because the package "
                "splices token ids. It only affects servers that are sent text."
            )
        findings.append(Finding("splice", OK, message))
    return findings


def _first_difference(parts: dict[str, list[int]], again: Sequence[int]) -> str | None:
    """Describe where the tokens of `parts` and `again` first differ. Returns `None` if they do not."""
    start, names = 0, list(parts)
    for number, name in enumerate(names):
        ids = parts[name]
        for i, token in enumerate(ids):
            if start + i >= len(again) or again[start + i] != token:
                joins = i == len(ids) - 1 and number + 1 < len(names)
                return f"where {name} and {names[number + 1]} meet" if joins else f"in the {name}"
        start += len(ids)
    return None if len(again) == start else "after the summary"


# Context


def context_overflow(
    prompt_length: int, args: BRPOConfig, markers: ThinkingMarkers, in_model: int | None, in_engine: int | None
) -> tuple[str, str] | None:
    """
    Say why the longest rollout does not fit into a context, and what to change.

    Args:
        prompt_length (`int`):
            Tokens of the longest prompt.
        args ([`BRPOConfig`]):
            Settings.
        markers ([`ThinkingMarkers`]):
            The bridges.
        in_model (`int`, *optional*):
            Tokens of the model's context.
        in_engine (`int`, *optional*):
            Tokens of vLLM's context.

    Returns:
        `tuple[str, str]`, *optional*: reason and remedy, or `None` if it fits.
    """
    thinking, needed = _longest_context(prompt_length, args, markers)
    raise_it = (
        "Raise `vllm_max_model_length`"
        if args.vllm_mode == "colocate"
        else "Restart the vLLM server with a larger `--max-model-len`"
    )
    for context, whose, remedy in (
        (in_model, "the model's", "Lower"),
        (in_engine, "vLLM's", f"{raise_it}, or lower"),
    ):
        if context is not None and needed > context:
            return (
                f"The longest rollout needs {needed} tokens, more than {whose} context of {context}: a prompt of "
                f"{prompt_length}, {thinking} of thinking, {markers.max_bridge_length} of bridges and a summary of "
                f"{args.max_summary_length}.",
                f"{remedy} `budgets`, `eval_budgets` or `max_summary_length`, or drop the longest prompts.",
            )
    return None


def _longest_context(prompt_length: int, args: BRPOConfig, markers: ThinkingMarkers) -> tuple[int, int]:
    thinking = max(args.budgets + (args.eval_budgets or []))
    return thinking, prompt_length + thinking + markers.max_bridge_length + args.max_summary_length


def context_findings(
    prompt_length: int, args: BRPOConfig, markers: ThinkingMarkers, in_model: int | None, in_engine: int | None
) -> list[Finding]:
    """Report whether the longest rollout fits into the contexts. Arguments as in [`context_overflow`]."""
    reason = context_overflow(prompt_length, args, markers, in_model, in_engine)
    if reason is not None:
        return [Finding("context", ERROR, *reason)]
    thinking, needed = _longest_context(prompt_length, args, markers)
    limits = [
        f"{whose} context of {context}"
        for whose, context in (("the model's", in_model), ("vLLM's", in_engine))
        if context is not None
    ]
    message = (
        f"{prompt_length} (longest prompt) + {thinking} (thinking) + {markers.max_bridge_length} (bridges) + "
        f"{args.max_summary_length} (summary) = {needed} tokens"
    )
    return [
        Finding(
            "context",
            OK,
            f"{message}, within {' and '.join(limits)}." if limits else f"{message}. No limit is known.",
        )
    ]


# Rewards


def learning_rate_findings(args: BRPOConfig, trains_adapters: bool) -> list[Finding]:
    """
    Find the learning rate of full fine-tuning in a training of adapters.

    LoRA learns best at about ten times the rate that suits all weights (https://thinkingmachines.ai/blog/lora/).

    Args:
        args ([`BRPOConfig`]):
            All settings.
        trains_adapters (`bool`):
            Whether adapters are trained in place of all weights.

    Returns:
        `list[Finding]`: a warning, or none.
    """
    if not trains_adapters or not 0 < args.learning_rate < _LEAST_ADAPTER_RATE:
        return []
    return [
        Finding(
            "settings",
            WARNING,
            f"`learning_rate={args.learning_rate:g}` suits full fine-tuning. Adapters learn little at it.",
            f"Set `learning_rate` to {10 * args.learning_rate:g} or more.",
        )
    ]


def reward_findings(
    args: BRPOConfig,
    reward_funcs: Sequence[Any],
    rows: Sequence[dict[str, Any]],
    datasets: Mapping[str, Dataset] | None = None,
) -> list[Finding]:
    """
    Test the rewards that use gold answers, and check the gold answers.

    Sampled gold answers are graded against themselves. All gold answers are read in search of texts.

    Args:
        args ([`BRPOConfig`]):
            Settings.
        reward_funcs (`Sequence`):
            The rewards. Those without gold answers are left out.
        rows (`Sequence[dict]`):
            Sampled rows of the data. Empty if there is no data.
        datasets (`Mapping[str, Dataset]`, *optional*):
            Data whose gold answers are all read, by its name in the findings.
    """
    findings = []
    for reward in reward_funcs:
        if isinstance(reward, AnswerReward):
            texts = [
                found for name, data in (datasets or {}).items() for found in text_gold_answers(reward, name, data)
            ]
            sampled = _gold_answers(args, reward, rows)
            findings += _self_test(reward) + [found for found in sampled if found.level != OK or not texts] + texts
    return findings


def length_findings(
    args: BRPOConfig, reward_funcs: Sequence[Any], datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase
) -> list[Finding]:
    """
    Check that a summary has room for the answers of tasks.

    Args:
        args ([`BRPOConfig`]):
            Settings.
        reward_funcs (`Sequence`):
            The rewards; only [`~trl_anytime.rewards.TaskReward`] is looked at.
        datasets (`Mapping[str, Dataset]`):
            Data by what they are called in the findings. Those without a column `answer` are left out.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
    """
    if not any(isinstance(reward, TaskReward) for reward in reward_funcs):
        return []
    findings = []
    for name, dataset in datasets.items():
        if {"answer", ENTRY_COLUMN} <= {*dataset.column_names}:
            lengths = AnswerLengths.measure(dataset["answer"][:], tokenizer, args.max_summary_length)
            level = ERROR if lengths.are_refused else WARNING if lengths.too_long else OK
            message = lengths.message(name, args.max_summary_length)
            findings.append(Finding("gold answers", level, message, "" if level == OK else ADVICE))
    return findings


def _grade(reward: AnswerReward, answers: Sequence[str], gold_answers: Sequence[str]) -> list[float | None]:
    is_task = isinstance(reward, TaskReward)
    summaries = [write_box(answer) if is_task else rf"\boxed{{{answer}}}" for answer in answers]
    formed = [True] * len(summaries)
    columns: dict[str, Any] = {reward.answer_columns[0]: list(gold_answers)}
    return reward([""] * len(summaries), summaries, well_formed=formed, **columns)


def _self_test(reward: AnswerReward) -> list[Finding]:
    if not isinstance(reward, MathReward):  # for other rewards, the right answer depends on their data
        return []
    start = time.perf_counter()
    try:
        scores = _grade(reward, [_RIGHT, _WRONG], [_GOLD, _GOLD])
    except RuntimeError as error:  # the workers do not start, and the error says why
        return [
            Finding("verifier", ERROR, str(error), "Run `python -m pip check`. Workers need math-verify and sympy.")
        ]
    if scores != [1.0, 0.0]:
        return [
            Finding(
                "verifier",
                ERROR,
                f"For the gold answer {_GOLD}, the verifier scores {_RIGHT} as {scores[0]} and {_WRONG} as "
                f"{scores[1]}, instead of 1 and 0. Its limits are {reward.cpu_limit:g} s per answer and "
                f"{reward.batch_limit:g} s per batch.",
                "Raise `cpu_limit` and `batch_limit` of `MathReward`, or stop other programs on this machine.",
            )
        ]
    seconds = time.perf_counter() - start
    return [Finding("verifier", OK, f"It tells right from wrong answers. Start and test took {seconds:.1f} s.")]


def _gold_answers(args: BRPOConfig, reward: AnswerReward, rows: Sequence[dict[str, Any]]) -> list[Finding]:
    """Check that sampled gold answers are right when graded against themselves."""
    if not rows:
        return []
    columns = [next((name for name in reward.answer_columns if has_column(list(row), name)), None) for row in rows]
    if None in columns:
        return [
            Finding(
                "gold answers",
                ERROR,
                f"The data has none of the columns {list(reward.answer_columns)}. It has "
                f"{sorted(rows[columns.index(None)])}.",
                "Rename the column with the gold answers, or pass `answer_columns=` to the reward.",
            )
        ]
    if args.remove_unused_columns:
        return [
            Finding(
                "gold answers",
                ERROR,
                f"`remove_unused_columns` removes the column {columns[0]!r} before the reward sees it.",
                "Set `remove_unused_columns: false`.",
            )
        ]
    values = [gold_of(row, column) for row, column in zip(rows, columns, strict=True) if column is not None]
    gold_answers = [alternatives[0] for value in values if (alternatives := reward._gold(value))]
    own = gold_answers
    if isinstance(reward, TaskReward):  # its gold answers are names of problems
        own = [str(row["answer"]) for row in rows if "answer" in row]
        if len(own) < len(gold_answers):
            return []
    scores = _grade(reward, own, gold_answers)
    wrong = [gold for gold, score in zip(gold_answers, scores, strict=True) if score != 1.0]
    if len(gold_answers) < len(rows) or wrong:
        bad = [repr(value) for value in values if not reward._gold(value)] + [repr(gold) for gold in wrong]
        return [
            Finding(
                "gold answers",
                WARNING,
                f"{len(bad)} of {len(rows)} sampled gold answers cannot be graded, because the verifier does not "
                f"accept them as equal to themselves: {', '.join(bad[:3])[:300]}. No answer to these problems can "
                "earn a reward.",
                f"Fix or drop such rows. {_SKIP_BAD_GOLDS}",
            )
        ]
    return [Finding("gold answers", OK, f"{len(gold_answers)} sampled gold answers are right against themselves.")]


def gold_of(row: dict[str, Any], column: str) -> Any:
    """Return the gold answer of a row. `a.b` is the key `b` of column `a`."""
    (value,) = column_values({name: [value] for name, value in row.items()}, column, list(row))
    return value


def text_gold_answers(reward: Any, name: str, dataset: Dataset) -> list[Finding]:
    """
    Find gold answers that are texts rather than formulas, in all rows.

    A word that many rows share, beside formulas, often says that there is no answer (`proof`). Such rows cannot be
    solved, or are solved by writing the word.

    Args:
        reward (`Any`):
            A reward. Only [`~trl_anytime.rewards.MathReward`] expects formulas.
        name (`str`):
            Name of the data set in the findings.
        dataset (`Dataset`):
            The data.
    """
    column = next(
        (one for one in getattr(reward, "answer_columns", ()) if has_column(dataset.column_names, one)), None
    )
    if not isinstance(reward, MathReward) or column is None:
        return []
    gold_answers = [
        gold_answers
        for value in column_values(dataset, column, dataset.column_names)
        if (gold_answers := reward._gold(value))
    ]
    words = [[_word(gold) for gold in alternatives] for alternatives in gold_answers]
    formulas = sum("" in row_words for row_words in words)
    counts = Counter(word for row_words in words for word in set(row_words) if word and "" not in row_words)
    findings = []
    for word, count in counts.most_common(3):
        if (
            word in _ANSWERING_WORDS
            or count < max(2, _SHARED * len(gold_answers))
            or formulas < (len(gold_answers) - count) / 2
        ):
            continue
        findings.append(
            Finding(
                "gold answers",
                WARNING,
                f"{name}: {count:,} of {len(gold_answers):,} rows have the gold answer {word[:80]!r}. If this word "
                "means that there is no answer, the policy learns to write it.",
                "Drop these rows with `dataset.filter`, or add their answers. Keep them if the word is the answer.",
            )
        )
    long = [alternatives[0] for alternatives in gold_answers if min(map(count_words, alternatives)) > _MANY_WORDS]
    if long:
        findings.append(
            Finding(
                "gold answers",
                WARNING,
                f"{name}: {len(long):,} of {len(gold_answers):,} gold answers have more than {_MANY_WORDS} words, "
                f"such as {long[0][:100]!r}. Only an identical text counts as right.",
                f"Keep only the answer itself, or drop such rows. {_SKIP_BAD_GOLDS}",
            )
        )
    return findings


def _word(gold: str) -> str:
    """
    Return a gold answer of letters alone, in lower case.

    Returns `""` for any other, and for a single letter, which is a choice.
    """
    text = " ".join(_TEXT_COMMAND.sub(r" \1 ", gold).strip(" $.,:;!?()[]*").split()).casefold()
    return text if len(text) > 1 and _LETTERS.fullmatch(text) else ""
