"""Decide what a model may do with the tree of a rollout: by its structure, then by checks of the real model."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..method.packing import PackedRollouts
from ..outside.host_warnings import without_host_warnings
from .branch_decoding import BranchContext, BranchRows, Trunk
from .growing_cache import growing_cache
from .separate_rows import forward_rows
from .tree_attention import enable_tree_attention, forward_packed

logger = get_logger(__name__)

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def admit(model: Any, checks: Sequence[Callable[[Any], str | None]]) -> str | None:
    """
    Give `model` tree attention if its structure allows it and every check passes.

    Otherwise the model is left as it was.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        checks (`Sequence[Callable]`):
            Functions that get the model with tree attention. Each returns why it is not supported, or `None`.

    Returns:
        `str`, *optional*: why the model must not have tree attention. `None` if it has it.
    """
    base = cast(PreTrainedModel, model.get_base_model() if is_peft_model(model) else model)
    reason = unsupported_structure(base)
    if reason is not None:
        return reason
    plain = base.config._attn_implementation
    enable_tree_attention(model)
    for check in checks:
        reason = check(model)
        if reason is not None:
            base.set_attn_implementation(plain)
            return reason
    return None


def choose_forward(model: Any, ref_model: Any, mode: str, is_sharded: bool, cost_of_rows: float) -> Callable[..., Any]:
    """
    Return the forward pass of packed rollouts.

    It uses tree attention if the model allows it, and separate rows otherwise.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, not wrapped. It gets tree attention if that is allowed.
        ref_model ([`~transformers.PreTrainedModel`], *optional*):
            A reference model of the same kind.
        mode (`str`):
            `"auto"`, `"tree"` or `"rows"`, see [`BRPOConfig`].
        is_sharded (`bool`):
            Whether the parameters are sharded. [`check_sharded`] then compares when training begins.
        cost_of_rows (`float`):
            How many times as many tokens separate rows compute, for the warning.

    Raises:
        `ValueError`: If mode is `"tree"` and the model must not have tree attention.
    """
    if mode == "rows":
        return forward_rows
    reason = admit(model, () if is_sharded else (packing_mismatch,))
    if reason is None:
        if ref_model is not None:
            enable_tree_attention(ref_model)
        return forward_packed
    base = model.get_base_model() if is_peft_model(model) else model
    message = f"{type(base).__name__} cannot train on packed rollouts: {reason}."
    if mode == "tree":
        raise ValueError(f"{message} Set `packing='auto'` to train on separate rows instead.")
    logger.warning(
        f"{message} It trains on separate rows instead, one for each summary. They compute up to {cost_of_rows:.1f} "
        "times as many tokens."
    )
    return forward_rows


def check_sharded(wrapped: torch.nn.Module, model: PreTrainedModel) -> None:
    """
    Refuse a sharded model whose packed rows do not give the result of separate rows.

    The model must be ready to train. This is a collective call.

    Args:
        wrapped, model:
            See [`sharded_packing_mismatch`].

    Raises:
        `ValueError`: If they differ. The message says what to set.
    """
    reason = sharded_packing_mismatch(wrapped, model)
    if reason is not None:
        raise ValueError(
            f"{type(model).__name__} cannot train on packed rollouts: {reason}. Set `packing='rows'` to train on "
            "separate rows instead."
        )


def unsupported_structure(model: PreTrainedModel) -> str | None:
    """Return why the structure of `model` rules out tree attention, or `None`."""
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if model._is_stateful:
        return "it is recurrent"
    if not model._can_set_attn_implementation():
        return "its attention layers do not take a registered attention function"
    return None


class _Precision:
    """
    The precision in which a model computes, seen in its forward passes.

    Weights in float32 do not tell. Autocast may be around the forward pass, also that of a trainer which has trained
    the model before.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
    """

    def __init__(self, model: PreTrainedModel):
        self._seen = {model.dtype}
        self._embedding = cast(nn.Module, model.get_input_embeddings())

    def __enter__(self) -> "_Precision":
        self._hook = self._embedding.register_forward_hook(self._look)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.remove()

    def _look(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._seen.add(output.dtype)
        if torch.is_autocast_enabled(output.device.type):
            self._seen.add(torch.get_autocast_dtype(output.device.type))

    def tolerance(self, logprobs: torch.Tensor) -> float:
        """
        Return how far log-probabilities may differ through rounding alone.

        In float32 a right layout is off by 1e-5 and a wrong one by 1e-3 or more. In half precision rounding grows with
        the logits. SmolLM2-135M in bfloat16 has log-probabilities down to -40 over its vocabulary. There a right
        layout is off by 0.2 to 0.7, as far as plain bfloat16 is from float32, and one with a token too few by 2.7 to
        6.5.

        Args:
            logprobs (`torch.Tensor`):
                The log-probabilities that are compared with.
        """
        halves = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in self._seen]
        return 8 * torch.finfo(halves[0]).eps * logprobs.abs().max().item() if halves else 2e-4


def _example(model: PreTrainedModel) -> tuple[PackedRollouts, torch.Tensor, torch.Tensor, torch.Generator]:
    """Make a tiny packed rollout. Return it with its row, the words it uses, and their generator."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, model.config.get_text_config().vocab_size, (8,), generator=generator)
    words = torch.cat([words, torch.zeros(1, dtype=torch.long)]).unique().to(model.device)  # 0 pads

    def sample(length: int) -> list[int]:
        return words[torch.randint(len(words), (length,), generator=generator).to(words.device)].tolist()

    packed = PackedRollouts.pack(
        traces=[sample(7)],
        cuts=[[3, 7]],
        bridges=[[sample(2), sample(1)]],
        summaries=[[[sample(2), sample(1)], [sample(1), sample(3)]]],
    )
    packed = PackedRollouts(*(x.to(words.device) for x in (packed.token_ids, packed.cuts, packed.spans)))
    row = torch.cat([torch.tensor([sample(5)], device=words.device), packed.token_ids], dim=1)
    return packed, row, words, generator


def sharded_packing_mismatch(wrapped: torch.nn.Module, model: PreTrainedModel) -> str | None:
    """
    Compare as [`packing_mismatch`] does, for a model whose forward pass gathers its parameters.

    Only log-probabilities are compared, since gradients go through the hooks that shard. This is a collective call.

    Args:
        wrapped (`torch.nn.Module`):
            The model as it is trained. It gathers its parameters. With DeepSpeed it has another `config`.
        model ([`~transformers.PreTrainedModel`]):
            The same model, unwrapped.

    Returns:
        `str`, *optional*: why the model must not train on packed rollouts.
    """
    packed, row, _, _ = _example(model)
    training = wrapped.training
    wrapped.eval()  # dropout would differ between the two
    try:
        with torch.no_grad(), _Precision(model) as precision:
            tree, separate = (
                forward(wrapped, packed, row, torch.ones_like(row), labels=row, fused_lm_head=True).log_probs.float()
                for forward in (forward_packed, forward_rows)
            )
    finally:
        wrapped.train(training)
    tolerance = precision.tolerance(separate)
    error = (tree - separate).abs().max().item()
    if error <= tolerance:  # false for NaN
        return None
    return (
        f"on a small example its log-probabilities differ by {error:.2g} from those of separate rows (tolerance "
        f"{tolerance:.2g})"
    )


def packing_mismatch(model: PreTrainedModel) -> str | None:
    """
    Compare a tiny packed rollout with separate rows on the real model.

    This compares log-probabilities, and the gradient of their weighted sum with respect to the embeddings.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with TRL's fused LM head and with tree attention.

    Returns:
        `str`, *optional*: why the model must not train on packed rollouts.
    """
    packed, row, words, generator = _example(model)
    embedding = cast(torch.nn.Embedding, model.get_input_embeddings())
    weights = torch.randn(row.size(1) - 1, generator=generator).to(words.device)
    # Add zeros to the embedding of each word, so that there is something to differentiate by, whatever the model's
    # parameters are
    probe = torch.zeros(
        len(words), embedding.weight.size(1), dtype=model.dtype, device=words.device, requires_grad=True
    )

    def add_probe(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + probe[torch.searchsorted(words, inputs[0])]

    def score(forward: Callable[..., Any]) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = forward(model, packed, row, torch.ones_like(row), labels=row, fused_lm_head=True)
        logprobs = outputs.log_probs.float()[0]
        return logprobs.detach(), torch.autograd.grad((logprobs * weights).sum(), probe)[0].float()

    training = model.training
    hook = embedding.register_forward_hook(add_probe)
    model.eval()  # dropout would differ between the two
    try:
        with torch.enable_grad(), _Precision(model) as precision:
            tree, tree_gradient = score(forward_packed)
            separate, separate_gradient = score(forward_rows)
    finally:
        hook.remove()
        model.train(training)
    tolerance = precision.tolerance(separate)
    error = (tree - separate).abs().max().item()
    gradient_error = ((tree_gradient - separate_gradient).abs().max() / separate_gradient.abs().max()).item()
    if error <= tolerance and gradient_error <= tolerance:  # false for NaN
        return None
    return (
        f"on a small example its log-probabilities differ by {error:.2g} and its gradients by {gradient_error:.2g} of "
        f"the largest from those of separate rows (tolerance {tolerance:.2g})"
    )


def branching_mismatch(model: PreTrainedModel) -> str | None:
    """
    Compare branches decoded on top of a cache with plain forward passes on the real model.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with tree attention.

    Returns:
        `str`, *optional*: why the model must not decode branches on top of a cache.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, model.config.get_text_config().vocab_size, (3, 8), generator=generator)
    trunk, *bridges = rows.tolist()
    contexts = [
        BranchContext(0, seen, bridge[:length], 1, [])
        for bridge, seen, length in zip(bridges, (5, 8), (3, 2), strict=True)
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), without_host_warnings(), _Precision(model) as precision:
            cache = growing_cache()
            model(torch.tensor([trunk], device=model.device), past_key_values=cache, use_cache=True)
            start = torch.zeros(1, dtype=torch.long, device=model.device)
            branches = BranchRows(model, Trunk.from_cache(cache, start, [0]), contexts)
            decoded = branches.forward(branches.first_tokens).float().log_softmax(-1)
            separate = torch.cat(
                [
                    model(torch.tensor([trunk[: c.seen] + c.token_ids], device=model.device), use_cache=False).logits[
                        :, -1
                    ]
                    for c in contexts
                ]
            )
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:  # what an unusual cache may raise
        return f"its cache is not supported ({type(error).__name__}: {error})"
    finally:
        model.train(training)
    logprobs = separate.float().log_softmax(-1)
    difference, tolerance = (decoded - logprobs).abs().max().item(), precision.tolerance(logprobs)
    if difference <= tolerance:  # false for NaN
        return None
    return (
        f"on a small example its log-probabilities differ by {difference:.2g} from those of a plain forward pass "
        f"(tolerance {tolerance:.2g})"
    )
