"""
What a rollout costs to generate with transformers:

    python benchmarks/generation.py                  # tables, on the CPU
    python benchmarks/generation.py --json           # a list of objects
    python benchmarks/generation.py --device cuda --model-shape qwen2.5-1.5b --dtype bfloat16 --rollouts 16 \
        --budgets 2000 4000 6000 8000 --prompt 256 --summary 118

Summaries at every budget, decoded on top of the thinking's cache, are compared with `generate()` on repeated prompts
(one call of A rows for each budget and rollout, without padding) and with the same after one prefill for each budget
and rollout, whose cache is repeated A times. No summary ends early. Then the thinking of a batch whose rows end at
random, as `generate()` does it and with finished rows set aside. Times are the fastest of several interleaved runs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from transformers import DynamicCache, GenerationConfig
from workload import BRIDGE, add_options, finished_at, make_model, parse, quarters

from trl_anytime.modeling.tree_attention import enable_tree_attention
from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.markers import ThinkingMarkers
from trl_anytime.rollout.transformers_backend import TransformersGeneration


def settings_of(options: argparse.Namespace, budgets: list[int], stop_ids: list[int]) -> RolloutSettings:
    markers = ThinkingMarkers("", (stop_ids[0],), "", tuple(range(10, 10 + BRIDGE - 1)), "", (9,))
    return RolloutSettings(budgets, options.num_summaries, options.summary, markers, stop_ids)


class Timer:
    """The fastest run of each of several computations, interleaved."""

    def __init__(self, device: str):
        self.device = device
        self.fastest: dict[str, float] = {}

    def run(self, name: str, computation: Callable):
        start = finished_at(self.device)
        result = computation()
        self.fastest[name] = min(self.fastest.get(name, float("inf")), finished_at(self.device) - start)
        return result


def summarising(model, options: argparse.Namespace, budgets: list[int]) -> dict[str, float]:
    never = model.config.vocab_size + 1  # a token that is never sampled: nothing ends early
    settings = settings_of(options, budgets, [never])
    config = GenerationConfig(do_sample=True, top_k=0)
    backend = TransformersGeneration(lambda: nullcontext(model), config, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        32, model.config.vocab_size, (options.rollouts, options.prompt), generator=generator
    ).tolist()
    one = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=options.summary, eos_token_id=[never], pad_token_id=0
    )

    def contexts():
        for prompt, thinking in zip(prompts, traces, strict=True):
            for budget in budgets:
                cut, bridge = thinking.cut(budget, settings.markers)
                yield torch.tensor([[*prompt, *thinking.token_ids[:cut], *bridge]], device=model.device)

    def generate():
        for context in contexts():
            rows = context.expand(options.num_summaries, -1)
            model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=one)

    def prefill():
        for context in contexts():
            cache = DynamicCache()
            model(context[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(options.num_summaries)
            rows = context.expand(options.num_summaries, -1)
            model.generate(rows, attention_mask=torch.ones_like(rows), past_key_values=cache, generation_config=one)

    timer = Timer(options.device)
    for _ in range(options.repeats):
        traces, trunk = timer.run("think", partial(backend._think, model, prompts, settings))
        timer.run("cached", partial(backend._summarise, model, prompts, traces, trunk, settings))
        timer.run("generate", generate)
        timer.run("prefill", prefill)
    assert all(len(thinking.token_ids) == budgets[-1] for thinking in traces)
    seconds = timer.fastest
    tokens = options.rollouts * len(budgets) * options.num_summaries * options.summary
    return {
        "thinking": budgets[-1],
        "generate_over_cached": seconds["generate"] / seconds["cached"],
        "prefill_over_cached": seconds["prefill"] / seconds["cached"],
        "summarise_over_think": seconds["cached"] / seconds["think"],
        "thinking_tokens_per_second": options.rollouts * budgets[-1] / seconds["think"],
        "summary_tokens_per_second": tokens / seconds["cached"],
    }


def finished_rows(model, options: argparse.Namespace, budgets: list[int]) -> dict[str, float]:
    """A batch whose traces end at each token with such a probability that a quarter of the budget is their mean."""
    rows, most = 16, budgets[-1]
    stop_ids = list(range(max(1, round(4 * model.config.vocab_size / most))))  # random weights sample almost evenly
    settings = settings_of(options, budgets, stop_ids)
    config = GenerationConfig(do_sample=True, top_k=0)
    backend = TransformersGeneration(lambda: nullcontext(model), config, pad_token_id=0)
    prompt = torch.randint(
        32, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0)
    )
    prompts = prompt.expand(rows, -1).to(model.device)
    whole = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=stop_ids, pad_token_id=0)
    timer = Timer(options.device)
    computed = [0]

    def count(model, args, kwargs):
        computed[0] += kwargs["input_ids"].numel()

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    work = []
    for seed in range(options.repeats):
        # Both sample the same lengths, up to rounding, as long as no row has been set aside: the same seed
        torch.manual_seed(seed)
        computed[0] = -prompts.numel()
        tokens = timer.run(
            f"generate {seed}",
            lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=whole),
        )
        ends = torch.isin(tokens[:, options.prompt :], torch.tensor(stop_ids, device=model.device))
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.size(1))
        plain = computed[0], int(lengths.sum())
        torch.manual_seed(seed)
        computed[0] = -prompts.numel()
        traces, _ = timer.run(f"set aside {seed}", lambda: backend._think(model, prompts.tolist(), settings))
        work.append((*plain, computed[0], sum(len(thinking.token_ids) for thinking in traces)))
    hook.remove()
    plain_computed, plain_needed, ours_computed, ours_needed = (sum(column) for column in zip(*work, strict=True))
    seconds = {
        kind: sum(value for name, value in timer.fastest.items() if name.startswith(kind))
        for kind in ("generate", "set aside")
    }
    return {
        "finished_share_generate": 1 - plain_needed / plain_computed,
        "finished_share_set_aside": 1 - ours_needed / ours_computed,
        # for each token that was needed: both sample, so they do not sample the same number
        "generate_over_set_aside": (seconds["generate"] / plain_needed) / (seconds["set aside"] / ours_needed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, summary=32)
    parser.add_argument("--budgets", type=int, nargs="+", help="default: quarters of 1024 and of 2048")
    parser.add_argument("--rollouts", type=int, default=1, help="rollouts that are summarised together")
    options = parse(parser)
    model = make_model(options).eval()
    enable_tree_attention(model)
    results = []
    with torch.no_grad():
        for budgets in quarters((1024, 2048), options.budgets):
            result = summarising(model, options, budgets) | finished_rows(model, options, budgets)
            results.append({name: round(value, 4) for name, value in result.items()})
            print(f"thinking {budgets[-1]}: done", file=sys.stderr)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name in results[0]:
        print(f"{name:28}" + "".join(f"{result[name]:14,.2f}" for result in results))


if __name__ == "__main__":
    main()
