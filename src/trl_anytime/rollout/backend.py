"""
One interface for all backends of the two phases of a rollout: thinking, and summarising at the cuts.

A backend gets rendered prompts as token ids and returns whole rollouts. Between the phases it keeps what both share: a
cache of keys and values, or an engine that is awake.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from .markers import ThinkingMarkers
from .settling import Check, StopWhenSettled
from .timing import PhaseTimes
from .types import Context, Rollout, Thinking


@dataclass(frozen=True)
class RolloutSettings:
    """
    Settings of a rollout's parts. The settings of sampling belong to the backend, which takes them from TRL.

    Args:
        budgets (`list[int]`):
            M budgets in thinking tokens, increasing. Thinking is sampled up to the last one.
        num_summaries (`int`):
            Number of summaries A at each budget. With 0 the model thinks and does not answer.
        max_summary_length (`int`):
            Most tokens sampled for one summary.
        markers ([`ThinkingMarkers`]):
            Markers that end a trace, and bridges that are inserted after it.
        eos_token_ids (`list[int]`):
            Tokens that end a summary, or a trace without its end.
        num_generations (`int`, *optional*, defaults to `1`):
            Number of consecutive prompts that are identical.
        share_summaries (`bool`, *optional*, defaults to `False`):
            Whether budgets that share a cut share its summaries. Then the curve of an evaluation costs less and keeps
            its mean. In training each budget has summaries of its own.
        stop ([`StopWhenSettled`], *optional*):
            Rule that ends a trace before its last budget.
    """

    budgets: list[int]
    num_summaries: int
    max_summary_length: int
    markers: ThinkingMarkers
    eos_token_ids: list[int]
    num_generations: int = 1
    share_summaries: bool = False
    stop: StopWhenSettled | None = None

    @property
    def stop_token_ids(self) -> list[int]:
        """
        Return the tokens at which the sampling of a trace may stop.

        A marker that is found in the text cannot stop it. What follows such a marker is dropped afterwards.
        """
        end = self.markers.think_end_ids
        return [*self.eos_token_ids, *(end if len(end) == 1 else ())]

    def contexts(self, thinking: Thinking) -> list[Context]:
        """Return the distinct cuts of a trace, each with the budgets that share it."""
        budgets_at: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for j, budget in enumerate(self.budgets):
            budgets_at.setdefault(thinking.cut(budget, self.markers), []).append(j)
        return [
            Context(
                cut,
                bridge,
                tuple(indices),
                self.num_summaries * (1 if self.share_summaries else len(indices)),
                self.share_summaries,
            )
            for (cut, bridge), indices in budgets_at.items()
        ]

    def check_context(self, cut: int) -> Context:
        """Return the place of a check of `stop`, at which a running trace is summarised."""
        assert self.stop is not None
        bridge = self.markers.truncation_bridge_ids + self.markers.answer_bridge_ids
        return Context(cut, bridge, (), self.stop.answers)

    def known_summaries(self, context: Context, checks: Sequence[Check]) -> list[list[int]] | None:
        """Return the summaries of a context that a check has sampled there, or `None` if there are not enough."""
        if not self.markers.is_forced(context.bridge):
            return None
        for check in checks:
            if check.cut == context.cut and len(check.summaries) >= context.num_summaries:
                return check.summaries[: context.num_summaries]
        return None

    @property
    def max_new_tokens(self) -> int:
        """Return the most tokens after the prompt that one context and its summary can have."""
        return self.budgets[-1] + self.markers.max_bridge_length + self.max_summary_length


class Generation(ABC):
    """
    Backend of the two phases.

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
    """Function that samples continuations with TRL's settings."""

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Sample continuations.

        Args:
            prompt_ids (`list[list[int]]`):
                N prompts.
            max_new_tokens (`int`):
                Most tokens of a continuation.
            stop_token_ids (`list[int]`):
                Tokens that end a continuation. They are part of it.
            num_generations (`int`):
                Number of consecutive prompts that are identical.

        Returns:
            `tuple`: N continuations, and the log-probabilities of their tokens if they are known.
        """


class PrefixGeneration(Generation):
    """
    The two phases as independent continuations. The context of every summary is a prompt of its own.

    Args:
        sample ([`Sampler`]):
            Function that samples continuations.
    """

    def __init__(self, sample: Sampler):
        super().__init__()
        self._sample = sample

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        if settings.stop is not None:
            raise ValueError(
                "Thinking cannot stop when it has settled, because each check would compute its trace again. Leave "
                "out `stop_when`."
            )
        self.times.seconds.clear()
        prompts, markers = [list(ids) for ids in prompt_ids], settings.markers
        with self.times("thinking"):
            sampled, logprobs = self._sample(
                prompts, settings.budgets[-1], settings.stop_token_ids, settings.num_generations
            )
        traces = [
            Thinking.from_tokens(ids, markers, settings.eos_token_ids, None if logprobs is None else logprobs[i])
            for i, ids in enumerate(sampled)
        ]

        contexts = [settings.contexts(thinking) for thinking in traces]
        # Order by budget, so that rows of similar length share a batch
        slots = sorted(
            ((i, k) for i in range(len(prompts)) for k in range(len(contexts[i]))),
            key=lambda slot: contexts[slot[0]][slot[1]].budgets[0],
        )
        rows = [
            context_ids
            for i, k in slots
            for context_ids in [contexts[i][k].token_ids(prompts[i], traces[i])] * contexts[i][k].num_summaries
        ]
        sampled, logprobs = [], None if logprobs is None else []
        if rows:
            with self.times("summarising"):
                sampled, logprobs = self._sample(
                    rows, settings.max_summary_length, settings.eos_token_ids, settings.num_summaries
                )

        def by_context(values: list) -> list[list[list]]:
            rest = iter(values)
            by_slot = {(i, k): list(islice(rest, contexts[i][k].num_summaries)) for i, k in slots}
            return [[by_slot[i, k] for k in range(len(contexts[i]))] for i in range(len(prompts))]

        summaries = by_context(sampled)
        summary_logprobs = [None] * len(prompts) if logprobs is None else by_context(logprobs)
        return [
            Rollout.assemble(prompt, traces[i], contexts[i], summaries[i], summary_logprobs[i])
            for i, prompt in enumerate(prompts)
        ]
