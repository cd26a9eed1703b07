"""
Measure how far the memory estimate of `trl-anytime doctor` is off.

One micro-batch whose rollouts reach every budget goes forward and backward. The LM head is left out: on a CPU it is
another implementation. Then traces and summaries that reach every length are sampled. On the CPU, torch's profiler
counts each allocation. On a GPU, its allocator does.

    python benchmarks/memory.py                     # a table
    python benchmarks/memory.py --json              # a list of objects
    python benchmarks/memory.py --device cuda --hidden 1536 --layers 28 --vocabulary 151936 \
        --budgets 1000 2000 3000 4000 --prompt 256
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config

from trl_anytime import BRPOConfig
from trl_anytime.checks.memory import generation_memory, planned_model, run_layers, without_memory
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.tree_attention import TreeLayout, enable_tree_attention, layout_in_use
from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.markers import ThinkingMarkers
from trl_anytime.rollout.transformers_backend import TransformersGeneration

BRIDGE = 10
DTYPES = {"cpu": (torch.float32, "float32"), "cuda": (torch.bfloat16, "bfloat16")}


def allocated(run: Callable[[], Any], device: str) -> int:
    """Bytes at the peak of `run` beyond what was held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def compare(config: Qwen2Config, args: BRPOConfig, prompt_length: int, device: str) -> tuple[int, int]:
    """Bytes at the peak of forward and backward beside weights and gradients: estimated and measured."""
    with without_memory() as mode:
        _, estimated, _ = run_layers(planned_model(config, torch.float32), args, prompt_length, BRIDGE, mode)

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
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
    ids = torch.ones(rows, prompt_length + packed.token_ids.size(1), dtype=torch.long, device=device)
    packed = PackedRollouts(*(x.to(device) for x in (packed.token_ids, packed.cuts, packed.spans)))
    layout = TreeLayout.from_packed(packed, torch.full((rows,), prompt_length, device=device), ids.size(1))

    def update():
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16), layout_in_use():
            hidden = model.model(input_ids=ids, position_ids=layout.position_ids, tree=layout, use_cache=False)
        hidden.last_hidden_state.sum().backward()

    return estimated, allocated(update, device)


def compare_generation(config: Qwen2Config, args: BRPOConfig, prompt_length: int, device: str) -> tuple[int, int]:
    """Bytes at the peak of sampling traces and summaries: estimated and measured."""
    dtype = DTYPES[device][0]
    estimated = generation_memory(config, args, prompt_length, BRIDGE, dtype.itemsize)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    enable_tree_attention(model)
    never = config.vocab_size + 1  # a token that is not sampled: nothing ends early
    bridge = tuple(range(10, 10 + BRIDGE - 1))
    rollout_settings = RolloutSettings(
        args.budgets,
        args.num_summaries,
        args.max_summary_length,
        ThinkingMarkers("", (never,), "", bridge, "", (9,)),
        [never],
    )
    backend = TransformersGeneration(lambda: nullcontext(model), GenerationConfig(do_sample=True, top_k=0), 0)
    prompts = [[1] * prompt_length] * (args.per_device_train_batch_size * args.steps_per_generation)
    return sum(estimated.values()), allocated(lambda: backend.roll_out(prompts, rollout_settings), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
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
        num_attention_heads=options.hidden // (64 if options.hidden < 1024 else 128),
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for checkpointing in (True, False):
            for bf16 in (False, True):
                args = settings(folder, options, gradient_checkpointing=checkpointing, bf16=bf16)
                if options.device == "cuda" and not (checkpointing and bf16):
                    continue  # at the sizes of a GPU, the others are not what is trained
                row = {"pass": "update", "checkpointing": checkpointing, "precision": "bf16" if bf16 else "float32"}
                rows.append(row | compared(*compare(config, args, options.prompt, options.device)))
        args = settings(folder, options, bf16=False)
        sizes = compare_generation(config, args, options.prompt, options.device)
        rows.append({"pass": "generation", "precision": DTYPES[options.device][1]} | compared(*sizes))
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print("pass        checkpointing  precision  estimated MiB  measured MiB  ratio")
    for row in rows:
        checkpointing = {True: "yes", False: "no"}.get(row.get("checkpointing"), "")
        print(
            f"{row['pass']:<10}  {checkpointing:<13}  {row['precision']:<9}  {row['estimated_mib']:>13,.0f}  "
            f"{row['measured_mib']:>12,.0f}  {row['ratio']:>5.2f}"
        )


def settings(folder: str, options: argparse.Namespace, **changed: Any) -> BRPOConfig:
    return BRPOConfig(
        folder,
        budgets=options.budgets,
        max_summary_length=options.summary,
        per_device_train_batch_size=2,
        num_generations=2,
        use_cpu=True,
        **changed,
    )


def compared(estimated: int, measured: int) -> dict[str, float]:
    mib = {"estimated_mib": estimated / 2**20, "measured_mib": measured / 2**20, "ratio": estimated / measured}
    return {name: round(value, 3) for name, value in mib.items()}


if __name__ == "__main__":
    main()
