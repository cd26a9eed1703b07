"""
What the update computes of a generation batch, where less or another order gives the same gradient.

What has no advantage is left out, and rollouts of like length share a micro-batch or a forward pass.
"""

from collections.abc import Callable, Sequence
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
# Losses that weigh the rollouts of an optimiser step alike, however they are dealt out to its micro-batches
_EXACT_LOSSES = ("cispo", "dapo", "dr_grpo", "grpo", "sapo")
# Losses that are linear in the advantages of their tokens, token by token
_LINEAR_LOSSES = (*_EXACT_LOSSES, "bnpo")
# A forward pass of its own must save so many tokens, and this share of all. Smaller ones cost their number of calls.
_LEAST_SAVED, _LEAST_SHARE = 1024, 0.05


def _looks_at_all_tokens(args: Any, aux_loss_enabled: bool) -> bool:
    """Return whether the loss has a mean, a quantile or a product of means over a whole micro-batch."""
    return args.entropy_coef != 0 or args.use_adaptive_entropy or args.top_entropy_quantile < 1 or aux_loss_enabled


def sort_by_length(batches: list[dict[str, Any]], args: Any, aux_loss_enabled: bool) -> list[dict[str, Any]]:
    """
    Deal the rows of a generation batch out anew, so that little padding is computed.

    Rows move only within what one optimiser step accumulates, and only where that changes no gradient. Where
    generation batches and optimiser steps do not line up, all stay where they are.

    Args:
        batches (`list[dict]`):
            The micro-batches.
        args ([`~trl.GRPOConfig`]):
            Settings of the loss and of accumulation.
        aux_loss_enabled (`bool`):
            Whether the loss that balances experts counts.
    """
    if args.loss_type not in _EXACT_LOSSES or _looks_at_all_tokens(args, aux_loss_enabled):
        return batches
    steps, accumulated = len(batches), args.gradient_accumulation_steps
    if steps % accumulated != 0 and accumulated % steps != 0:
        return batches
    window = min(steps, accumulated)
    return [batch for first in range(0, steps, window) for batch in _sorted_by_length(batches[first : first + window])]


def _sorted_by_length(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of several batches, the longest first. A lack of memory then shows at once."""
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


def prune_batch(
    output: dict[str, torch.Tensor], packed: PackedRollouts
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Leave tokens without advantage out of a generation batch.

    Args:
        output (`dict[str, torch.Tensor]`):
            What TRL's `_generate_and_score_completions` returns, with advantages of shape (N, T).
        packed ([`PackedRollouts`]):
            Its N packed rows.

    Returns:
        `tuple`: the same with T' tokens, with `cuts` and `spans` of the rows that are left, and with the number of
        trained tokens that each rollout had, which [`as_before_pruning`] needs; int64 of shape (2,), the packed tokens
        of all rollouts before and after.
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
    # The token that is left of a rollout without any advantage is not trained
    per_token["tool_mask"] = per_token["tool_mask"] * (per_token["advantages"] != 0).any(1, keepdim=True)
    lengths = torch.stack([packed.lengths.sum(), pruned.lengths.sum()])
    return {**output, **per_token, "cuts": pruned.cuts, "spans": pruned.spans, _NUM_TRAINED: trained.sum(1)}, lengths


def as_before_pruning(inputs: dict[str, torch.Tensor], loss_type: str) -> dict[str, torch.Tensor]:
    """
    Give the loss of a pruned micro-batch the value that it would have without pruning.

    Some losses divide by the trained tokens of a rollout or of the micro-batch, of which there are fewer now. The
    advantages make up for that, as the loss is linear in them.

    Args:
        inputs (`dict[str, torch.Tensor]`):
            A micro-batch. One that [`prune_batch`] has not pruned stays as it is.
        loss_type (`str`):
            TRL's name of the loss.
    """
    if _NUM_TRAINED not in inputs or loss_type not in ("grpo", "sapo", "bnpo"):
        return inputs
    before, now = inputs[_NUM_TRAINED], _trained(inputs).sum(1)
    if loss_type == "bnpo":
        before, now = before.sum(), now.sum()
    share = now.clamp(min=1) / before.clamp(min=1)
    return {**inputs, "advantages": inputs["advantages"] * share.view(-1, 1)}


def rows_to_forward(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    Return which rollouts of a micro-batch are trained at all, bool of shape (R,).

    At least one is: all ranks make equally many forward passes.
    """
    trained = _trained(inputs).any(1)
    trained[0] |= ~trained.any()
    return trained


def split_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """
    Divide the rows of a micro-batch into parts of like length, so that little padding is computed.

    Args:
        lengths (`Sequence[int]`):
            Tokens of each row.

    Returns:
        `list[list[int]]`: the rows of each part. There are several only where that saves enough tokens.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    least = max(_LEAST_SAVED, _LEAST_SHARE * len(lengths) * lengths[order[0]])

    def split(rows: list[int]) -> list[list[int]]:
        saved = [(len(rows) - k) * (lengths[rows[0]] - lengths[row]) for k, row in enumerate(rows)]
        most = max(saved)
        if most < least:
            return [rows]
        k = saved.index(most)
        return split(rows[:k]) + split(rows[k:])

    return split(order)


def forward_some(
    forward: Callable[..., Any],
    model: torch.nn.Module,
    packed: PackedRollouts,
    wanted: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """
    Compute the log-probabilities of some rows, and let those of the others be 0.

    Args:
        forward (`Callable`):
            [`~trl_anytime.modeling.tree_attention.forward_packed`], or what gives the same.
        wanted (`torch.Tensor`):
            Bool of shape (R,).
        model, packed, input_ids, attention_mask, labels:
            As `forward` takes them, R rows.
    """
    if wanted.all():
        return forward(model, packed, input_ids, attention_mask, labels, **kwargs)
    outputs = forward(model, packed[wanted], input_ids[wanted], attention_mask[wanted], labels[wanted], **kwargs)
    for name in ("log_probs", "entropy"):
        field = getattr(outputs, name, None)
        if field is not None:
            outputs[name] = field.new_zeros(len(wanted), field.size(1)).index_put((wanted,), field)
    return outputs


def _trained(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["completion_mask"] * inputs["tool_mask"]
