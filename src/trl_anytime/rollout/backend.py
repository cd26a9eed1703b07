"""
The two phases of a rollout, thinking and summarising at the cuts, behind one interface for all backends.

A backend gets rendered prompts as token ids and returns whole rollouts. It keeps what both phases share (a cache of
keys and values, an engine that is awake) between them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from .markers import ThinkingMarkers
from .timing import PhaseTimes
from .types import Rollout, Thinking


@dataclass(frozen=True)
class RolloutSettings:
    """
    What a rollout consists of. How tokens are sampled is the backend's own, from TRL's settings.

    Args:
        budgets (`list[int]`):
            M budgets in thinking tokens, increasing. Thinking is sampled up to the last one.
        num_summaries (`int`):
            Summaries A at each budget.
        max_summary_length (`int`):
            Most tokens sampled for one summary.
        markers ([`ThinkingMarkers`]):
            What ends a thinking and what is spliced in after it.
        eos_token_ids (`list[int]`):
            Tokens that end a summary, or a thinking without its end.
        num_generations (`int`, *optional*, defaults to `1`):
            So many adjacent prompts are the same.
        share_summaries (`bool`, *optional*, defaults to `False`):
            Whether budgets that share a cut share its summaries: the curve of an evaluation costs less and keeps its
            mean. In training each budget has its own.
    """

    budgets: list[int]
    num_summaries: int
    max_summary_length: int
    markers: ThinkingMarkers
    eos_token_ids: list[int]
    num_generations: int = 1
    share_summaries: bool = False

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens at which the sampling of a thinking may stop. A marker that is found in the text cannot stop it: what
        follows it is dropped afterwards."""
        end = self.markers.think_end_ids
        return [*self.eos_token_ids, *(end if len(end) == 1 else ())]

    def contexts(self, thinking: Thinking) -> list[tuple[int, tuple[int, ...], list[int]]]:
        """
        Where a thinking is summarised.

        Returns:
            `list`: the distinct cuts in tokens, each with its bridge and the indices of the budgets that share it.
        """
        budgets_at: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for j, budget in enumerate(self.budgets):
            budgets_at.setdefault(thinking.cut(budget, self.markers), []).append(j)
        return [(cut, bridge, indices) for (cut, bridge), indices in budgets_at.items()]

    def num_summaries_at(self, budget_indices: list[int]) -> int:
        """Summaries to sample at a cut that these budgets share."""
        return self.num_summaries if self.share_summaries else self.num_summaries * len(budget_indices)

    def of_budgets(self, budget_indices: list[int], summaries: list) -> dict[int, list]:
        """The summaries of a cut, or anything else that there is one of for each, dealt out to its budgets."""
        if self.share_summaries:
            return {j: list(summaries) for j in budget_indices}
        return {
            j: summaries[k * self.num_summaries : (k + 1) * self.num_summaries] for k, j in enumerate(budget_indices)
        }

    @property
    def max_new_tokens(self) -> int:
        """Tokens after the prompt that one context and its summary can come to."""
        return self.budgets[-1] + self.markers.max_bridge_length + self.max_summary_length


class Generation(ABC):
    """
    A backend of the two phases.

    Attributes:
        times ([`~trl_anytime.rollout.timing.PhaseTimes`]):
            Seconds of the last call, by phase: `"thinking"` and `"summarising"`.
    """

    def __init__(self) -> None:
        self.times = PhaseTimes()

    @abstractmethod
    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        """
        Think once for each prompt, cut the thinking at each budget, and summarise there.

        Args:
            prompt_ids (`Sequence[Sequence[int]]`):
                N rendered prompts.
            settings ([`RolloutSettings`]):
                Budgets, summaries and markers.

        Returns:
            `list[Rollout]`: N rollouts in the order of the prompts, each with M × A summaries.
        """


class Sampler(Protocol):
    """Samples continuations, in whatever way TRL is set to."""

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Args:
            prompt_ids (`list[list[int]]`):
                N prompts.
            max_new_tokens (`int`):
                Most tokens of a continuation.
            stop_token_ids (`list[int]`):
                Tokens that end a continuation, and are part of it.
            num_generations (`int`):
                So many adjacent prompts are the same.

        Returns:
            `tuple`: N continuations, and the log-probabilities of their tokens if they are known.
        """


class PrefixGeneration(Generation):
    """
    The two phases as independent continuations: every summary's context is a prompt of its own.

    Args:
        sample ([`Sampler`]):
            Samples continuations.
    """

    def __init__(self, sample: Sampler):
        super().__init__()
        self._sample = sample

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        self.times.seconds.clear()
        prompts, markers = [list(ids) for ids in prompt_ids], settings.markers
        with self.times("thinking"):
            sampled, logprobs = self._sample(
                prompts, settings.budgets[-1], settings.stop_token_ids, settings.num_generations
            )
        thinkings = [
            Thinking.of(ids, markers, settings.eos_token_ids, None if logprobs is None else logprobs[i])
            for i, ids in enumerate(sampled)
        ]

        # Ordered by budget, so that rows of similar length meet in a batch
        slots = sorted(
            ((i, *context) for i, thinking in enumerate(thinkings) for context in settings.contexts(thinking)),
            key=lambda slot: slot[-1][0],
        )
        contexts = []
        for i, cut, bridge, indices in slots:
            context = [*prompts[i], *thinkings[i].token_ids[:cut], *bridge]
            contexts += [context] * settings.num_summaries_at(indices)
        with self.times("summarising"):
            sampled, logprobs = self._sample(
                contexts, settings.max_summary_length, settings.eos_token_ids, settings.num_summaries
            )

        def by_rollout(values: list) -> list[list[list]]:  # from slots to N × M × A
            rest = iter(values)
            rollouts: list[list[list]] = [[[] for _ in settings.budgets] for _ in prompts]
            for i, _, _, indices in slots:
                of_slot = list(islice(rest, settings.num_summaries_at(indices)))
                for j, of_budget in settings.of_budgets(indices, of_slot).items():
                    rollouts[i][j] = of_budget
            return rollouts

        summaries = by_rollout(sampled)
        summary_logprobs = None if logprobs is None else by_rollout(logprobs)
        return [
            Rollout.of(
                prompt,
                thinkings[i],
                settings.budgets,
                markers,
                summaries[i],
                None if summary_logprobs is None else summary_logprobs[i],
            )
            for i, prompt in enumerate(prompts)
        ]
