"""Which models may train on packed rollouts: by their structure, then by a check of the real model."""

from typing import cast

import torch
from transformers import PreTrainedModel

from .attention import forward_packed
from .separate_rows import forward_rows
from .tree import PackedRollouts

# A right layout is off by rounding: 1e-5 in float32, and in half precision what rounds logits of 10 to 0.03. A wrong
# one is off by 1e-3 on a random model and by 0.1 to 4 on a trained one.
_FULL_PRECISION, _HALF_PRECISION = 2e-4, 0.25
_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}


def structural_objection(model: PreTrainedModel) -> str | None:
    """Why the structure of `model` rules out tree attention, or `None`."""
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _ATTENTION_LAYERS
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    if model._is_stateful:
        return "it is recurrent"
    if not model._can_set_attn_implementation():
        return "its attention layers do not take a registered attention function"
    return None


def _example(model: PreTrainedModel) -> tuple[PackedRollouts, torch.Tensor, torch.Tensor, torch.Generator]:
    """A tiny packed rollout, its row with a prompt, the words it is made of, and the generator they come from."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, model.config.get_text_config().vocab_size, (8,), generator=generator)
    words = torch.cat([words, torch.zeros(1, dtype=torch.long)]).unique().to(model.device)  # 0 pads

    def sample(length):
        return words[torch.randint(len(words), (length,), generator=generator).to(words.device)].tolist()

    packed = PackedRollouts.pack(
        thinkings=[sample(7)],
        cuts=[[3, 7]],
        bridges=[[sample(2), sample(1)]],
        summaries=[[[sample(2), sample(1)], [sample(1), sample(3)]]],
    )
    packed = PackedRollouts(*(x.to(words.device) for x in (packed.token_ids, packed.cuts, packed.spans)))
    row = torch.cat([torch.tensor([sample(5)], device=words.device), packed.token_ids], dim=1)
    return packed, row, words, generator


def sharded_objection(wrapped: torch.nn.Module, model: PreTrainedModel, half_precision: bool) -> str | None:
    """
    Collective: as [`measured_objection`], for a model whose parameters are gathered in its forward pass. Compares
    log-probabilities alone, since gradients go through the hooks that shard.

    Args:
        wrapped (`torch.nn.Module`):
            The model as it is trained, which gathers its parameters. DeepSpeed's has another `config`.
        model ([`~transformers.PreTrainedModel`]):
            The same, unwrapped.
        half_precision (`bool`):
            Whether it computes in half precision.

    Returns:
        `str`, *optional*: why the model must not train on packed rollouts.
    """
    tolerance = _HALF_PRECISION if half_precision or model.dtype != torch.float32 else _FULL_PRECISION
    packed, row, _, _ = _example(model)
    training = wrapped.training
    wrapped.eval()  # dropout would differ
    try:
        with torch.no_grad():
            tree, separate = (
                forward(wrapped, packed, row, torch.ones_like(row), labels=row, fused_lm_head=True).log_probs.float()
                for forward in (forward_packed, forward_rows)
            )
    finally:
        wrapped.train(training)
    error = (tree - separate).abs().max().item()
    if error <= tolerance:  # false for NaN
        return None
    return (
        f"on a small example its log-probabilities differ by {error:.2g} from those of separate rows (tolerance "
        f"{tolerance:.2g})"
    )


def measured_objection(model: PreTrainedModel) -> str | None:
    """
    Compare a tiny packed rollout with separate rows on the real model: log-probabilities, and the gradient of their
    weighted sum with respect to the embeddings.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            A model with TRL's fused LM head and with tree attention.

    Returns:
        `str`, *optional*: why the model must not train on packed rollouts.
    """
    tolerance = _FULL_PRECISION if model.dtype == torch.float32 else _HALF_PRECISION
    packed, row, words, generator = _example(model)
    embedding = cast(torch.nn.Embedding, model.get_input_embeddings())
    weights = torch.randn(row.size(1) - 1, generator=generator).to(words.device)
    # Zeros that are added to the embedding of each word, to differentiate by whatever the model's parameters are
    probe = torch.zeros(
        len(words), embedding.weight.size(1), dtype=model.dtype, device=words.device, requires_grad=True
    )

    def add_probe(module, inputs, output):
        return output + probe[torch.searchsorted(words, inputs[0])]

    def score(forward):
        outputs = forward(model, packed, row, torch.ones_like(row), labels=row, fused_lm_head=True)
        logprobs = outputs.log_probs.float()[0]
        return logprobs.detach(), torch.autograd.grad((logprobs * weights).sum(), probe)[0].float()

    training = model.training
    hook = embedding.register_forward_hook(add_probe)
    model.eval()  # dropout would differ
    try:
        with torch.enable_grad():
            tree, tree_gradient = score(forward_packed)
            separate, separate_gradient = score(forward_rows)
    finally:
        hook.remove()
        model.train(training)
    error = (tree - separate).abs().max().item()
    gradient_error = ((tree_gradient - separate_gradient).abs().max() / separate_gradient.abs().max()).item()
    if error <= tolerance and gradient_error <= tolerance:  # false for NaN
        return None
    return (
        f"on a small example its log-probabilities differ by {error:.2g} and its gradients by {gradient_error:.2g} of "
        f"the largest from those of separate rows (tolerance {tolerance:.2g})"
    )
