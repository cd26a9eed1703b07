"""Metrics of a generation batch, and rows for TRL's table of completions."""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..method.advantages import ROUNDING, Returns, baseline_diagnostics
from ..method.budgets import nonempty_segments
from ..outside.display import for_terminal
from ..rollout.markers import ThinkingMarkers
from ..rollout.types import Rollout

# TRL metrics that inspect the last token of a row. In a packed row that token belongs to the last summary, so they
# would mislead. [`rollout_metrics`] computes what they mean for a rollout.
METRICS_OF_PLAIN_ROWS = (
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
)
# Columns of the table of completions besides those named after reward functions: TRL's and ours
TABLE_COLUMNS = ("step", "prompt", "completion", "budget", "thinking", "thinking_advantage", "advantage")


def reward_metrics(rewards: torch.Tensor, budgets: Sequence[int]) -> dict[str, list[float]]:
    """
    Compute the curve of accuracy versus budget.

    Args:
        rewards (`torch.Tensor`):
            Shape (N, M, A), the rewards of N rollouts. NaN means that no reward function scored the summary.
        budgets (`Sequence[int]`):
            The M budgets in tokens.

    Returns:
        `dict[str, list[float]]`: one value per rollout, so that averages over batches weight rollouts equally.
    """
    mean_NM = rewards.nanmean(dim=2)
    metrics = {f"anytime/reward@{budget}": mean_NM[:, j].tolist() for j, budget in enumerate(budgets)}
    metrics["anytime/auc"] = mean_NM.mean(dim=1).tolist()
    metrics["anytime/unscored_ratio"] = rewards.isnan().float().mean(dim=(1, 2)).tolist()
    return metrics


def rollout_metrics(
    rollouts: Sequence[Rollout],
    advantages: torch.Tensor,
    budgets: Sequence[int],
    markers: ThinkingMarkers,
    eos_token_ids: Container[int],
    max_summary_length: int,
    gather: Callable[[torch.Tensor], torch.Tensor],
    escapes: Sequence[Sequence[Sequence[str | None] | None]],
) -> dict[str, list[float]]:
    """
    Compute lengths, formats, escapes and signal of the rollouts of all ranks.

    Args:
        rollouts (`Sequence[Rollout]`):
            The N rollouts of this rank.
        advantages (`torch.Tensor`):
            Shape (N, T), per token.
        budgets (`Sequence[int]`):
            The M budgets in tokens.
        markers ([`ThinkingMarkers`]):
            Markers of the model.
        eos_token_ids (`Container[int]`):
            Tokens that end a summary.
        max_summary_length (`int`):
            Most tokens of a summary.
        gather (`Callable`):
            Collects a tensor from all ranks along its first dimension.
        escapes (`Sequence`):
            Signs of resumed reasoning of each rollout, see [`~trl_anytime.rollout.escapes.EscapeSearch.kinds`].

    Returns:
        `dict[str, list[float]]`: one value per rollout. `completions/*_terminated_length` has one value over the
        rollouts whose thinking ended by itself (thinking and all summaries together), and is absent if there are none.
        `summary/escape_ratio@b` has one value per rollout whose trace was cut by force at b, and is absent if there
        are none.
    """
    per_rollout = torch.tensor(
        [
            (
                len(thinking.token_ids),
                thinking.finished,
                not (thinking.finished or thinking.ended_with_eos),
                thinking.finished and len(thinking.token_ids) <= len(markers.think_end_ids),
                (thinking.finished or thinking.ended_with_eos) and len(thinking.token_ids) <= budgets[0],
            )
            for thinking in (rollout.thinking for rollout in rollouts)
        ],
        dtype=torch.float32,
    )
    per_summary = torch.tensor(
        [
            [
                [
                    (len(ids), clipped, formed, math.nan if kinds is None else kinds[a] is not None)
                    for a, (ids, clipped, formed) in enumerate(zip(*at_budget, strict=True))
                ]
                for kinds, *at_budget in zip(
                    rollout_escapes,
                    rollout.summaries,
                    rollout.clipped(max_summary_length, eos_token_ids),
                    rollout.well_formed(markers),
                    strict=True,
                )
            ]
            for rollout, rollout_escapes in zip(rollouts, escapes, strict=True)
        ],
        dtype=torch.float32,
    )
    no_advantage = (advantages.abs() < ROUNDING).all(dim=1, keepdim=True).float()
    length, finished, cut, empty, uncut, no_advantage = gather(
        torch.cat([per_rollout.to(advantages), no_advantage], dim=1)
    ).unbind(1)
    summary_length, clipped, formed, escaped = gather(per_summary.to(advantages)).unbind(dim=3)
    metrics = {
        "anytime/no_advantage_ratio": no_advantage,
        "completions/clipped_ratio": cut,
        "thinking/mean_length": length,
        "thinking/finished_ratio": finished,
        "thinking/empty_ratio": empty,
        "thinking/never_cut_ratio": uncut,
        "summary/mean_length": summary_length.mean(dim=(1, 2)),
        "summary/clipped_ratio": clipped.mean(dim=(1, 2)),
        **{f"anytime/formatted@{budget}": formed[:, j].mean(dim=1) for j, budget in enumerate(budgets)},
    }
    for j, budget in enumerate(budgets):
        of_forced = escaped[:, j].mean(dim=1)
        of_forced = of_forced[~of_forced.isnan()]
        if len(of_forced):
            metrics[f"summary/escape_ratio@{budget}"] = of_forced
    terminated = (length + summary_length.sum(dim=(1, 2)))[cut == 0]
    if len(terminated):
        for name, value in (("mean", terminated.mean()), ("min", terminated.min()), ("max", terminated.max())):
            metrics[f"completions/{name}_terminated_length"] = value[None]
    return {name: values.tolist() for name, values in metrics.items()}


def baseline_metrics(
    segments: Returns,
    cuts: torch.Tensor,
    budgets: Sequence[int],
    extra_baselines: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, list[float]]:
    """
    Compute the paper's diagnostics per segment: Var[R - V] / Var[R] and Corr[V, R] for each baseline.

    Args:
        segments ([`Returns`]):
            Returns and baselines of a batch.
        cuts (`torch.Tensor`):
            Shape (P, G, M), the thinking tokens up to each budget.
        budgets (`Sequence[int]`):
            The M budgets in tokens.
        extra_baselines (`Mapping[str, torch.Tensor]`, *optional*):
            Baselines that are not in `segments`, by name, each of shape (P, G, M).

    Returns:
        `dict[str, list[float]]`: one value per metric, named by the budget at which the segment ends. A metric that is
        undefined because a variance is zero is left out.
    """
    diagnostics = baseline_diagnostics(segments, nonempty_segments(cuts, budgets), extra_baselines)
    return {
        f"baseline/{statistic}/{name}@{budget}": [value]
        for statistic, by_baseline in diagnostics.items()
        for name, values in by_baseline.items()
        for budget, value in zip(budgets, values.tolist(), strict=True)
        if not math.isnan(value)
    }


def completion_rows(
    prompts: Sequence[Any], rollouts: Sequence[Rollout], budgets: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """
    Return one row per rollout and budget for the table of completions.

    A row holds the first summary and the shortened thinking. Control characters are escaped, because TRL prints the
    table.
    """
    rows = []
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        texts = tokenizer.batch_decode([summaries[0] for summaries in rollout.summaries])
        for budget, cut, text in zip(budgets, rollout.cuts, texts, strict=True):
            thinking = str(tokenizer.decode(rollout.thinking.token_ids[:cut]))
            if len(thinking) > 400:
                thinking = f"{thinking[:200]} [...] {thinking[-200:]}"
            row = {"completion": for_terminal(text), "budget": budget, "thinking": for_terminal(thinking)}
            rows.append({"prompt": _escaped(prompt), **row})
    return rows


def completion_table(
    rows: Sequence[Mapping[str, Any]],
    rewards: Mapping[str, Sequence[float]],
    thinking_advantages: torch.Tensor,
    summary_advantages: torch.Tensor,
    extra: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """
    Return the columns of TRL's table of completions.

    Args:
        rows (`Sequence[Mapping[str, Any]]`):
            N·M rows of all ranks, see [`completion_rows`].
        rewards (`Mapping[str, Sequence[float]]`):
            The reward of each row, by the name of the reward function.
        thinking_advantages (`torch.Tensor`):
            Shape (N, M).
        summary_advantages (`torch.Tensor`):
            Shape (N, M, A). The table shows that of the first summary.
        extra (`Mapping[str, Sequence[Any]]`):
            Columns that reward functions have added.
    """
    return {
        "prompt": deque(row["prompt"] for row in rows),
        "completion": deque(row["completion"] for row in rows),
        "rewards": defaultdict(deque, {name: deque(values) for name, values in rewards.items()}),
        "advantages": deque(summary_advantages[:, :, 0].flatten().tolist()),
        "extra": defaultdict(
            deque,
            {
                "budget": deque(row["budget"] for row in rows),
                "thinking": deque(row["thinking"] for row in rows),
                "thinking_advantage": deque(thinking_advantages.flatten().tolist()),
                **{name: deque(values) for name, values in extra.items()},
            },
        ),
    }


def _escaped(prompt: Any) -> Any:
    """Return a prompt of any form with its texts escaped."""
    if isinstance(prompt, str):
        return for_terminal(prompt)
    if isinstance(prompt, list):
        return [_escaped(part) for part in prompt]
    return {key: _escaped(part) for key, part in prompt.items()} if isinstance(prompt, dict) else prompt
