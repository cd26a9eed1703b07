"""Rollouts of like length share a micro-batch, where that changes no gradient."""

from typing import Any

import torch

# Losses that weigh the rollouts of an optimiser step alike, however they are dealt out to its micro-batches
_EXACT_LOSSES = ("cispo", "dapo", "dr_grpo", "grpo", "sapo")


def weighs_rollouts_alike(args: Any, aux_loss_enabled: bool) -> bool:
    """
    Whether the gradient of an optimiser step is the same for all ways to deal rollouts out to micro-batches.

    Args:
        args ([`~trl.GRPOConfig`]):
            Settings of the loss.
        aux_loss_enabled (`bool`):
            Whether the loss that balances experts counts.
    """
    per_micro_batch = (  # a mean, a quantile and a product of means over the tokens of a micro-batch
        args.entropy_coef != 0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1 or aux_loss_enabled
    )
    return args.loss_type in _EXACT_LOSSES and not per_micro_batch


def sort_by_length(batches: list[dict[str, Any]], accumulated: int) -> list[dict[str, Any]]:
    """
    Deal the rows of a generation batch out anew, so that little padding is computed.

    Rows move only within what one optimiser step accumulates. Where generation batches and optimiser steps do not
    line up, all stay where they are.

    Args:
        batches (`list[dict]`):
            The micro-batches.
        accumulated (`int`):
            Micro-batches of one optimiser step.
    """
    steps = len(batches)
    if steps % accumulated != 0 and accumulated % steps != 0:
        return batches
    window = min(steps, accumulated)
    return [batch for first in range(0, steps, window) for batch in _sorted_by_length(batches[first : first + window])]


def _sorted_by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of several batches, the longest first: a lack of memory shows at once."""
    rows = {
        name: torch.cat([batch[name] for batch in batches])
        for name, values in batches[0].items()
        if isinstance(values, torch.Tensor) and values.dim() > 0
    }
    order = (rows["prompt_mask"].sum(dim=1) + rows["completion_mask"].sum(dim=1)).argsort(descending=True, stable=True)
    dealt = {name: values[order].chunk(len(batches)) for name, values in rows.items()}
    return [{**batch, **{name: dealt[name][i] for name in rows}} for i, batch in enumerate(batches)]
