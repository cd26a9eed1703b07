"""
What a packed rollout costs, forward and backward, on one rollout with every budget reached:

    python benchmarks/tree_attention.py                  # a table, on the CPU
    python benchmarks/tree_attention.py --json           # a list of objects
    python benchmarks/tree_attention.py --device cuda --model-shape qwen2.5-1.5b --dtype bfloat16 \
        --gradient-checkpointing --budgets 2000 4000 6000 8000 --prompt 256 --summary 128

Compared are: the packed row; separate rows, each by itself without padding, and all in one padded batch; one causal
row of the packed length, which is what the packed row could cost at best; the packed row under a dense 4D mask. Times
are the fastest of several interleaved runs. Beside the measured ratio of separate to packed stands the one
that the count of floating-point operations allows.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Qwen2Config
from trl.trainer.utils import add_fused_lm_head
from workload import BRIDGE, add_options, finished_at, make_model, parse, quarters

from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.separate_rows import forward_rows
from trl_anytime.modeling.tree_attention import enable_tree_attention, forward_packed


@dataclass
class Row:
    """A row that is computed: its token ids, and from which index on tokens are scored."""

    token_ids: list[int]
    first_scored: int


def flops(config: Qwen2Config, tokens: int, pairs: int, scored: int) -> float:
    """Floating-point operations of forward and backward: three times the forward's two per multiplication."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    projections = hidden * head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    per_token = projections + 3 * hidden * config.intermediate_size
    per_pair = 2 * config.num_attention_heads * head_dim
    layers = config.num_hidden_layers * (tokens * per_token + pairs * per_pair)
    return 6.0 * (layers + scored * hidden * config.vocab_size)


def triangle(n: int) -> int:
    return n * (n + 1) // 2


class Rollout:
    """One rollout with every budget reached, as rows and packed."""

    def __init__(self, budgets: list[int], num_summaries: int, prompt: int, summary: int, vocab_size: int):
        generator = torch.Generator().manual_seed(0)

        def sample(length: int) -> list[int]:
            return torch.randint(vocab_size, (length,), generator=generator).tolist()

        self.prompt, thinking, bridge = sample(prompt), sample(budgets[-1]), sample(BRIDGE)
        summaries = [[sample(summary) for _ in range(num_summaries)] for _ in budgets]
        self.packed = PackedRollouts.pack([thinking], [budgets], [[bridge] * len(budgets)], [summaries])
        self.rows = [Row([*self.prompt, *thinking], prompt)]
        for budget, at_budget in zip(budgets, summaries, strict=True):
            context = [*self.prompt, *thinking[:budget], *bridge]
            self.rows += [Row([*context, *tokens], len(context)) for tokens in at_budget]

        scored = budgets[-1] + len(budgets) * num_summaries * summary
        trunk, branch = prompt + budgets[-1], BRIDGE + summary
        self.length = trunk + len(budgets) * num_summaries * branch
        branch_pairs = sum(branch * (prompt + budget) + triangle(branch) for budget in budgets) * num_summaries
        self.packed_counts = self.length, triangle(trunk) + branch_pairs, scored
        lengths = [len(row.token_ids) for row in self.rows]
        self.separate_counts = sum(lengths), sum(map(triangle, lengths)), scored
        self.padded_tokens = len(lengths) * max(lengths)


def variants(model, rollout: Rollout, device: str) -> dict[str, Callable[[], None]]:
    """The computations compared, each forward and backward."""
    packed = PackedRollouts(
        *(x.to(device) for x in (rollout.packed.token_ids, rollout.packed.cuts, rollout.packed.spans))
    )
    row = torch.cat([torch.tensor([rollout.prompt], device=device), packed.token_ids], dim=1)
    mask = torch.ones_like(row)
    prompt = len(rollout.prompt)
    plain_labels = row.clone()
    plain_labels[:, :prompt] = -100

    def backward(outputs) -> None:
        (-outputs.log_probs.sum()).backward()

    def run_packed():
        backward(forward_packed(model, packed, row, mask, row, fused_lm_head=True))

    def run_padded():
        backward(forward_rows(model, packed, row, mask, row, fused_lm_head=True))

    def run_separate():
        for separate in rollout.rows:
            token_ids = torch.tensor([separate.token_ids], device=device)
            labels = token_ids.clone()
            labels[:, : separate.first_scored] = -100
            backward(model(input_ids=token_ids, labels=labels, fused_lm_head=True))

    def run_causal():
        labels = plain_labels.masked_fill(~torch.nn.functional.pad(packed.trained(), (prompt, 0), value=True), -100)
        backward(model(input_ids=row, labels=labels, fused_lm_head=True))

    def run_dense():
        visible = torch.ones(row.size(1), row.size(1), dtype=torch.bool, device=device).tril()
        visible[prompt:, prompt:] = packed.visible()[0]
        positions = torch.cat([torch.arange(prompt, device=device), prompt + packed.positions()[0]])[None]
        labels = plain_labels.masked_fill(~torch.nn.functional.pad(packed.trained(), (prompt, 0), value=True), -100)
        inputs = {"attention_mask": visible[None, None], "position_ids": positions}
        backward(model(input_ids=row, labels=labels, fused_lm_head=True, **inputs))

    return {
        "packed": run_packed,
        "separate": run_separate,
        "padded": run_padded,
        "causal": run_causal,
        "dense": run_dense,
    }


def seconds(run: Callable[[], None], device: str) -> float:
    start = finished_at(device)
    run()
    return finished_at(device) - start


def peak_bytes(run: Callable[[], None], device: str) -> float:
    """Memory at the peak of one run beyond what was held before it. On the CPU measured in a child process."""
    if device == "cuda":
        run()  # allocates the gradients
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    reader, writer = os.pipe()
    if os.fork() == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        os.write(writer, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.wait()
    kibibytes = int(os.read(reader, 64))
    os.close(reader), os.close(writer)
    return kibibytes * 1024


def measure(options: argparse.Namespace, budgets: list[int]) -> dict[str, float]:
    model = make_model(options, use_cache=False)
    config = model.config
    add_fused_lm_head(model)
    enable_tree_attention(model)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    rollout = Rollout(budgets, options.num_summaries, options.prompt, options.summary, config.vocab_size)
    runs = variants(model, rollout, options.device)
    if options.skip_slow:
        runs = {name: runs[name] for name in ("packed", "separate", "causal")}

    peaks = {name: peak_bytes(runs[name], options.device) for name in ("packed", "causal")}
    for run in runs.values():
        run()
    fastest = dict.fromkeys(runs, float("inf"))
    for _ in range(options.repeats):
        for name, run in runs.items():
            fastest[name] = min(fastest[name], seconds(run, options.device))

    packed_flops = flops(config, *rollout.packed_counts)
    ideal = flops(config, *rollout.separate_counts) / packed_flops
    ratio = fastest["separate"] / fastest["packed"]
    result = {
        "thinking": budgets[-1],
        "packed_tokens": rollout.length,
        "separate_tokens": rollout.separate_counts[0],
        "padded_tokens": rollout.padded_tokens,
        "flop_ratio": ideal,
        "separate_over_packed": ratio,
        "share_of_flop_ideal": ratio / ideal,
        "packed_over_causal": fastest["packed"] / fastest["causal"],
        "peak_over_causal": peaks["packed"] / peaks["causal"],
        "packed_seconds": fastest["packed"],
        "packed_tokens_per_second": rollout.length / fastest["packed"],
        "packed_peak_gib": peaks["packed"] / 2**30,
        "packed_tflops_per_second": packed_flops / fastest["packed"] / 1e12,
    }
    for name in ("padded", "dense"):
        if name in fastest:
            result[f"{name}_over_packed"] = fastest[name] / fastest["packed"]
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, summary=64)
    parser.add_argument("--budgets", type=int, nargs="+", help="default: quarters of 1024 and of 2048")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--skip-slow", action="store_true", help="leave out the padded rows and the dense mask")
    options = parse(parser)
    results = []
    for budgets in quarters((1024, 2048), options.budgets):
        results.append(measure(options, budgets))
        print(f"thinking {budgets[-1]}: done", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name in results[0]:
        print(f"{name:26}" + "".join(f"{result[name]:14,.2f}" for result in results))


if __name__ == "__main__":
    main()
