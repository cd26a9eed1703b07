"""
Tree attention: a packed rollout in one forward pass, at the cost of one causal row of the same length.

A registered attention function carries it. Prompt and thinking (the trunk) are plain causal attention; the branches of
one budget are one call over [trunk up to the cut | these branches]; no object of size L × L exists. The layout travels
as the model's keyword argument `tree`. A forward pass without it takes the attention that the model had before.

Dimensions: R rows, L tokens per row (prompt, packed rollout, padding), H heads, D head size, Q branch tokens of one
budget, K keys that they see.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import is_peft_model
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .tree import PackedRollouts

if TYPE_CHECKING:
    from peft import PeftModel

# True while packed rows go through a model. Only mask creation and the guard below read it: what a layer computes,
# also when gradient checkpointing repeats it later, depends on its arguments alone.
_packed_forward: ContextVar[bool] = ContextVar("packed_forward", default=False)

# Arguments that models hand to their attention and that do not change what it computes
_HARMLESS_ARGUMENTS = {"position_ids", "use_cache", "output_attentions", "output_router_logits"}


@dataclass(frozen=True)
class BudgetBranches:
    """
    The branches of one budget, for all rows.

    Args:
        index (`torch.Tensor`):
            int64 of shape (R, Q), where the branch tokens stand in their row; filled up with 0.
        trunk (`int`):
            The keys are the first `trunk` tokens of the row, then the branch tokens.
        mask (`torch.Tensor`):
            Bool of shape (R, 1, Q, K), True where a branch token sees a key.
    """

    index: torch.Tensor
    trunk: int
    mask: torch.Tensor


@dataclass(frozen=True)
class TreeLayout:
    """
    How the rows of one batch attend, computed once per forward pass and shared by all layers.

    Args:
        position_ids (`torch.Tensor`):
            int64 of shape (R, L).
        trunk (`int`):
            Tokens of the longest prompt and thinking.
        budgets (`tuple[BudgetBranches, ...]`):
            The branches of each budget.
        source (`torch.Tensor`):
            int64 of shape (R, L), where the output of each token stands in [trunk | budget 1 | … | budget M].
    """

    position_ids: torch.Tensor
    trunk: int
    budgets: tuple[BudgetBranches, ...]
    source: torch.Tensor

    @classmethod
    def of(cls, packed: PackedRollouts, prompt_lengths: torch.Tensor, row_length: int) -> "TreeLayout":
        """
        Layout of rows that hold a prompt, then its packed rollout, then padding.

        Args:
            packed ([`PackedRollouts`]):
                R rollouts.
            prompt_lengths (`torch.Tensor`):
                int64 of shape (R,), in tokens.
            row_length (`int`):
                L in tokens.
        """
        starts_RM, ends_RM = packed.spans[:, :, 0, 0], packed.spans[:, :, -1, 2]
        sees_RM = packed.cuts + prompt_lengths[:, None]  # trunk tokens that the branches of each budget see
        # The sizes reach the host in one transfer
        sizes = torch.stack([(ends_RM - starts_RM).amax(0), sees_RM.amax(0)]).tolist()
        trunk = int((packed.thinking_lengths + prompt_lengths).amax())

        branch_RT = packed.branches()
        budgets = []
        for j, (width, budget_trunk) in enumerate(zip(*sizes, strict=True)):
            step_Q = torch.arange(width, device=branch_RT.device)
            real_RQ = step_Q < (ends_RM - starts_RM)[:, j, None]
            packed_RQ = torch.where(real_RQ, starts_RM[:, j, None] + step_Q, 0)
            branch_RQ = branch_RT.gather(1, packed_RQ)
            sees_trunk = torch.arange(budget_trunk, device=branch_RT.device) < sees_RM[:, j, None, None]
            sees_branch = (branch_RQ[:, :, None] == branch_RQ[:, None, :]) & (step_Q[:, None] >= step_Q[None, :])
            mask_RQK = torch.cat([sees_trunk.expand(-1, width, -1), sees_branch & real_RQ[:, None, :]], dim=2)
            index_RQ = torch.where(real_RQ, packed_RQ + prompt_lengths[:, None], 0)
            budgets.append(BudgetBranches(index_RQ, budget_trunk, mask_RQK.unsqueeze(1)))

        # Where the outputs of each budget begin in [trunk | budget 1 | … | budget M]
        offsets_M = torch.tensor([0, *sizes[0][:-1]], device=branch_RT.device).cumsum(0) + trunk
        budget_RT = branch_RT.clamp(min=0) // packed.spans.size(2)
        index_RT = packed.indices()
        of_branch_RT = offsets_M[budget_RT] + index_RT - starts_RM.gather(1, budget_RT)
        source_RT = torch.where(branch_RT < 0, index_RT + prompt_lengths[:, None], of_branch_RT)
        positions_RT = packed.positions() + prompt_lengths[:, None]
        padding_RT = index_RT >= packed.lengths[:, None]

        index_L = torch.arange(row_length, device=branch_RT.device)
        packed_RL = index_L - prompt_lengths[:, None]
        in_prompt_RL = packed_RL < 0

        def as_rows(x_RT):  # the prompt counts up, padding is 0
            x_RT = x_RT.masked_fill(padding_RT, 0)
            x_RL = x_RT.gather(1, packed_RL.clamp(0, x_RT.size(1) - 1))
            return torch.where(in_prompt_RL, index_L, x_RL.masked_fill(packed_RL >= x_RT.size(1), 0))

        return cls(as_rows(positions_RT), trunk, tuple(budgets), as_rows(source_RT))


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    base: str,
    tree: TreeLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attention function in the form of transformers' `AttentionInterface`.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query, key, value (`torch.Tensor`):
            Shape (R, H, L, D); key and value may have fewer heads.
        attention_mask (`torch.Tensor`, *optional*):
            Mask of a plain forward pass; `None` with a tree.
        base (`str`):
            Attention implementation that plain forward passes take.
        tree ([`TreeLayout`], *optional*):
            Layout of packed rows; `None` for a plain forward pass.
        scaling (`float`, *optional*):
            Factor of the scores.
        dropout (`float`, *optional*, defaults to `0.0`):
            Attention dropout.

    Returns:
        `tuple`: output of shape (R, L, H, D) and the attention weights, if the base returns them.

    Raises:
        `ValueError`: If the layer asks for something that a tree does not honour.
        `RuntimeError`: If the layout got lost on its way through the model.
    """
    if tree is None:
        if _packed_forward.get():
            raise RuntimeError(
                f"{type(module).__name__} did not receive the keyword argument `tree`: this model does not hand its "
                "keyword arguments down to the attention layers, so it cannot train on packed rollouts."
            )
        attend = _base_attention(module, base)
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    assert attention_mask is None, "mask creation is off for packed rows"
    _refuse_unknown(module, tree, kwargs)
    attend_tree = partial(
        scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=key.size(1) != query.size(1)
    )

    def take(x_RHLD, index_RQ):
        return x_RHLD.gather(2, index_RQ[:, None, :, None].expand(-1, x_RHLD.size(1), -1, x_RHLD.size(3)))

    trunk = (x[:, :, : tree.trunk] for x in (query, key, value))
    outputs = [attend_tree(*trunk, is_causal=True)]
    for branches in tree.budgets:
        keys, values = (torch.cat([x[:, :, : branches.trunk], take(x, branches.index)], dim=2) for x in (key, value))
        outputs.append(attend_tree(take(query, branches.index), keys, values, attn_mask=branches.mask))
    return take(torch.cat(outputs, dim=2), tree.source).transpose(1, 2).contiguous(), None


def _base_attention(module: torch.nn.Module, base: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    # Each family has its own eager attention, beside its attention layer
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _refuse_unknown(module: torch.nn.Module, tree: TreeLayout, kwargs: dict[str, Any]) -> None:
    for name, argument in kwargs.items():
        harmless = name in _HARMLESS_ARGUMENTS or argument is None
        if name == "sliding_window" and not harmless:
            harmless = int(tree.position_ids.max()) < argument  # the whole row lies within the window
        if not harmless:
            raise ValueError(
                f"{type(module).__name__} attends with {name}={argument!r}, which tree attention does not support."
            )


def _create_mask(*args: Any, base: str, **kwargs: Any) -> Any:
    return None if _packed_forward.get() else ALL_MASK_ATTENTION_FUNCTIONS[base](*args, **kwargs)


def enable_tree_attention(model: "PreTrainedModel | PeftModel") -> None:
    """
    Let `model` take packed rows (`tree=layout`). `generate()` and plain forward passes keep the attention they had.

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
def _packed_rows() -> Iterator[None]:
    token = _packed_forward.set(True)
    try:
        yield
    finally:
        _packed_forward.reset(token)


def forward_packed(
    model: torch.nn.Module,
    packed: PackedRollouts,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """
    Forward pass over rows [left padding][prompt][packed rollout][right padding].

    Args:
        model (`torch.nn.Module`):
            A model with tree attention (see [`enable_tree_attention`]), wrapped or not.
        packed ([`PackedRollouts`]):
            The R rollouts that stand in the last T columns of `input_ids`.
        input_ids (`torch.Tensor`):
            int64 of shape (R, L).
        attention_mask (`torch.Tensor`):
            int64 of shape (R, L), 0 on padding.
        labels (`torch.Tensor`, *optional*):
            int64 of shape (R, L), as for a causal language model with a fused LM head; only tokens that the policy
            sampled keep theirs.

    Returns:
        The model's output, its per-token fields aligned with `input_ids`: with labels `log_probs` and `entropy` of
        shape (R, L - 1), without them `logits` of shape (R, L, V).
    """
    num_tokens = input_ids.size(1)
    prompt_width = num_tokens - packed.token_ids.size(1)
    prompt_lengths = attention_mask[:, :prompt_width].sum(dim=1)
    padding_R1 = prompt_width - prompt_lengths[:, None]
    index_L = torch.arange(num_tokens, device=input_ids.device)
    # With the padding at the end, all rows begin at index 0 and the trunks are one causal call without a mask
    to_left_RL = (index_L + padding_R1) % num_tokens
    if labels is not None:
        untrained_RL = torch.nn.functional.pad(~packed.trained(), (prompt_width, 0), value=True)
        kwargs["labels"] = labels.masked_fill(untrained_RL, -100).gather(1, to_left_RL)

    layout = TreeLayout.of(packed, prompt_lengths, num_tokens)
    with _packed_rows():
        outputs = model(
            input_ids=input_ids.gather(1, to_left_RL),
            attention_mask=attention_mask.gather(1, to_left_RL),
            position_ids=layout.position_ids,
            tree=layout,
            **kwargs,
        )

    for name in ("log_probs", "entropy", "logits"):
        field = getattr(outputs, name, None)
        if field is not None:
            back = (index_L[: field.size(1)] - padding_R1) % field.size(1)
            outputs[name] = field[torch.arange(len(field), device=field.device)[:, None], back]
    return outputs


def check_tree_attention(model: PreTrainedModel, tolerance: float | None = None) -> None:
    """
    Compare a tiny packed rollout with separate rows on the real model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with tree attention.
        tolerance (`float`, *optional*):
            Largest difference of a log-probability that passes. Defaults to 1e-3 in float32, where a wrong layout is
            off by 0.1 and more on a trained model, and to 0.3 in half precision.

    Raises:
        `ValueError`: If they differ, as they do on models that mix tokens by other means than attention.
    """
    if tolerance is None:
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.3
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = model.config.get_text_config().vocab_size

    def sample(length):
        return torch.randint(vocabulary, (length,), generator=generator).tolist()

    prompt, thinking, cuts = sample(5), sample(7), [3, 7]
    bridges = [sample(2), sample(1)]
    summaries = [[sample(2), sample(1)], [sample(1), sample(3)]]
    packed = PackedRollouts.pack([thinking], [cuts], [bridges], [summaries])
    packed = PackedRollouts(*(x.to(model.device) for x in (packed.token_ids, packed.cuts, packed.spans)))
    row = torch.cat([torch.tensor([prompt], device=model.device), packed.token_ids], dim=1)

    training = model.training
    model.eval()  # dropout would differ
    try:
        with torch.no_grad():
            outputs = forward_packed(model, packed, row, torch.ones_like(row), use_cache=False)
            tree = outputs.logits[0].float().log_softmax(-1)
            worst = 0.0
            for (start, _, end), (j, a) in zip(
                packed.spans[0].flatten(0, 1).tolist(), [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True
            ):
                separate = [*prompt, *thinking[: cuts[j]], *bridges[j], *summaries[j][a]]
                logits = model(torch.tensor([separate], device=model.device), use_cache=False).logits[0]
                seen = len(prompt) + cuts[j]
                branch = tree[len(prompt) + start : len(prompt) + end]
                both = torch.cat([tree[:seen], branch])
                worst = max(worst, (both - logits.float().log_softmax(-1)).abs().max().item())
    finally:
        model.train(training)
    if not worst <= tolerance:  # catches NaN
        raise ValueError(
            f"{type(model).__name__} cannot train on packed rollouts: on a small example its log-probabilities differ "
            f"by {worst:.2g} from those of separate rows (tolerance {tolerance:.2g}). Models that mix tokens by other "
            "means than attention (recurrent and hybrid models) are not supported."
        )
