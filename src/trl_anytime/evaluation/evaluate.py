"""
Measurement of a whole accuracy-versus-budget curve, for about the cost of one evaluation.

Each sample has one trace, which is cut at every budget. Every finished sample is written to a journal at once. A run
that is started again continues from there.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.tasks import check_lengths
from ..inference.anytime_config import AnytimeConfig
from ..inference.generate import context_length, is_transformers_model, open_backend
from ..outside.progress import progress
from ..rewards import AnswerReward, FormatReward, MathReward, TaskReward
from ..rewards.returned import checked_rewards, failure_text
from ..rewards.task import ENTRY_COLUMN
from ..rollout.escapes import EscapeSearch
from ..rollout.http_backend import CompletionClient
from ..rollout.types import SUMMARY_FACTS, Rollout
from .journal import Journal, sample_key
from .problems import ProblemSet
from .protocol import Protocol
from .results import AVERAGE, LIMITS

INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


@dataclass(frozen=True)
class Evaluation:
    """
    Evaluation of one model.

    Args:
        model ([`~transformers.PreTrainedModel`], `vllm.LLM` or [`CompletionClient`]):
            The model, an engine, or a server. Only [`run`] needs it.
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
        weights (`str`, *optional*):
            Checksum of the model's weights, see [`Journal`].

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
    weights: str | None = None

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

    def finished(self, journal_path: Path) -> list[dict[str, Any]] | None:
        """
        Return the records of all samples if the journal has them, else `None`.

        Raises:
            `ValueError`: If the journal belongs to another protocol or other weights.
        """
        if not journal_path.exists():
            return None
        journal = Journal(journal_path, self.protocol, self.weights)
        journal.close()
        expected = sum(len(problems.questions) for problems in self.problem_sets) * self.num_samples
        return sorted(journal.records, key=sample_key) if len(journal.records) == expected else None

    @cached_property
    def _escapes(self) -> EscapeSearch:
        return EscapeSearch(self.config.markers, self.tokenizer)

    def run(self, journal_path: Path) -> list[dict[str, Any]]:
        """
        Draw and grade all samples that the journal does not have yet.

        Returns:
            `list[dict]`: the records of all samples.

        Raises:
            `ValueError`: If a budget is beyond the context, the journal belongs to another protocol or other weights,
            or the model's server refuses a request for good.
            `ConnectionError`: If the server fails for longer than its client's patience. What is finished is kept.
        """
        longest = max(len(ids) for dataset_ids in self._prompt_ids.values() for ids in dataset_ids)
        whose = "the server's" if isinstance(self.model, CompletionClient) else "the model's"
        self.config.check_context(longest, self.config.budgets[-1], context_length(self.model), whose)
        journal = Journal(journal_path, self.protocol, self.weights)
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
                is_forced = self.config.markers.is_forced(context.bridge)
                kinds = [
                    (is_forced and self._escapes.kind(*summary)) or ""
                    for summary in zip(ids, texts, clipped[context.budgets[0]], strict=True)
                ]
                cuts.append(
                    {
                        "budgets": [self.config.budgets[j] for j in context.budgets],
                        "thinking_tokens": context.cut,
                        "bridge_tokens": len(context.bridge),
                        "answer_tokens": [len(summary) for summary in ids],
                        "answers": texts,
                        "well_formed": are_formed,
                        "clipped": clipped[context.budgets[0]],
                        "escapes": kinds,
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
        counts = {name: int(counters.get(f"rewards/{type(reward_func).__name__}/{name}", 0)) for name in LIMITS}
        return {name: count for name, count in counts.items() if count}
