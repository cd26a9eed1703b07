"""
Measurement of a whole accuracy-versus-budget curve, for about the cost of one evaluation.

Each sample has one trace, which is cut at every budget. Every finished sample is written to a journal at once. A run
that is started again continues from there.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.tasks import check_lengths
from ..inference.anytime_config import BUDGETS, AnytimeConfig
from ..inference.generate import context_length, is_transformers_model, open_backend
from ..outside.display import for_terminal
from ..outside.progress import progress
from ..outside.tables import aligned
from ..outside.validation import (
    MEBIBYTE,
    Check,
    Unfit,
    boolean,
    fields,
    free_form,
    integer,
    list_of,
    mapping_of,
    number,
    parse_json,
    read_json,
    read_lines,
    string,
)
from ..rewards import AnswerReward, FormatReward, MathReward, TaskReward
from ..rewards.returned import checked_rewards, failure_text
from ..rewards.task import ENTRY_COLUMN
from ..rollout.http_backend import CompletionClient
from ..rollout.types import SUMMARY_FACTS, Rollout
from .problems import ProblemSet
from .statistics import Estimate, compare, estimates
from .zeros import COUNTERS, alarms, answer_counts

INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
AVERAGE = "average"  # over several data sets, each with the same weight
_RESULTS_FORMAT = 1
_MOST_SETS = 64  # the picture has a panel for each
_MOST_BYTES_OF_RESULTS = 256 * MEBIBYTE
_MOST_BYTES_OF_JOURNAL, _MOST_BYTES_OF_SAMPLE = 16 * 1024 * MEBIBYTE, 256 * MEBIBYTE

_REWARD = number(-1e30, 1e30)  # so that means and differences are finite
_ESTIMATE = fields(mean=_REWARD, low=_REWARD, high=_REWARD)
_RESULTS = fields(
    protocol=fields(
        model=string(10_000),
        budgets=BUDGETS,
        problems=mapping_of(list_of(free_form, least=2, most=2), least=1, most=_MOST_SETS),
    ),
    curves=mapping_of(fields(accuracy=list_of(_ESTIMATE), anytime_average=_ESTIMATE), least=1, most=_MOST_SETS + 1),
    questions=mapping_of(list_of(list_of(_REWARD), least=1), least=1, most=_MOST_SETS),
)
# Counters of a reward with gold answers. They count answers that score 0 because of a limit, or because it failed.
_LIMITS = ("timeouts", "dead_workers", "too_long", "scorer_errors", "bad_scores", "unsafe_answers")


@dataclass(frozen=True)
class Protocol:
    """
    Description of what an evaluation measures.

    Args:
        model (`str`):
            Name of the model.
        config ([`AnytimeConfig`]):
            Markers, bridges and system prompt, and the budgets, summary length and sampling of this evaluation.
        problems (`dict[str, tuple[str, int]]`):
            Fingerprint and number of problems, by data set.
        instruction (`str`):
            Text after each question.
        num_samples (`int`):
            Traces for each question.
        num_summaries (`int`):
            Summaries for each trace and cut.
        reward (`str`):
            Name of the reward.
        seed (`int`):
            Seed of the draws.
    """

    model: str
    config: AnytimeConfig
    problems: dict[str, tuple[str, int]]
    instruction: str
    num_samples: int
    num_summaries: int
    reward: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol in plain types, for a file."""
        config = asdict(self.config)
        # Neither the libraries that wrote a checkpoint nor its training objective change a measurement
        values = {key: value for key, value in config.items() if key not in ("versions", "prior")}
        values |= {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"}
        return json.loads(json.dumps(values))


# May differ between two results that are compared. The comparison is about these, or they are chance.
NOT_COMPARED = ("model", "markers", "eos_token_ids", "chat_template_kwargs", "seed")


def differences(ours: dict[str, Any], theirs: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """List the differences of two protocols, which are given as `Protocol.as_dict` returns them."""
    return [
        f"{name} is {_in_short(theirs.get(name))} there and {_in_short(ours.get(name))} here"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ignore and ours.get(name) != theirs.get(name)
    ]


def _in_short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 500 else f"{shown[:500]}[…]"


class Journal:
    """
    File of the finished samples of an evaluation, one JSON line each after a line with the protocol.

    Args:
        path (`Path`):
            Path of the file. It is created if it does not exist.
        protocol ([`Protocol`]):
            Protocol of the evaluation.

    Attributes:
        records (`list[dict]`):
            Finished samples.

    Raises:
        `ValueError`: If the file belongs to another protocol, or is damaged elsewhere than at its end. The message
            names the line and the field.
    """

    def __init__(self, path: Path, protocol: Protocol):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        complete = 0  # bytes of whole lines. A crash may have left part of a line after them.
        if path.exists():
            check = fields(protocol=mapping_of(free_form))
            for i, line in enumerate(read_lines(path, _MOST_BYTES_OF_JOURNAL, _MOST_BYTES_OF_SAMPLE)):
                complete += len(line)
                try:
                    values = parse_json(line, f"{path}, line {i + 1}", check)
                except Unfit as error:
                    raise Unfit(f"{error} Remove the file, or set another --output.") from error
                if i > 0:
                    self.records.append(values)
                    continue
                found = differences(protocol.as_dict(), values["protocol"])
                if found:
                    raise ValueError(
                        f"{path} belongs to another protocol: {'; '.join(found)}. Set another --output, or repeat "
                        "the command that created it."
                    )
                check = _sample_of(protocol)
            if len({sample_key(values) for values in self.records}) != len(self.records):
                raise ValueError(f"{path} has samples twice, because two runs wrote to it. Set another --output.")
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)
        if not complete:
            self._append({"protocol": protocol.as_dict()})

    def add(self, record: dict[str, Any]) -> None:
        """Add a finished sample. It is on the disk when this returns."""
        self._append(record)
        self.records.append(record)

    def _append(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _sample_of(protocol: Protocol) -> Check:
    """Return a check for finished samples of a protocol."""
    per_summary = {"least": protocol.num_summaries, "most": protocol.num_summaries}
    sample = fields(
        dataset=string(),
        question=integer(0),
        sample=integer(0, protocol.num_samples - 1),
        thinking=string(_MOST_BYTES_OF_SAMPLE),
        thinking_tokens=integer(0),
        prompt_tokens=integer(0),
        finished=boolean,
        seconds=number(0, 1e9),
        cuts=list_of(
            fields(
                # What a sample of version 0.1.0 or older may lack, and what only rewards with boxes have
                {"clipped": list_of(boolean, **per_summary), "no_box": list_of(boolean, **per_summary)},
                budgets=list_of(integer(1), least=1),
                thinking_tokens=integer(0),
                bridge_tokens=integer(0),
                answer_tokens=list_of(integer(0), **per_summary),
                answers=list_of(string(_MOST_BYTES_OF_SAMPLE), **per_summary),
                well_formed=list_of(boolean, **per_summary),
                rewards=list_of(_REWARD, **per_summary),
            ),
            least=1,
        ),
    )

    def check(value: Any, name: str) -> Any:
        sample(value, name)
        _, count = protocol.problems.get(value["dataset"], ("", 0))
        if value["question"] >= count:
            raise Unfit(f"`dataset` and `question` name a problem that is not evaluated: {sample_key(value)[:2]!r}.")
        if sorted(budget for cut in value["cuts"] for budget in cut["budgets"]) != protocol.config.budgets:
            raise Unfit(f"`cuts` must have each of the budgets {protocol.config.budgets} once.")
        return value

    return check


def sample_key(record: dict[str, Any]) -> tuple[str, int, int]:
    """Return data set, question and number of a sample."""
    return record["dataset"], record["question"], record["sample"]


@dataclass(frozen=True)
class Evaluation:
    """
    Evaluation of one model.

    Args:
        model ([`~transformers.PreTrainedModel`], `vllm.LLM` or [`CompletionClient`]):
            The model, an engine, or a server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        config ([`AnytimeConfig`]):
            Markers, bridges and system prompt, and the budgets, summary length and sampling of this evaluation.
        problem_sets (`list[ProblemSet]`):
            Problems to evaluate on.
        name (`str`):
            Name of the model.
        num_samples (`int`, *optional*, defaults to `1`):
            Traces for each question.
        num_summaries (`int`, *optional*, defaults to `1`):
            Summaries for each trace and cut.
        instruction (`str`, *optional*):
            Text after each question. Defaults to the paper's.
        reward (`Callable`, *optional*):
            Reward function in TRL's form. Defaults to [`~trl_anytime.rewards.TaskReward`] for problems of a task, and
            to [`~trl_anytime.rewards.MathReward`] for others.
        batch_size (`int`, *optional*):
            Samples that are computed together. Defaults to 16 for a model, to 256 for an engine, and to 1 for a
            server, which batches by itself.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        max_cached_tokens (`int`, *optional*):
            See [`TransformersGeneration`].

    Raises:
        `ValueError`: If settings do not fit each other, or a budget is beyond the context.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: AnytimeConfig
    problem_sets: list[ProblemSet]
    name: str
    num_samples: int = 1
    num_summaries: int = 1
    instruction: str = INSTRUCTION
    reward: Callable[..., list[float | None]] | None = None
    batch_size: int | None = None
    seed: int = 0
    max_cached_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_summaries", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.config.sampling.temperature == 0 and self.num_samples * self.num_summaries > 1:
            raise ValueError(
                "At temperature 0 all samples are the same. Set `num_samples` and `num_summaries` to 1, or raise "
                "`temperature`."
            )
        for problems in self.problem_sets:
            if problems.entries is not None:
                check_lengths(problems.name, problems.answers, self.tokenizer, self.config.max_summary_length)
        names = [problems.name for problems in self.problem_sets]
        if len(set(names)) < len(names) or not names or AVERAGE in names:
            raise ValueError(
                f"Data sets need different names, other than {AVERAGE!r}, got {names}. Write NAME=SOURCE."
            )

    @property
    def protocol(self) -> Protocol:
        """Return the description of what is measured."""
        return Protocol(
            self.name,
            self.config,
            {problems.name: (problems.fingerprint, len(problems.questions)) for problems in self.problem_sets},
            self.instruction,
            self.num_samples,
            self.num_summaries,
            " and ".join(dict.fromkeys(map(self._reward_name, self.problem_sets))),
            self.seed,
        )

    def _reward_of(self, problems: ProblemSet) -> Any:
        reward = self.reward
        if reward is None:
            reward = MathReward() if problems.entries is None else TaskReward()
        if isinstance(reward, AnswerReward | FormatReward):  # as in training
            return replace(reward, answer_bridge=self.config.markers.answer_bridge)
        return reward

    def _reward_name(self, problems: ProblemSet) -> str:
        reward = self._reward_of(problems)
        return getattr(reward, "__name__", type(reward).__name__)

    @cached_property
    def _prompt_ids(self) -> dict[str, list[list[int]]]:
        prompts = {
            problems.name: [
                self.config.question(self.tokenizer, f"{question} {self.instruction}".rstrip())
                for question in problems.questions
            ]
            for problems in self.problem_sets
        }
        return {name: self.config.prompt_ids(self.tokenizer, messages) for name, messages in prompts.items()}

    def run(self, journal_path: Path) -> list[dict[str, Any]]:
        """
        Draw and grade all samples that the journal does not have yet.

        Returns:
            `list[dict]`: the records of all samples.

        Raises:
            `ValueError`: If a budget is beyond the context, the journal belongs to another protocol, or the model's
            server refuses a request for good.
            `ConnectionError`: If the server fails for longer than its client's patience. What is finished is kept.
        """
        longest = max(len(ids) for dataset_ids in self._prompt_ids.values() for ids in dataset_ids)
        whose = "the server's" if isinstance(self.model, CompletionClient) else "the model's"
        self.config.check_context(longest, self.config.budgets[-1], context_length(self.model), whose)
        journal = Journal(journal_path, self.protocol)
        try:
            done = {sample_key(record) for record in journal.records}
            # Take all questions once before any question twice
            samples = [
                (problems, question, sample)
                for sample in range(self.num_samples)
                for problems in self.problem_sets
                for question in range(len(problems.questions))
                if (problems.name, question, sample) not in done
            ]
            with progress(self.name, "sample", len(samples) + len(done), len(done)) as count:
                for records in self._batches(samples):
                    for record in records:
                        journal.add(record)
                        count()
        finally:
            journal.close()
        return sorted(journal.records, key=sample_key)

    def _batches(self, samples: list[tuple[ProblemSet, int, int]]) -> Iterator[list[dict[str, Any]]]:
        """Yield the records of batches as they are completed."""
        if isinstance(self.model, CompletionClient):
            default, num_threads = 1, self.model.concurrency
        else:
            default, num_threads = 16 if is_transformers_model(self.model) else 256, 1
        size = self.batch_size or default
        batches = [samples[first : first + size] for first in range(0, len(samples), size)]
        if num_threads == 1:
            yield from map(self._draw_and_grade, batches)
            return
        pool = ThreadPoolExecutor(num_threads)
        try:
            futures: list[Future] = [pool.submit(self._draw, batch) for batch in batches]
            batch_of_future = dict(zip(futures, batches, strict=True))
            for future in as_completed(futures):
                yield self._grade(batch_of_future[future], *future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _draw_and_grade(self, batch: list[tuple[ProblemSet, int, int]]) -> list[dict[str, Any]]:
        return self._grade(batch, *self._draw(batch))

    def _draw(self, batch: list[tuple[ProblemSet, int, int]]) -> tuple[list[Rollout], float]:
        """Return the rollouts of a batch, and the seconds that they took."""
        start = time.perf_counter()
        prompt_ids = [self._prompt_ids[problems.name][question] for problems, question, _ in batch]
        # The seed depends on the first sample, so a run that continues after a crash draws other numbers
        problems, question, sample = batch[0]
        text = f"{self.seed} {problems.name} {question} {sample}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
        with open_backend(
            self.model, self.tokenizer, self.config.sampling, seed, self.max_cached_tokens
        ) as generation:
            rollouts = generation.roll_out(prompt_ids, self.config.rollout_settings(self.num_summaries))
        return rollouts, time.perf_counter() - start

    def _grade(
        self, batch: list[tuple[ProblemSet, int, int]], rollouts: list[Rollout], seconds: float
    ) -> list[dict[str, Any]]:
        settings = self.config.rollout_settings(self.num_summaries)
        records, summaries = [], []
        for (problems, question, sample), rollout in zip(batch, rollouts, strict=True):
            thinking = rollout.thinking
            facts = rollout.summary_facts(self.config.budgets, self.config.markers, self.tokenizer)
            clipped = rollout.clipped(self.config.max_summary_length, self.config.eos_token_ids)
            cuts = []
            for context in settings.contexts(thinking):
                ids = rollout.summaries[context.budgets[0]]
                texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                rewards: list[float] = []
                # Budgets that share a cut share its summaries, of which the first budget is told
                first = context.budgets[0] * self.num_summaries
                facts_here = facts[first : first + self.num_summaries]
                are_formed = [told["well_formed"] for told in facts_here]
                cuts.append(
                    {
                        "budgets": [self.config.budgets[j] for j in context.budgets],
                        "thinking_tokens": context.cut,
                        "bridge_tokens": len(context.bridge),
                        "answer_tokens": [len(summary) for summary in ids],
                        "answers": texts,
                        "well_formed": are_formed,
                        "clipped": clipped[context.budgets[0]],
                        **self._missing_boxes(problems, texts, are_formed),
                        "rewards": rewards,
                    }
                )
                summaries += [
                    (problems, question, text, summary, told, rewards)
                    for text, summary, told in zip(texts, ids, facts_here, strict=True)
                ]
            records.append(
                {
                    "dataset": problems.name,
                    "question": question,
                    "sample": sample,
                    "thinking": str(self.tokenizer.decode(thinking.token_ids)),
                    "thinking_tokens": len(thinking.token_ids),
                    "prompt_tokens": len(rollout.prompt_ids),
                    "finished": thinking.finished,
                    "seconds": seconds / len(batch),
                    "cuts": cuts,
                }
            )
        limited: Counter[str] = Counter()
        for name in {problems.name: None for problems, *_ in summaries}:
            limited.update(self._score([summary for summary in summaries if summary[0].name == name]))
        if limited:  # a reward counts over all its answers, so the batch's counts go to its first sample
            records[0]["limited"] = dict(limited)
        return records

    def _missing_boxes(self, problems: ProblemSet, texts: list[str], well_formed: list[bool]) -> dict[str, list[bool]]:
        """Return which well-formed summaries lack a box, for a reward that looks for one."""
        reward = self._reward_of(problems)
        if not isinstance(reward, AnswerReward):
            return {}
        found = [reward.find_answer(text, formed) for text, formed in zip(texts, well_formed, strict=True)]
        return {"no_box": [answer == "" for answer in found]}

    def _score(
        self, summaries: list[tuple[ProblemSet, int, str, list[int], dict[str, Any], list[float]]]
    ) -> dict[str, int]:
        """
        Score summaries of one set, each given with its problem.

        The rewards are added to the list in each tuple.

        Returns:
            `dict[str, int]`: number of answers that hit a limit of the verifier, by counter, without zeros.
        """
        conversational = self.tokenizer.chat_template is not None
        problem_set, *_ = summaries[0]
        reward_func, reward_name = self._reward_of(problem_set), self._reward_name(problem_set)
        entries = problem_set.entries
        questions = [problems.questions[question] for problems, question, *_ in summaries]
        counters: dict[str, float] = {}
        prompts = [self.config.question(self.tokenizer, question) for question in questions]
        try:
            returned = reward_func(
                prompts=prompts,
                completions=[
                    [{"role": "assistant", "content": text}] if conversational else text
                    for _, _, text, *_ in summaries
                ],
                completion_ids=[ids for *_, ids, _, _ in summaries],
                **{name: [told[name] for *_, told, _ in summaries] for name in SUMMARY_FACTS},
                answer=[problem_set.answers[question] for _, question, *_ in summaries],
                **({} if entries is None else {ENTRY_COLUMN: [entries[question] for _, question, *_ in summaries]}),
                **({"log_metric": counters.__setitem__} if isinstance(reward_func, AnswerReward) else {}),
            )
        except SystemExit as error:
            raise ValueError(f"The reward `{reward_name}` failed: {failure_text(error)}.") from error
        try:
            rewards = checked_rewards(returned, prompts)
        except ValueError as error:
            raise ValueError(f"The reward `{reward_name}` failed: {error}.") from error
        missing = rewards.count(None)
        if missing:
            raise ValueError(
                f"The reward `{reward_name}` returned no number for {missing} of {len(rewards)} answers. It "
                "ran out of time, or does not apply to them. Finished samples are kept. Repeat the command when the "
                "machine is idle, or set another --reward."
            )
        for reward, (*_, into) in zip(rewards, summaries, strict=True):
            assert reward is not None
            into.append(reward)
        counts = {name: int(counters.get(f"rewards/{type(reward_func).__name__}/{name}", 0)) for name in _LIMITS}
        return {name: count for name, count in counts.items() if count}


# Results


def accuracies(records: list[dict[str, Any]], budgets: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the mean reward of each question at each budget, shape (Q, M), by data set."""
    sums: dict[str, dict[int, list[np.ndarray]]] = {}
    for record in records:
        at = {budget: np.mean(cut["rewards"]) for cut in record["cuts"] for budget in cut["budgets"]}
        sample_scores = np.array([at[budget] for budget in budgets])
        sums.setdefault(record["dataset"], {}).setdefault(record["question"], []).append(sample_scores)
    return {
        name: np.array([np.mean(by_question[question], axis=0) for question in sorted(by_question)])
        for name, by_question in sums.items()
    }


def results_of(protocol: Protocol, records: list[dict[str, Any]]) -> dict[str, Any]:
    """
    Return the results of an evaluation, for a file.

    Args:
        protocol ([`Protocol`]):
            Protocol of the evaluation.
        records (`list[dict]`):
            All samples.
    """
    expected = sum(count for _, count in protocol.problems.values()) * protocol.num_samples
    assert len(records) == expected, f"{len(records)} of {expected} samples"
    budgets = protocol.config.budgets
    by_set = accuracies(records, budgets)
    results: dict[str, Any] = {"format": _RESULTS_FORMAT, "protocol": protocol.as_dict(), "curves": {}}
    groups = {name: [name] for name in protocol.problems}
    if len(groups) > 1:
        groups[AVERAGE] = list(protocol.problems)
    for group, names in groups.items():
        curve, average = estimates([by_set[name] for name in names])
        group_records = [record for record in records if record["dataset"] in names]
        lengths = [record["thinking_tokens"] for record in group_records]
        results["curves"][group] = {
            "accuracy": [asdict(estimate) for estimate in curve],
            "anytime_average": asdict(average),
            "thinking": {
                "mean_tokens": float(np.mean(lengths)),
                "finished": float(np.mean([record["finished"] for record in group_records])),
                "mean_tokens_at": [float(np.minimum(lengths, budget).mean()) for budget in budgets],
            },
            "well_formed": float(
                np.mean(
                    [formed for record in group_records for cut in record["cuts"] for formed in cut["well_formed"]]
                )
            ),
            "answers": answer_counts(group_records, budgets),
        }
    results["alarms"] = alarms(results)
    results["questions"] = {name: values.tolist() for name, values in by_set.items()}
    results["cost"] = _cost(records)
    limited: Counter[str] = Counter()
    for record in records:
        limited.update(record.get("limited", {}))
    answers = sum(len(cut["answers"]) for record in records for cut in record["cuts"])
    results["limited"] = {"answers": answers, **{name: limited[name] for name in _LIMITS}}
    return results


def limited_answers(results: dict[str, Any]) -> str:
    """Say how many answers count as wrong because of a limit or failure of the reward, or return `""`."""
    counts = {name: results["limited"][name] for name in _LIMITS if results["limited"].get(name)}
    answers = results["limited"]["answers"]
    if not counts:
        return ""
    message = ", ".join(f"{count} {name}" for name, count in counts.items())
    share = sum(counts.values()) / answers
    return f"{share:.2%} of {answers} answers count as wrong, because of a limit or failure of the reward: {message}."


def _cost(records: list[dict[str, Any]]) -> dict[str, float]:
    """Count the computed tokens, and those that an evaluation at the last budget alone would compute."""
    thinking = sum(record["thinking_tokens"] for record in records)
    prompts = sum(record["prompt_tokens"] for record in records)

    def after(cut: dict[str, Any]) -> int:
        return cut["bridge_tokens"] + sum(cut["answer_tokens"])

    answers = sum(after(cut) for record in records for cut in record["cuts"])
    last_answers = sum(after(record["cuts"][-1]) for record in records)
    return {
        "thinking_tokens": thinking,
        "answer_tokens": answers,
        "tokens": prompts + thinking + answers,
        "tokens_at_last_budget_alone": prompts + thinking + last_answers,
        "seconds": sum(record["seconds"] for record in records),
    }


def comparison(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """
    Compare results with those of a baseline, question by question.

    Returns:
        `dict`: by data set, the differences at each budget and of the anytime average.

    Raises:
        `ValueError`: If the two come from different protocols.
    """
    found = differences(ours["protocol"], theirs["protocol"], NOT_COMPARED)
    if found:
        raise ValueError(f"The baseline has another protocol: {'; '.join(found)}. Use the same settings.")
    compared = {}
    for group in ours["curves"]:
        names = list(ours["protocol"]["problems"]) if group == AVERAGE else [group]
        mine, other = ([np.array(results["questions"][name]) for name in names] for results in (ours, theirs))
        curve, average = compare(mine, other)
        compared[group] = {"accuracy": [asdict(c) for c in curve], "anytime_average": asdict(average)}
    return {"model": theirs["protocol"]["model"], "curves": compared}


def load_results(path: Path) -> dict[str, Any]:
    """
    Load results from a file.

    Raises:
        `ValueError`: If this version cannot read them. The message names the file and the field.
    """
    try:
        results = read_json(path, fields(format=integer(1)), _MOST_BYTES_OF_RESULTS)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}. Give a results.json of `trl-anytime eval`.") from None
    if results["format"] != _RESULTS_FORMAT:
        raise Unfit(
            f"{path} has format {results['format']}, but this version reads {_RESULTS_FORMAT}. Repeat the evaluation."
        )
    try:
        _RESULTS(results, "")
        free_form(results["protocol"], "protocol")
        _check_shapes(results)
    except Unfit as error:
        raise Unfit(f"{path} is not a result file of `trl-anytime eval`: {error}") from error
    return results


def _check_shapes(results: dict[str, Any]) -> None:
    """Refuse results without one number for each question and budget."""
    protocol, num_budgets = results["protocol"], len(results["protocol"]["budgets"])
    if results["questions"].keys() != protocol["problems"].keys():
        raise Unfit("`questions` and `protocol.problems` must have the same data sets.")
    for name, values in results["questions"].items():
        if len(values) != protocol["problems"][name][1] or any(len(row) != num_budgets for row in values):
            raise Unfit(f"`questions.{name}` must have a number for each question and budget.")
    for name, curve in results["curves"].items():
        if len(curve["accuracy"]) != num_budgets:
            raise Unfit(f"`curves.{name}.accuracy` must have an estimate for each budget.")


def save_samples(records: list[dict[str, Any]], problem_sets: Sequence[ProblemSet], path: Path) -> None:
    """Write all samples to a Parquet file, one row each."""
    from datasets import Dataset

    problems = _problem_of(problem_sets)
    rows = [
        {
            **problems(record),
            **{name: record[name] for name in ("thinking", "thinking_tokens", "finished")},
            "cuts": record["cuts"],
        }
        for record in records
    ]
    Dataset.from_list(rows).to_parquet(str(path))


def save_answers(records: list[dict[str, Any]], problem_sets: Sequence[ProblemSet], path: Path) -> None:
    """Write all answers to a Parquet file, a row for each sample, budget and summary."""
    from datasets import Dataset, Features, Value

    problems = _problem_of(problem_sets)
    rows = [
        {
            **problems(record),
            "budget": budget,
            "summary": k,
            "thinking_tokens": cut["thinking_tokens"],
            "finished": record["finished"] and record["thinking_tokens"] <= budget,
            "answer": cut["answers"][k],
            "answer_tokens": cut["answer_tokens"][k],
            "well_formed": cut["well_formed"][k],
            **{name: cut[name][k] if name in cut else None for name in ("clipped", "no_box")},
            "reward": cut["rewards"][k],
        }
        for record in records
        for cut in record["cuts"]
        for budget in cut["budgets"]
        for k in range(len(cut["answers"]))
    ]
    # Given, because a column of nothing but null has no type of its own
    types = {name: type(value).__name__ for name, value in rows[0].items()}
    types |= {"clipped": "bool", "no_box": "bool", "reward": "float"}
    names = {"str": "string", "int": "int64", "bool": "bool", "float": "float64"}
    features = Features({name: Value(names[kind]) for name, kind in types.items()})
    Dataset.from_list(rows, features).to_parquet(str(path))


def _problem_of(problem_sets: Sequence[ProblemSet]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives the columns about a record's problem."""
    sets = {problems.name: problems for problems in problem_sets}

    def columns(record: dict[str, Any]) -> dict[str, Any]:
        problems, question = sets[record["dataset"]], record["question"]
        return {
            **{name: record[name] for name in ("dataset", "question", "sample")},
            "problem": problems.questions[question],
            "gold": json.dumps(problems.answers[question], ensure_ascii=False, default=str),
        }

    return columns


def table(results: dict[str, Any]) -> str:
    """
    Return the curves as text.

    Rows are budgets and columns are data sets. Cells are in percent, with the ends of the confidence interval.
    """
    curves = results["curves"]
    budgets = results["protocol"]["budgets"]

    def cell(value: dict[str, float]) -> str:
        estimate = Estimate(**value)
        return f"{100 * estimate.mean:5.1f} [{100 * estimate.low:5.1f}, {100 * estimate.high:5.1f}]"

    samples = results["protocol"]["num_samples"]

    def header(name: str) -> str:
        if name == AVERAGE:
            return AVERAGE
        count = results["protocol"]["problems"][name][1]
        return f"{for_terminal(name, one_line=True)} (n={count}{f'×{samples}' if samples > 1 else ''})"

    counts = list(curves.values())[-1]["answers"]  # of all data sets
    counters = {name: title for name, title in COUNTERS.items() if counts[0][name] is not None}
    rows = [["budget", *map(header, curves), *counters.values()]]
    rows += [
        [
            str(budget),
            *(cell(c["accuracy"][j]) for c in curves.values()),
            *(str(counts[j][name]) for name in counters),
        ]
        for j, budget in enumerate(budgets)
    ]
    rows.append(["anytime", *(cell(c["anytime_average"]) for c in curves.values())])
    rows.append(["thinking", *(f"{c['thinking']['mean_tokens']:.0f} tokens" for c in curves.values())])
    rows.append(["finished", *(f"{100 * c['thinking']['finished']:.1f} %" for c in curves.values())])
    if "baseline" in results:
        rows.append([for_terminal(f"anytime, minus {results['baseline']['model']}", one_line=True)])
        rows.append(
            [
                "",
                *(
                    f"{cell(c['anytime_average']['difference'])} p={c['anytime_average']['p_value']:.3g}"
                    for c in results["baseline"]["curves"].values()
                ),
            ]
        )
    return aligned(rows, left=())
