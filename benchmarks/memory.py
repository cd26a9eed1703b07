"""
Measure how far the memory estimate of `trl-anytime doctor` is off for a model's layers, on the CPU.

One micro-batch whose rollouts reach every budget goes forward and backward, and torch's profiler counts each
allocation. The LM head is left out: on a CPU it is another implementation.

    python benchmarks/memory.py
"""

import argparse
import tempfile

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from trl_anytime import BRPOConfig
from trl_anytime.checks.memory import planned_model, run_layers, without_memory
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.tree_attention import TreeLayout, enable_tree_attention, layout_in_use

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
    """Bytes at the peak of forward and backward beside weights and gradients: estimated and measured."""
    with without_memory() as mode:
        _, estimated, _ = run_layers(planned_model(config, torch.float32), args, prompt_length, BRIDGE, mode)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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
    layout = TreeLayout.from_packed(packed, torch.full((rows,), prompt_length), ids.size(1))

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16), layout_in_use():
            hidden = model.model(input_ids=ids, position_ids=layout.position_ids, tree=layout, use_cache=False)
        hidden.last_hidden_state.sum().backward()

    return estimated, allocated(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--summary", type=int, default=32)
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
