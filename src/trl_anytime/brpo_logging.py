"""What a generation batch looked like: metrics, and rows for the table of completions."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .advantages import Returns, baseline_diagnostics
from .budgets import live_segments
from .display import for_terminal
from .markers import ThinkingMarkers
from .rollout import Rollout

# Equal rewards of order 1, weighted by a prior and averaged, differ by as little in float32
_ROUNDING = 1e-6


def reward_metrics(rewards: torch.Tensor, budgets: Sequence[int]) -> dict[str, list[float]]:
    """
    The accuracy-versus-budget curve.

    Args:
        rewards (`torch.Tensor`):
            Shape (N, M, A), the rewards of N rollouts; NaN where no reward function scored the summary.
        budgets (`Sequence[int]`):
            The M budgets in tokens.

    Returns:
        `dict[str, list[float]]`: one value per rollout, so that averages over batches weigh rollouts alike.
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
) -> dict[str, list[float]]:
    """
    Lengths, formats and signal of the rollouts of all ranks.

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

    Returns:
        `dict[str, list[float]]`: one value per rollout.
    """
    per_rollout = torch.tensor(
        [
            (
                len(thinking.token_ids),
                thinking.finished,
                thinking.finished and len(thinking.token_ids) == len(markers.think_end_ids),
                (thinking.finished or thinking.abandoned) and len(thinking.token_ids) <= budgets[0],
            )
            for thinking in (rollout.thinking for rollout in rollouts)
        ],
        dtype=torch.float32,
    )
    per_summary = torch.tensor(
        [
            [
                [
                    (len(ids), len(ids) == max_summary_length and ids[-1] not in eos_token_ids, formed)
                    for ids, formed in zip(*of_budget, strict=True)
                ]
                for of_budget in zip(rollout.summaries, rollout.well_formed(markers), strict=True)
            ]
            for rollout in rollouts
        ],
        dtype=torch.float32,
    )
    no_advantage = (advantages.abs() < _ROUNDING).all(dim=1, keepdim=True).float()
    length, finished, empty, uncut, no_advantage = gather(
        torch.cat([per_rollout.to(advantages), no_advantage], dim=1)
    ).unbind(1)
    summary_length, clipped, formed = gather(per_summary.to(advantages)).unbind(dim=3)
    metrics = {
        "anytime/no_advantage_ratio": no_advantage,
        "thinking/mean_length": length,
        "thinking/finished_ratio": finished,
        "thinking/empty_ratio": empty,
        "thinking/never_cut_ratio": uncut,
        "summary/mean_length": summary_length.mean(dim=(1, 2)),
        "summary/clipped_ratio": clipped.mean(dim=(1, 2)),
        **{f"anytime/formatted@{budget}": formed[:, j].mean(dim=1) for j, budget in enumerate(budgets)},
    }
    return {name: values.tolist() for name, values in metrics.items()}


def baseline_metrics(
    segments: Returns,
    cuts: torch.Tensor,
    budgets: Sequence[int],
    further: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, list[float]]:
    """
    The paper's diagnostics per segment: Var[R - V] / Var[R] and Corr[V, R] for each baseline.

    Args:
        segments ([`Returns`]):
            Returns and baselines of a batch.
        cuts (`torch.Tensor`):
            Shape (P, G, M), the thinking tokens up to each budget.
        budgets (`Sequence[int]`):
            The M budgets in tokens.
        further (`Mapping[str, torch.Tensor]`, *optional*):
            Baselines that are not in `segments`, by name, each of shape (P, G, M).

    Returns:
        `dict[str, list[float]]`: one value per metric, named by the budget at which the segment ends. What is not
        defined, because a variance is zero, is left out.
    """
    diagnostics = baseline_diagnostics(segments, live_segments(cuts, budgets), further)
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
    One row per rollout and budget for the table of completions: the first summary, and the thinking shortened. Control
    characters are written out, because TRL prints the table.
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


def _escaped(prompt: Any) -> Any:
    """A prompt whose texts are escaped, in whatever form it is."""
    if isinstance(prompt, str):
        return for_terminal(prompt)
    if isinstance(prompt, list):
        return [_escaped(part) for part in prompt]
    return {key: _escaped(part) for key, part in prompt.items()} if isinstance(prompt, dict) else prompt
