"""
Measure how far the memory estimate of `trl-anytime doctor` is off, on the CPU: forward and backward of one micro-batch
whose rollouts reach every budget, in four precisions and ways, with every allocation counted by torch's profiler.

    python benchmarks/memory.py
"""

import argparse
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config
from trl.trainer.utils import add_fused_lm_head

from trl_anytime import BRPOConfig
from trl_anytime.attention import enable_tree_attention, forward_packed
from trl_anytime.memory import Launch, estimate_memory, planned_model, without_memory
from trl_anytime.tree import PackedRollouts

BRIDGE = 10


def allocated(run) -> int:
    """Bytes at the peak of `run` beyond what was held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(config: Qwen2Config, args: BRPOConfig, prompt_length: int) -> tuple[int, int]:
    """Bytes that an update needs beside weights, gradients and states: estimated and measured."""
    with without_memory() as mode:
        planned = planned_model(config, torch.float32)
        estimate = estimate_memory(planned, args, Launch(), prompt_length, BRIDGE, mode)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    enable_tree_attention(model)
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    rows, num_budgets = args.per_device_train_batch_size, len(args.budgets)
    packed = PackedRollouts.pack(
        [[1] * args.budgets[-1]] * rows,
        [args.budgets] * rows,
        [[[1] * BRIDGE] * num_budgets] * rows,
        [[[[1] * args.max_summary_length] * args.num_summaries] * num_budgets] * rows,
    )
    ids = torch.ones(rows, prompt_length + packed.token_ids.size(1), dtype=torch.long)

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            output = forward_packed(model, packed, ids, torch.ones_like(ids), labels=ids, fused_lm_head=True)
        output.log_probs.sum().backward()

    return sum(estimate.training.values()), allocated(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 768, 1024])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--summary", type=int, default=64)
    options = parser.parse_args()
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )
    print("checkpointing  precision  estimated MiB  measured MiB  ratio")
    for checkpointing in (True, False):
        for bf16 in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                args = BRPOConfig(
                    folder,
                    budgets=options.budgets,
                    max_summary_length=options.summary,
                    per_device_train_batch_size=2,
                    num_generations=2,
                    gradient_checkpointing=checkpointing,
                    bf16=bf16,
                    use_cpu=True,
                )
                estimated, measured = (size / 2**20 for size in compare(config, args, options.prompt))
            print(
                f"{'yes' if checkpointing else 'no':<13}  {'bf16' if bf16 else 'float32':<9}  {estimated:>13,.0f}  "
                f"{measured:>12,.0f}  {estimated / measured:>5.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
