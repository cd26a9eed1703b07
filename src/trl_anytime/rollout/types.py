"""One rollout: a thinking, its cuts, and the summaries drawn at each of them, as token ids."""

from collections.abc import Container, Sequence
from dataclasses import dataclass

from .markers import ThinkingMarkers


@dataclass(frozen=True)
class Thinking:
    """
    A sampled thinking.

    Args:
        token_ids (`list[int]`):
            At most b_m tokens, up to and including the end of thinking or EOS if one came.
        finished (`bool`):
            Whether it ends with the end of thinking.
        abandoned (`bool`):
            Whether it ends with EOS instead.
        logprobs (`list[float]`, *optional*):
            Log-probabilities of its tokens in the sampling distribution, where the backend knows them.
    """

    token_ids: list[int]
    finished: bool
    abandoned: bool
    logprobs: list[float] | None = None

    @classmethod
    def of(
        cls,
        token_ids: Sequence[int],
        markers: ThinkingMarkers,
        eos_token_ids: Container[int],
        logprobs: Sequence[float] | None = None,
    ) -> "Thinking":
        """The thinking in sampled `token_ids`: what comes after the first end of thinking is dropped."""
        end = markers.end_of_thinking(token_ids)
        kept = list(token_ids[:end])
        abandoned = end is None and bool(kept) and kept[-1] in eos_token_ids
        return cls(kept, end is not None, abandoned, None if logprobs is None else list(logprobs[: len(kept)]))

    def cut(self, budget: int, markers: ThinkingMarkers) -> tuple[int, tuple[int, ...]]:
        """
        Where `budget` (in tokens) cuts the thinking, and the bridge that follows.

        Returns:
            `tuple`: the cut c = min(budget, |z|) in tokens, and the bridge's token ids.
        """
        length = len(self.token_ids)
        if self.finished and length <= budget:
            return length, markers.answer_bridge_ids
        return min(budget, length), markers.truncation_bridge_ids + markers.answer_bridge_ids


@dataclass(frozen=True)
class Rollout:
    """
    A thinking with A summaries at each of M budgets.

    Args:
        prompt_ids (`list[int]`):
            The rendered prompt.
        thinking ([`Thinking`]):
            The thinking.
        cuts (`list[int]`):
            M cuts in tokens.
        bridges (`list[tuple[int, ...]]`):
            M bridges.
        summaries (`list[list[list[int]]]`):
            M × A summaries, up to and including EOS if it came.
        summary_logprobs (`list[list[list[float]]]`, *optional*):
            Log-probabilities of their tokens in the sampling distribution, where the backend knows them.
    """

    prompt_ids: list[int]
    thinking: Thinking
    cuts: list[int]
    bridges: list[tuple[int, ...]]
    summaries: list[list[list[int]]]
    summary_logprobs: list[list[list[float]]] | None = None

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int],
        thinking: Thinking,
        budgets: Sequence[int],
        markers: ThinkingMarkers,
        summaries: list[list[list[int]]],
        summary_logprobs: list[list[list[float]]] | None = None,
    ) -> "Rollout":
        """A rollout whose `thinking` is cut at `budgets`."""
        cuts, bridges = zip(*(thinking.cut(budget, markers) for budget in budgets), strict=True)
        return cls(list(prompt_ids), thinking, list(cuts), list(bridges), summaries, summary_logprobs)

    def packed_logprobs(self) -> list[float] | None:
        """Log-probabilities in packed order; bridges were not sampled and get 0."""
        if self.thinking.logprobs is None or self.summary_logprobs is None:
            return None
        packed = list(self.thinking.logprobs)
        for bridge, of_budget in zip(self.bridges, self.summary_logprobs, strict=True):
            for logprobs in of_budget:
                packed += [0.0] * len(bridge) + logprobs
        return packed

    def well_formed(self, markers: ThinkingMarkers) -> list[list[bool]]:
        """
        Which summaries may earn a reward at all (the released rules), M × A.

        None if the thinking ended with EOS; else those for which the end of thinking occurs exactly once in the end of
        the cut, the bridge and the summary.
        """
        overlap = markers.max_end_length
        return [
            [
                not self.thinking.abandoned
                and markers.count_think_end([*self.thinking.token_ids[max(cut - overlap, 0) : cut], *bridge, *summary])
                == 1
                for summary in budget_summaries
            ]
            for cut, bridge, budget_summaries in zip(self.cuts, self.bridges, self.summaries, strict=True)
        ]
