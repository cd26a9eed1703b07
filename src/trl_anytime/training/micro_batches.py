"""
What the update computes of a generation batch, where less or another order gives the same gradient.

What has no advantage is left out, and rollouts of like length share a micro-batch.
"""

from typing import Any

import torch

from ..method.advantages import ROUNDING
from ..method.packing import PackedRollouts

# Per token of a packed row, right-padded, in what TRL returns for a generation batch
_PER_TOKEN = (
    "completion_ids",
    "completion_mask",
    "tool_mask",
    "advantages",
    "old_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
)
_NUM_TRAINED = "num_trained_tokens"  # of each rollout, before anything was left out
# Losses that are linear in the advantages of their tokens, token by token
_LINEAR_LOSSES = ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "sapo")
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
    return args.loss_type in _EXACT_LOSSES and not _looks_at_all_tokens(args, aux_loss_enabled)


def _looks_at_all_tokens(args: Any, aux_loss_enabled: bool) -> bool:
    """Whether the loss has a mean, a quantile or a product of means over all tokens of a micro-batch."""
    return args.entropy_coef != 0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1 or aux_loss_enabled


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


def can_prune(args: Any, aux_loss_enabled: bool) -> bool:
    """
    Return whether tokens without advantage add nothing to loss and gradient.

    Args:
        args ([`~trl.GRPOConfig`]):
            Settings of the loss.
        aux_loss_enabled (`bool`):
            Whether the loss that balances experts counts.
    """
    return args.loss_type in _LINEAR_LOSSES and args.beta == 0 and not _looks_at_all_tokens(args, aux_loss_enabled)


def prune_batch(output: dict[str, torch.Tensor], packed: PackedRollouts) -> dict[str, torch.Tensor]:
    """
    Leave tokens without advantage out of a generation batch.

    Args:
        output (`dict[str, torch.Tensor]`):
            What TRL's `_generate_and_score_completions` returns, with advantages of shape (N, T).
        packed ([`PackedRollouts`]):
            Its N packed rows.

    Returns:
        `dict[str, torch.Tensor]`: the same with T' tokens, with `cuts` and `spans` of the rows that are left, and with
        the number of trained tokens that each rollout had, which [`prune_micro_batch`] needs.
    """
    trained = _trained(output)
    advantages = output["advantages"]
    output = {**output, "advantages": advantages.masked_fill(advantages.abs() < ROUNDING, 0.0)}
    pruned, source = packed.prune(output["advantages"] * trained)
    per_token = {
        name: output[name].gather(1, source.clamp(min=0)).masked_fill(source < 0, 0)
        for name in _PER_TOKEN
        if name in output
    }
    return {**output, **per_token, "cuts": pruned.cuts, "spans": pruned.spans, _NUM_TRAINED: trained.sum(1)}


def prune_micro_batch(inputs: dict[str, torch.Tensor], loss_type: str) -> dict[str, torch.Tensor]:
    """
    Leave rollouts without advantage out of a micro-batch, and keep its loss what it was.

    Some losses divide by the rollouts or the trained tokens of the micro-batch, of which there are fewer now. The
    advantages make up for that, as the loss is linear in them. One rollout is kept in any case, so that all ranks make
    equally many forward and backward passes.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            A micro-batch, of a generation batch that [`prune_batch`] has or has not pruned.
        loss_type (`str`):
            TRL's name of the loss.
    """
    if _NUM_TRAINED not in inputs:
        return inputs
    trained = _trained(inputs)
    live = ((inputs["advantages"] != 0) & trained.bool()).any(1)
    live[0] |= ~live.any()
    num_rollouts, before, now = len(live), inputs[_NUM_TRAINED], trained.sum(1)
    rows = {
        name: value[live]
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == num_rollouts
    }
    share = torch.ones_like(inputs["advantages"][:, :1])
    if loss_type in ("grpo", "sapo"):  # divide by the trained tokens of each rollout
        share = (now.clamp(min=1) / before.clamp(min=1))[:, None]
    elif loss_type == "bnpo":  # divides by those of all
        share = share * now[live].sum().clamp(min=1) / before.sum().clamp(min=1)
    if loss_type in ("dr_grpo", "grpo", "sapo"):
        share = share * (live.sum() / num_rollouts)
    return {**inputs, **rows, "advantages": (inputs["advantages"] * share)[live]}


def _trained(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["completion_mask"] * inputs["tool_mask"]
