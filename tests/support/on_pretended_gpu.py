"""
Runs on the pretended GPU, in a process of its own: `python -m tests.support.on_pretended_gpu NAME` prints its record.

Each run is a function that returns facts which JSON can hold.
"""

import json
import sys
import tempfile
from contextlib import nullcontext
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from tests.support.anytime import make_markers
from tests.support.pretended_gpu import GPU, Record, to_gpu
from tests.support.tiny import make_model, tiny_trainer
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.tree_attention import enable_tree_attention, forward_packed
from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.transformers_backend import TransformersGeneration


def facts_of(record):
    return {name: dict(getattr(record, name)) for name in ("waits", "uploads", "promotions", "doubles")}


def tree_model(dtype=torch.float32, **settings):
    model = make_model(**settings).to(dtype)
    add_fused_lm_head(model)
    enable_tree_attention(model)
    return to_gpu(model)


def mixed_devices():
    """Whether an operator with tensors of both devices is refused."""
    with Record():
        try:
            return bool((to_gpu(torch.ones(2)) + torch.ones(2)).sum())
        except RuntimeError as error:
            return "same device" in str(error)


def counted():
    """The waits of six lines that wait, and of two that do not."""
    x = to_gpu(torch.arange(4.0))
    with Record(package="tests") as record:
        x[x > 1], x.sum().item(), bool(x[0] == 0), x.nonzero(), x.tolist(), x.cpu()
        x[torch.tensor([0, 1], device=GPU)], x + 1
        x.bfloat16() + x, x.double()
    return facts_of(record)


def packed_rows(num_rollouts, device):
    """Rollouts of different lengths whose budgets are all reached."""
    packed = PackedRollouts.pack(
        [[7] * (9 + i) for i in range(num_rollouts)],
        [[3, 6, 9]] * num_rollouts,
        [[[8], [8, 9], [8]]] * num_rollouts,
        [[[[5, 6], [6]], [[7], [8]], [[9], [5]]]] * num_rollouts,
    )
    mask = (packed.indices() < packed.lengths[:, None]).long()
    prompt = torch.full((num_rollouts, 3), 4)
    row, mask = torch.cat([prompt, packed.token_ids], 1), torch.cat([torch.ones_like(prompt), mask], 1)
    parts = (packed.token_ids, packed.cuts, packed.spans, row, mask)
    token_ids, cuts, spans, row, mask = (to_gpu(x) for x in parts) if device == "gpu" else parts
    return PackedRollouts(token_ids, cuts, spans), row, mask


def packing(num_rollouts):
    """All that is computed from a packed batch around the forward pass."""
    packed = packed_rows(num_rollouts, "gpu")[0]
    advantages = to_gpu(torch.ones(num_rollouts, 3)), to_gpu(torch.ones(num_rollouts, 3, 2))
    with Record() as record:
        per_token = packed.token_advantages(*advantages, [3, 6, 9])
        packed.prune(per_token)
        packed.summary_sums(per_token)
        packed.summary_lengths()
    return facts_of(record)


def forward_and_backward(num_layers, num_rollouts, dtype="float32"):
    """Layout, packed forward pass, loss and backward pass."""
    model = tree_model(getattr(torch, dtype), num_hidden_layers=num_layers)
    packed, row, mask = packed_rows(num_rollouts, "gpu")
    with Record() as record:
        outputs = forward_packed(model, packed, row, mask, labels=row, fused_lm_head=True)
        (-outputs.log_probs.sum()).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return {**facts_of(record), "with_gradient": sum(grad is not None for grad in grads) / len(grads)}


def equal_to_the_host():
    """The largest difference of log-probabilities from the same model on the host."""
    packed, row, mask = packed_rows(2, "cpu")
    host = make_model()
    add_fused_lm_head(host)
    enable_tree_attention(host)
    expected = forward_packed(host, packed, row, mask, labels=row, fused_lm_head=True).log_probs
    packed, row, mask = packed_rows(2, "gpu")
    with Record():
        found = forward_packed(tree_model(), packed, row, mask, labels=row, fused_lm_head=True).log_probs
    return float((found.host - expected).abs().max())


def generation(num_layers, num_prompts, budget, max_summary_length):
    """Thinking and summaries, none of which ends early, by phase."""
    model = tree_model(num_hidden_layers=num_layers, vocab_size=22).eval()
    never = 21
    settings = RolloutSettings(
        markers=make_markers((never,), (3,), (16, 17)),
        budgets=[budget // 2, budget],
        num_summaries=2,
        max_summary_length=max_summary_length,
        eos_token_ids=[never],
    )
    sampling = GenerationConfig(do_sample=True, suppress_tokens=[never])
    backend = TransformersGeneration(lambda: nullcontext(model), sampling, 0)
    found = {}
    prompts = [[4 + i] * (2 + i) for i in range(num_prompts)]
    with torch.no_grad():
        with Record() as record:
            traces, trunk = backend._think(model, prompts, settings)
        found["thinking"] = facts_of(record)
        with Record() as record:
            rollouts = backend._summarise(model, prompts, traces, trunk, settings)
        found["summarising"] = facts_of(record)
    lengths = {len(ids) for rollout in rollouts for at_budget in rollout.summaries for ids in at_budget}
    assert lengths == {max_summary_length}, lengths
    return found


def training(num_layers, max_steps, **settings):
    """Whole training steps of the trainer: generation, rewards, scoring, update."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(
            folder,
            model=to_gpu(make_model(num_hidden_layers=num_layers)),
            max_steps=max_steps,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer.args.__dict__["_setup_devices"] = GPU
        with (
            Record() as record,
            mock.patch.dict(PartialState._shared_state, device=GPU),
            mock.patch.dict(AcceleratorState._shared_state, device=GPU),
        ):
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {**facts_of(record), "losses": losses}


RUNS = {
    "mixed devices": (mixed_devices,),
    "counted": (counted,),
    "equal to the host": (equal_to_the_host,),
    "packing": (packing, 2),
    "packing, 4 rollouts": (packing, 4),
    "forward": (forward_and_backward, 2, 2),
    "forward, 4 layers": (forward_and_backward, 4, 2),
    "forward, 4 rollouts": (forward_and_backward, 2, 4),
    "forward, bfloat16": (forward_and_backward, 2, 2, "bfloat16"),
    "generation": (generation, 2, 2, 8, 4),
    "generation, 4 layers": (generation, 4, 2, 8, 4),
    "generation, 4 prompts": (generation, 2, 4, 8, 4),
    "generation, 24 tokens and 9": (generation, 2, 2, 24, 9),
    "training": (training, 2, 2),
    "training, 4 layers": (training, 4, 2),
}


def main():
    found = {}
    for name in sys.argv[1:]:
        run, *arguments = RUNS[name]
        found[name] = run(*arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
