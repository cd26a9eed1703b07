"""One rollout: a trace, its cuts, and the summaries sampled at each of them, as token ids."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..method.budgets import thinking_cuts
from .markers import ThinkingMarkers
from .sampling import is_clipped
from .settling import Check

# Arguments of reward functions, one value per summary, besides TRL's
SUMMARY_FACTS = ("well_formed", "budget", "cut", "thinking_length", "finished", "thinking")


@dataclass(frozen=True)
class Thinking:
    """
    A sampled trace.

    Args:
        token_ids (`list[int]`):
            At most b_m tokens. They include the end of thinking or EOS if one came.
        finished (`bool`):
            Whether the trace ends with the end of thinking.
        ended_with_eos (`bool`):
            Whether the trace ends with EOS instead.
        logprobs (`list[float]`, *optional*):
            Log-probabilities of its tokens in the sampling distribution, if the backend knows them.
        settled (`bool`, *optional*, defaults to `False`):
            Whether it was stopped because its answers had settled. It is then cut there, whatever the budget.
    """

    token_ids: list[int]
    finished: bool
    ended_with_eos: bool
    logprobs: list[float] | None = None
    settled: bool = False

    @classmethod
    def from_tokens(
        cls,
        token_ids: Sequence[int],
        markers: ThinkingMarkers,
        eos_token_ids: Container[int],
        logprobs: Sequence[float] | None = None,
    ) -> "Thinking":
        """
        Take the thinking from sampled tokens. Those after the first end of thinking are dropped.

        Args:
            token_ids (`Sequence[int]`):
                The sampled tokens.
            markers ([`ThinkingMarkers`]):
                Markers of the thinking's end.
            eos_token_ids (`Container[int]`):
                Tokens that end a trace without its end of thinking.
            logprobs (`Sequence[float]`, *optional*):
                Log-probabilities of the sampled tokens.
        """
        end = markers.end_of_thinking(token_ids)
        kept = list(token_ids[:end])
        ended_with_eos = end is None and bool(kept) and kept[-1] in eos_token_ids
        return cls(kept, end is not None, ended_with_eos, None if logprobs is None else list(logprobs[: len(kept)]))

    def stopped(self, length: int) -> "Thinking":
        """Return the trace as it was after `length` tokens, where its answers had settled."""
        return Thinking(
            self.token_ids[:length], False, False, None if self.logprobs is None else self.logprobs[:length], True
        )

    def cut(self, budget: int, markers: ThinkingMarkers) -> tuple[int, tuple[int, ...]]:
        """
        Return where a budget cuts the thinking, and the bridge that follows.

        Args:
            budget (`int`):
                Budget b in thinking tokens.
            markers ([`ThinkingMarkers`]):
                The bridges.

        Returns:
            `tuple`: the cut c = min(budget, |z|) in tokens, and the bridge's token ids.
        """
        length = len(self.token_ids)
        (cut,) = thinking_cuts(torch.tensor(length), [budget]).tolist()
        if self.finished and length <= budget:
            return cut, markers.answer_bridge_ids
        return cut, markers.truncation_bridge_ids + markers.answer_bridge_ids


@dataclass(frozen=True)
class Context:
    """
    A place in a trace at which it is summarised.

    Args:
        cut (`int`):
            Thinking tokens that the summaries see.
        bridge (`tuple[int, ...]`):
            Token ids between the thinking and a summary.
        budgets (`tuple[int, ...]`):
            Indices of the budgets that cut the thinking here.
        num_summaries (`int`):
            Number of summaries to sample here, for all these budgets together.
        shared (`bool`, *optional*, defaults to `False`):
            Whether the budgets share the summaries. If not, each budget gets its part of them.
    """

    cut: int
    bridge: tuple[int, ...]
    budgets: tuple[int, ...]
    num_summaries: int
    shared: bool = False

    def token_ids(self, prompt_ids: Sequence[int], thinking: Thinking) -> list[int]:
        """Return the tokens before a summary: the prompt, the thinking up to the cut, and the bridge."""
        return [*prompt_ids, *thinking.token_ids[: self.cut], *self.bridge]

    def by_budget(self, sampled: Sequence[Any]) -> dict[int, list[Any]]:
        """
        Distribute the samples of this cut to the budgets that share it.

        Args:
            sampled (`Sequence`):
                The summaries sampled here, or one value for each of them.

        Returns:
            `dict[int, list]`: the samples of each budget, by its index.
        """
        if self.shared:
            return {j: list(sampled) for j in self.budgets}
        size = self.num_summaries // len(self.budgets)
        return {j: list(sampled[k * size : (k + 1) * size]) for k, j in enumerate(self.budgets)}


@dataclass(frozen=True)
class Rollout:
    """
    A trace with A summaries at each of M budgets.

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
            Log-probabilities of their tokens in the sampling distribution, if the backend knows them.
        checks (`list[Check]`, *optional*):
            What was sampled while the thinking ran, to see whether it had settled.
    """

    prompt_ids: list[int]
    thinking: Thinking
    cuts: list[int]
    bridges: list[tuple[int, ...]]
    summaries: list[list[list[int]]]
    summary_logprobs: list[list[list[float]]] | None = None
    checks: list[Check] = field(default_factory=list)

    @classmethod
    def assemble(
        cls,
        prompt_ids: Sequence[int],
        thinking: Thinking,
        contexts: Sequence[Context],
        summaries: Sequence[Sequence[list[int]]],
        logprobs: Sequence[Sequence[list[float]]] | None = None,
    ) -> "Rollout":
        """
        Make a rollout from the samples of each context.

        Args:
            prompt_ids (`Sequence[int]`):
                The rendered prompt.
            thinking ([`Thinking`]):
                The thinking.
            contexts (`Sequence[Context]`):
                Contexts of the trace. Together they hold every budget once.
            summaries (`Sequence[Sequence[list[int]]]`):
                Token ids of the summaries sampled in each context.
            logprobs (`Sequence[Sequence[list[float]]]`, *optional*):
                Log-probabilities of the summaries' tokens.
        """
        context_of = {j: context for context in contexts for j in context.budgets}
        in_order = [context_of[j] for j in range(len(context_of))]

        def by_budget(sampled: Sequence[Sequence[Any]]) -> list[list[Any]]:
            dealt: dict[int, list[Any]] = {}
            for context, context_samples in zip(contexts, sampled, strict=True):
                dealt |= context.by_budget(context_samples)
            return [dealt[j] for j in range(len(dealt))]

        return cls(
            list(prompt_ids),
            thinking,
            [context.cut for context in in_order],
            [context.bridge for context in in_order],
            by_budget(summaries),
            None if logprobs is None else by_budget(logprobs),
        )

    @classmethod
    def from_budgets(
        cls,
        prompt_ids: Sequence[int],
        thinking: Thinking,
        budgets: Sequence[int],
        markers: ThinkingMarkers,
        summaries: list[list[list[int]]],
        summary_logprobs: list[list[list[float]]] | None = None,
    ) -> "Rollout":
        """Make a rollout whose `thinking` is cut at `budgets`."""
        cuts, bridges = zip(*(thinking.cut(budget, markers) for budget in budgets), strict=True)
        return cls(list(prompt_ids), thinking, list(cuts), list(bridges), summaries, summary_logprobs)

    def packed_logprobs(self) -> list[float] | None:
        """Return the log-probabilities in packed order. Bridges were not sampled and get 0."""
        if self.thinking.logprobs is None or self.summary_logprobs is None:
            return None
        packed = list(self.thinking.logprobs)
        for bridge, at_budget in zip(self.bridges, self.summary_logprobs, strict=True):
            for logprobs in at_budget:
                packed += [0.0] * len(bridge) + logprobs
        return packed

    def well_formed(self, markers: ThinkingMarkers) -> list[list[bool]]:
        """
        Return which summaries may earn a reward at all, M × A, by the rules of the released implementation.

        If the thinking ended with EOS, none may. Otherwise the end of thinking must occur exactly once in three parts
        together: the end of the cut, the bridge and the summary.
        """
        overlap = markers.max_end_length
        return [
            [
                not self.thinking.ended_with_eos
                and markers.count_think_end([*self.thinking.token_ids[max(cut - overlap, 0) : cut], *bridge, *summary])
                == 1
                for summary in budget_summaries
            ]
            for cut, bridge, budget_summaries in zip(self.cuts, self.bridges, self.summaries, strict=True)
        ]

    def clipped(self, max_summary_length: int, eos_token_ids: Container[int]) -> list[list[bool]]:
        """Return which summaries are cut off at `max_summary_length` tokens without EOS, M × A."""
        return [
            [is_clipped(summary, max_summary_length, eos_token_ids) for summary in budget_summaries]
            for budget_summaries in self.summaries
        ]

    def summary_facts(
        self, budgets: Sequence[int], markers: ThinkingMarkers, tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, Any]]:
        """
        Return what reward functions are told about each summary.

        Args:
            budgets (`Sequence[int]`):
                The M budgets in tokens.
            markers ([`ThinkingMarkers`]):
                Markers of the model.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Decodes the thinking.

        Returns:
            `list[dict[str, Any]]`: M·A dictionaries, ordered by budget, with the keys `SUMMARY_FACTS`.

            - `well_formed`: whether the thinking was ended exactly once, see [`~Rollout.well_formed`].
            - `budget`: the budget in tokens.
            - `cut`: thinking tokens that the summary saw, its end of thinking included. At most `budget`.
            - `thinking_length`: tokens of the whole trace, which is sampled up to the last budget.
            - `finished`: whether the trace ended by itself within this budget.
            - `thinking`: text of the thinking that the summary saw.
        """
        trace = self.thinking
        texts = tokenizer.batch_decode([trace.token_ids[:cut] for cut in self.cuts])
        return [
            {
                "well_formed": formed,
                "budget": budget,
                "cut": cut,
                "thinking_length": len(trace.token_ids),
                "finished": trace.finished and len(trace.token_ids) <= budget,
                "thinking": text,
            }
            for budget, cut, text, row in zip(budgets, self.cuts, texts, self.well_formed(markers), strict=True)
            for formed in row
        ]
