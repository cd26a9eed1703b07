"""
Tree attention computes a packed rollout in one forward pass, at the cost of one causal row of the same length.

A registered attention function does this. Prompt and thinking (the trunk) are plain causal attention. The branches of
one budget are one call over [trunk up to the cut | these branches]. No object of size L × L exists. The layout goes
through the model as its keyword argument `tree`. A forward pass without it uses the attention that the model had
before.

Dimensions: R rows, L tokens per row (prompt, packed rollout, padding), H heads, F key heads, E = H / F heads that
share one, D head size, Q queries, K keys.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import transformers
from accelerate.utils import is_peft_model
from packaging.version import Version
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..method.packing import PackedRollouts

if TYPE_CHECKING:
    from peft import PeftModel

# True while a layout goes through a model. Only mask creation and the guard below read it. What a layer computes
# depends on its arguments alone, also when gradient checkpointing repeats it later.
_layout_in_use: ContextVar[bool] = ContextVar("layout_in_use", default=False)

# Before transformers 5.21, sdpa silently drops the cap of the scores (Gemma 2). Rollouts are then sampled without it,
# so they must be scored without it.
_SDPA_DROPS_SOFTCAP = Version(transformers.__version__) < Version("5.21")

# Queries per block where scores are computed in blocks: large enough to keep a core busy, small compared with a row
_BLOCK = 256

# Fused kernels on a GPU copy a mask whose rows do not begin at a multiple of this many numbers, in every call
_ALIGNED = 16

# Arguments that models pass to their attention and that do not change its result
_HARMLESS_ARGUMENTS = {"position_ids", "use_cache", "output_attentions", "output_router_logits"}


class AttentionLayout(Protocol):
    """Attention layout of the rows of one forward pass, where it is not plain causal attention."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Compute the output of one layer, in the shape of `query`.

        Arguments as in [`tree_attention_forward`], with `sinks` for `s_aux`.
        """


@dataclass(frozen=True)
class BudgetBranches:
    """
    The branches of one budget, for all rows.

    Args:
        index (`torch.Tensor`):
            int64 of shape (R, Q), where the branch tokens stand in their row. Filled up with places that differ: on
            a GPU, gradients of one place are added one after the other.
        positions (`torch.Tensor`):
            int64 of shape (R, Q), positions of the branch tokens.
        trunk (`int`):
            Number of trunk tokens seen. The keys are the first `trunk` tokens of the row, then the branch tokens.
        real (`torch.Tensor`):
            Bool of shape (R, Q), False where `index` is filled up.
        sees (`torch.Tensor`):
            Bool of shape (R, Q, K), True where a branch token sees a key.
    """

    index: torch.Tensor
    positions: torch.Tensor
    trunk: int
    real: torch.Tensor
    sees: torch.Tensor

    def visible(self, sliding_window: int | None) -> torch.Tensor:
        """
        Return what each query sees in a layer, bool of shape (R, Q, K).

        Queries that fill up a row see everything: kernels differ in what a query that sees nothing gets, and some
        give NaN. Nothing reads their output.
        """
        sees_RQK = self.sees
        if sliding_window is not None:
            trunk_positions = torch.arange(self.trunk, device=sees_RQK.device).expand(sees_RQK.size(0), -1)
            positions_RK = torch.cat([trunk_positions, self.positions], dim=1)
            sees_RQK = sees_RQK & (self.positions[:, :, None] - positions_RK[:, None, :] < sliding_window)
        return sees_RQK | ~self.real[:, :, None]


@dataclass(frozen=True)
class TreeLayout:
    """
    Attention layout of the rows of one batch, computed once per forward pass and shared by all layers.

    Args:
        position_ids (`torch.Tensor`):
            int64 of shape (R, L).
        trunk (`int`):
            Tokens of the longest prompt with its thinking.
        budgets (`tuple[BudgetBranches, ...]`):
            The branches of each budget.
        source (`torch.Tensor`):
            int64 of shape (R, L), where the output of each token stands in [trunk | budget 1 | … | budget M].
        biases (`dict`):
            Masks as numbers that are added to the scores, made where a layer first needs one. All layers share them.
    """

    position_ids: torch.Tensor
    trunk: int
    budgets: tuple[BudgetBranches, ...]
    source: torch.Tensor
    biases: dict[Any, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_packed(cls, packed: PackedRollouts, prompt_lengths: torch.Tensor, row_length: int) -> "TreeLayout":
        """
        Make the layout of rows that hold a prompt, then its packed rollout, then padding.

        Args:
            packed ([`PackedRollouts`]):
                R rollouts.
            prompt_lengths (`torch.Tensor`):
                int64 of shape (R,), in tokens.
            row_length (`int`):
                L in tokens.
        """
        starts_RM, ends_RM = packed.spans[:, :, 0, 0], packed.spans[:, :, -1, 2]
        # Trunk tokens that the branches of each budget see
        sees_RM = torch.where(ends_RM > starts_RM, packed.cuts + prompt_lengths[:, None], 0)
        widths_M = (ends_RM - starts_RM).amax(0)
        trunk_1 = (packed.thinking_lengths + prompt_lengths).amax()[None]
        # The sizes reach the host in one transfer
        *sizes, trunk = torch.cat([widths_M, sees_RM.amax(0), trunk_1]).tolist()
        num_budgets = len(sizes) // 2

        branch_RT = packed.branches()
        positions_RT = packed.positions() + prompt_lengths[:, None]
        budgets = []
        for j, (width, budget_trunk) in enumerate(zip(sizes[:num_budgets], sizes[num_budgets:], strict=True)):
            step_Q = torch.arange(width, device=branch_RT.device)
            real_RQ = step_Q < (ends_RM - starts_RM)[:, j, None]
            packed_RQ = torch.where(real_RQ, starts_RM[:, j, None] + step_Q, 0)
            branch_RQ = branch_RT.gather(1, packed_RQ)
            sees_trunk = torch.arange(budget_trunk, device=branch_RT.device) < sees_RM[:, j, None, None]
            sees_branch = (branch_RQ[:, :, None] == branch_RQ[:, None, :]) & (step_Q[:, None] >= step_Q[None, :])
            sees_RQK = torch.cat([sees_trunk.expand(-1, width, -1), sees_branch & real_RQ[:, None, :]], dim=2)
            index_RQ = torch.where(real_RQ, packed_RQ + prompt_lengths[:, None], step_Q)
            positions_RQ = positions_RT.gather(1, packed_RQ)
            budgets.append(BudgetBranches(index_RQ, positions_RQ, budget_trunk, real_RQ, sees_RQK))

        # Where the outputs of each budget begin in [trunk | budget 1 | … | budget M]
        offsets_M = widths_M.cumsum(0) - widths_M + trunk
        budget_RT = branch_RT.clamp(min=0) // packed.spans.size(2)
        index_RT = packed.indices()
        in_branch_RT = offsets_M[budget_RT] + index_RT - starts_RM.gather(1, budget_RT)
        source_RT = torch.where(branch_RT < 0, index_RT + prompt_lengths[:, None], in_branch_RT)

        index_L = torch.arange(row_length, device=branch_RT.device)
        packed_RL = index_L - prompt_lengths[:, None]
        padding_RL = packed_RL >= packed.lengths[:, None]

        def as_rows(x_RT: torch.Tensor, padding: Any) -> torch.Tensor:  # the prompt counts up
            x_RL = x_RT.gather(1, packed_RL.clamp(0, x_RT.size(1) - 1))
            return torch.where(packed_RL < 0, index_L, torch.where(padding_RL, padding, x_RL))

        return cls(as_rows(positions_RT, 0), trunk, tuple(budgets), as_rows(source_RT, index_L))

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Compute the attention of one layer.

        Query, key and value have shape (R, H, L, D). The output has the shape of the query.
        """
        attend: Callable[..., torch.Tensor]
        if softcap is None and sinks is None:
            attend = partial(_attend_fused, scaling=scaling, dropout=dropout)
            num_sharing = query.size(1) // key.size(1)
        else:
            attend = partial(_attend_in_blocks, scaling=scaling, dropout=dropout, softcap=softcap, sinks=sinks)
            num_sharing = 1

        def bias(visible: Callable[[], torch.Tensor], *name: Any) -> torch.Tensor:
            device = query.device.type
            autocast = torch.is_autocast_enabled(device)  # it would cast the mask in every call
            dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
            name = (*name, sliding_window, dtype, num_sharing)
            if name not in self.biases:
                self.biases[name] = additive_mask(visible(), dtype, num_sharing)
            return self.biases[name]

        def take(x_RHLD: torch.Tensor, index_RQ: torch.Tensor) -> torch.Tensor:
            return x_RHLD.gather(2, index_RQ[:, None, :, None].expand(-1, x_RHLD.size(1), -1, x_RHLD.size(3)))

        trunk = [x[:, :, : self.trunk] for x in (query, key, value)]
        outputs = [_attend_trunk(attend, bias, trunk[0], trunk[1], trunk[2], sliding_window)]
        for j, branches in enumerate(self.budgets):
            if not branches.index.numel():  # all were left out
                continue
            keys, values = (
                torch.cat([x[:, :, : branches.trunk], take(x, branches.index)], dim=2) for x in (key, value)
            )
            mask = bias(partial(branches.visible, sliding_window), "budget", j)
            outputs.append(attend(take(query, branches.index), keys, values, mask))
        return take(torch.cat(outputs, dim=2), self.source)


def additive_mask(sees_RQK: torch.Tensor, dtype: torch.dtype, num_sharing: int) -> torch.Tensor:
    """
    Return a mask as numbers that are added to the scores.

    They are 0 where a query sees a key, and minus infinity elsewhere.

    Args:
        sees_RQK (`torch.Tensor`):
            Bool of shape (R, Q, K).
        dtype (`torch.dtype`):
            Type of the queries.
        num_sharing (`int`):
            E, how often the queries stand one behind the other.

    Returns:
        `torch.Tensor`: shape (R, 1, E·Q, K). Its rows begin at multiples of 16 numbers, so that kernels need no copy.
    """
    num_rows, num_queries, num_keys = sees_RQK.shape
    padded = -(-num_keys // _ALIGNED) * _ALIGNED
    mask = torch.zeros(num_rows, 1, num_sharing, num_queries, padded, dtype=dtype, device=sees_RQK.device)
    mask[..., :num_keys].masked_fill_(~sees_RQK[:, None, None], -torch.inf)
    return mask.flatten(2, 3)[..., :num_keys]


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    tree: AttentionLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Compute attention, in the form of transformers' `AttentionInterface`.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query, key, value (`torch.Tensor`):
            Shape (R, H, L, D). Key and value may have fewer heads.
        attention_mask (`torch.Tensor`, *optional*):
            Mask of a plain forward pass. `None` with a tree.
        base (`str`):
            Attention implementation for plain forward passes.
        tree ([`AttentionLayout`], *optional*):
            Layout of the rows. `None` for a plain forward pass.
        scaling (`float`, *optional*):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to `0.0`):
            Attention dropout.
        sliding_window (`int`, *optional*):
            A token sees only keys less than this many positions before it.
        softcap (`float`, *optional*):
            Scores are capped to ± this value by a tanh.
        s_aux (`torch.Tensor`, *optional*):
            Shape (H,), a score per head that takes part in the softmax and attends to nothing (an attention sink).

    Returns:
        `tuple`: output of shape (R, L, H, D), and the attention weights if the base returns them.

    Raises:
        `ValueError`: If the layer asks for something that tree attention does not support.
        `RuntimeError`: If the model did not pass the layout to this layer.
    """
    if tree is None:
        if _layout_in_use.get():
            raise RuntimeError(
                f"{type(module).__name__} did not receive the keyword argument `tree`: this model does not pass its "
                "keyword arguments to the attention layers, so it cannot train on packed rollouts. To train it, set "
                "`packing='rows'`."
            )
        # Pass only what the layer gave, because the base has its own defaults
        given = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: argument for name, argument in given.items() if argument is not None}
        base_attention = _base_attention(module, base)
        return base_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    assert attention_mask is None, "mask creation is off while a layout is in use"
    _refuse_unknown(module, sliding_window, kwargs)
    if base == "sdpa" and _SDPA_DROPS_SOFTCAP:
        softcap = None
    output = tree.attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        dropout=dropout,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return output.transpose(1, 2).contiguous(), None


def _attend_trunk(
    attend: Callable[..., torch.Tensor],
    bias: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sliding_window: int | None,
) -> torch.Tensor:
    """
    Attend causally within the trunk.

    With a sliding window this is done in bands. Each band sees no more than itself and the window before it.
    """
    length = query.size(2)
    if sliding_window is None or sliding_window >= length:
        return attend(query, key, value, None)

    def band(num_queries: int, num_before: int, window: int) -> torch.Tensor:
        queries = torch.arange(num_before, num_before + num_queries, device=query.device)[:, None]
        keys = torch.arange(num_before + num_queries, device=query.device)
        return ((keys <= queries) & (queries - keys < window))[None]

    outputs = []
    step = max(sliding_window, _BLOCK)
    for start in range(0, length, step):
        end, first = min(start + step, length), max(start - sliding_window + 1, 0)
        shape = end - start, start - first  # all bands but the first and the last are alike
        mask = bias(partial(band, *shape, sliding_window), "band", *shape)
        outputs.append(attend(query[:, :, start:end], key[:, :, first:end], value[:, :, first:end], mask))
    return torch.cat(outputs, dim=2)


def _attend_fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Call torch's fused attention once, causal without a mask of shape (R or 1, 1, E·Q, K)."""
    attend = partial(scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if mask is None:
        num_sharing = query.size(1) // key.size(1)
        if num_sharing > 1 and query.is_cuda and query.dtype == torch.float32:
            # Flash attention is for half precision. In float32, torch would take the one that holds all scores.
            key, value = (x.repeat_interleave(num_sharing, dim=1) for x in (key, value))
        return attend(query, key, value, is_causal=True, enable_gqa=key.size(1) != query.size(1))
    # With a mask, the fused kernels need as many key heads as query heads. Heads that share keys become further
    # queries, which repeats neither keys nor values.
    folded = query.unflatten(1, (key.size(1), -1)).flatten(2, 3)
    output = attend(folded, key, value, attn_mask=mask)
    return output.unflatten(2, (-1, query.size(2))).flatten(1, 2)


def _attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """
    Attend in blocks of queries. A mask has the shape (R or 1, 1, Q, K).

    This is for capped scores and attention sinks, which torch's fused attention lacks. The backward pass
    recomputes the scores.
    """
    scaling = query.size(-1) ** -0.5 if scaling is None else scaling
    sharing = key.size(1), query.size(1) // key.size(1)

    def attend_block(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        folded = query.unflatten(1, sharing).flatten(2, 3)  # keys are read once for the heads that share them
        scores = (folded @ key.transpose(2, 3) * scaling).unflatten(2, (sharing[1], -1))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores + mask[:, :, None]
        if sinks is not None:
            sink_scores = sinks.to(scores.dtype).view(1, *sharing, 1, 1).expand(*scores.shape[:4], 1)
            scores = torch.cat([scores, sink_scores], dim=4)
        weights = scores.softmax(dim=4, dtype=torch.float32).to(query.dtype)[..., : key.size(2)]
        output = torch.nn.functional.dropout(weights, dropout).flatten(2, 3) @ value
        return output.unflatten(2, (sharing[1], -1)).flatten(1, 2)

    outputs = []
    for start in range(0, query.size(2), _BLOCK):
        end = min(start + _BLOCK, query.size(2))
        if mask is None:
            num_keys = end
            causal = torch.ones(1, end - start, end, dtype=torch.bool, device=query.device).tril(start)
            block_mask = additive_mask(causal, query.dtype, 1)
        else:
            num_keys, block_mask = key.size(2), mask[:, :, start:end]
        block = query[:, :, start:end], key[:, :, :num_keys], value[:, :, :num_keys], block_mask, sinks
        # Random numbers are drawn for dropout alone. Their state is read and kept for every block.
        outputs.append(checkpoint(attend_block, *block, use_reentrant=False, preserve_rng_state=dropout > 0))
    return torch.cat(outputs, dim=2)


def _base_attention(module: torch.nn.Module, base: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    # Each family has its own eager attention, in the module of its attention layer
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _refuse_unknown(module: torch.nn.Module, sliding_window: int | None, kwargs: dict[str, Any]) -> None:
    for name, argument in kwargs.items():
        if name not in _HARMLESS_ARGUMENTS and argument is not None:
            raise ValueError(
                f"{type(module).__name__} attends with {name}={argument!r}, which tree attention does not support. To "
                "train it, set `packing='rows'`."
            )
    layer_types = getattr(module.config, "layer_types", None)
    if layer_types and layer_types[module.layer_idx] == "sliding_attention" and sliding_window is None:
        raise ValueError(
            f"{type(module).__name__} does not tell its attention function the width of its window. To train "
            "it, set `packing='rows'`."
        )


def _create_mask(*args: Any, base: str, **kwargs: Any) -> Any:
    return None if _layout_in_use.get() else ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)


def enable_tree_attention(model: "PreTrainedModel | PeftModel") -> None:
    """
    Let `model` take packed rows (`tree=layout`).

    `generate()` and plain forward passes keep the attention they had.

    Raises:
        `ValueError`: If the model does not take a registered attention function.
    """
    model = cast(PreTrainedModel, cast("PeftModel", model).get_base_model() if is_peft_model(model) else model)
    base = model.config._attn_implementation
    # transformers treats names that contain these words specially
    name = "tree_over_" + re.sub("sdpa|flash|flex", lambda word: word[0][::-1], base)
    AttentionInterface.register(name, partial(tree_attention_forward, base=base))
    AttentionMaskInterface.register(name, partial(_create_mask, base=base))
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError(f"{type(model).__name__} does not support a registered attention function.")


@contextmanager
def plain_attention(model: "PreTrainedModel | PeftModel") -> Iterator[None]:
    """Give `model` its earlier attention back, for code that looks at the attention's name."""
    model = cast(PreTrainedModel, cast("PeftModel", model).get_base_model() if is_peft_model(model) else model)
    name = model.config._attn_implementation
    base = getattr(ALL_ATTENTION_FUNCTIONS.get(name), "keywords", {}).get("base", name)
    model.set_attn_implementation(base)
    try:
        yield
    finally:
        model.set_attn_implementation(name)


@contextmanager
def layout_in_use() -> Iterator[None]:
    """Make no attention masks inside: the layout that goes through the model says how its rows attend."""
    token = _layout_in_use.set(True)
    try:
        yield
    finally:
        _layout_in_use.reset(token)


def forward_packed(
    model: torch.nn.Module,
    packed: PackedRollouts,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """
    Compute the forward pass over rows [left padding][prompt][packed rollout][right padding].

    Args:
        model (`torch.nn.Module`):
            A model with tree attention (see [`enable_tree_attention`]), wrapped or not.
        packed ([`PackedRollouts`]):
            The R rollouts that stand in the last T columns of `input_ids`.
        input_ids (`torch.Tensor`):
            int64 of shape (R, L).
        attention_mask (`torch.Tensor`):
            int64 of shape (R, L), 0 on padding.
        labels (`torch.Tensor`):
            int64 of shape (R, L). Only tokens that the policy sampled keep their label.

    Returns:
        The model's output, with `log_probs` and `entropy` of shape (R, L - 1) aligned with `input_ids`. Its `aux_loss`
        counts each token of a packed row once, as TRL does for a plain row.
    """
    num_tokens = input_ids.size(1)
    prompt_width = num_tokens - packed.token_ids.size(1)
    prompt_lengths = attention_mask[:, :prompt_width].sum(dim=1)
    untrained_RL = torch.nn.functional.pad(~packed.trained(), (prompt_width, 0), value=True)
    labels = labels.masked_fill(untrained_RL, -100)

    # With the padding at the end, all rows begin at index 0, and the trunks are one causal call without a mask. Beyond
    # `length` there is only padding. TRL pads to the longest row of the generation batch, which may not be here.
    length = int((packed.lengths + prompt_lengths).amax())
    index_L = torch.arange(num_tokens, device=input_ids.device)
    padding_R1 = prompt_width - prompt_lengths[:, None]
    to_left = (index_L[:length] + padding_R1) % num_tokens
    layout = TreeLayout.from_packed(packed, prompt_lengths, length)
    with layout_in_use():
        outputs = model(
            input_ids=input_ids.gather(1, to_left),
            attention_mask=attention_mask.gather(1, to_left),
            position_ids=layout.position_ids,
            labels=labels.gather(1, to_left),
            tree=layout,
            **kwargs,
        )

    to_right = (index_L[:-1] - padding_R1) % (num_tokens - 1)
    for name in ("log_probs", "entropy"):
        field = getattr(outputs, name, None)
        if field is not None:
            outputs[name] = torch.nn.functional.pad(field, (0, num_tokens - length)).gather(1, to_right)
    return outputs
