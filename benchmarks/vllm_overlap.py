"""
What it saves that summaries are sampled while other traces still run, in a vLLM engine as in TRL's colocate mode:

    python benchmarks/vllm_overlap.py            # a table
    python benchmarks/vllm_overlap.py --json     # an object

One batch fills the engine: all traces but one are short, and the last runs to the last budget. A small random model
decodes greedily, so that both ways sample the same tokens; which is checked. It runs wherever vLLM does, on a CPU with
vLLM's CPU build, where only the ratios mean something.
"""

import argparse
import json
import os
import tempfile

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.generation.vllm_generation import VLLMGeneration

from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.markers import ThinkingMarkers
from trl_anytime.rollout.vllm_backend import ColocateGeneration

VOCAB_SIZE, THINK_END, BRIDGE = 64, 1, (2, 3, 4, 5)


def make_engine(batch: int, max_model_length: int, device: str) -> VLLMGeneration:
    """TRL's backend with a small random model; at most `batch` continuations at a time, as TRL sets it."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=max_model_length,
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    words = {f"<{i}>": i for i in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<0>")), eos_token="<0>"
    )
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return VLLMGeneration(
        model=Qwen2ForCausalLM.from_pretrained(folder),
        accelerator=Accelerator(cpu=device == "cpu"),
        processing_class=tokenizer,
        max_model_length=max_model_length,
        gpu_memory_utilization=0.3,
        max_num_seqs=batch,
        temperature=0.0,
        generation_kwargs={"ignore_eos": True},
    )


def find_prompts(engine: VLLMGeneration, batch: int, settings: RolloutSettings) -> list[list[int]]:
    """Prompts of which one is thought about up to the last budget, and all others for no longer than the first."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(8, VOCAB_SIZE, (20 * batch, 32), generator=generator).tolist()
    alone = RolloutSettings(settings.budgets, 1, 1, settings.markers, [])
    lengths = [len(rollout.thinking.token_ids) for rollout in ColocateGeneration(engine).roll_out(prompts, alone)]
    short = sorted((i for i, n in enumerate(lengths) if n <= settings.budgets[0]), key=lambda i: -lengths[i])
    long = [i for i, n in enumerate(lengths) if n == settings.budgets[-1]]
    if len(short) < batch - 1 or not long:
        raise ValueError(f"No such batch among the traces of lengths {sorted(lengths)}.")
    return [prompts[i] for i in [*short[: batch - 1], long[0]]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Engine steps and time with and without overlap of the two phases.")
    parser.add_argument("--batch", type=int, default=16, help="traces, and places in the engine")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 192, 256])
    parser.add_argument("--summaries", type=int, default=4, help="A")
    parser.add_argument("--summary", type=int, default=16, help="tokens of a summary")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the fastest counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    markers = ThinkingMarkers("", (THINK_END,), "", (*BRIDGE, THINK_END), "", BRIDGE)
    settings = RolloutSettings(options.budgets, options.summaries, options.summary, markers, [])
    engine = make_engine(options.batch, 32 + settings.max_new_tokens, options.device)
    prompts = find_prompts(engine, options.batch, settings)

    rollouts, rows = {}, {}
    for _ in range(options.repeats):
        for name, overlap in (("phases one after the other", False), ("phases that overlap", True)):
            engine.llm.reset_prefix_cache()
            generation = ColocateGeneration(engine, overlap)
            rollouts[name] = generation.roll_out(prompts, settings)
            seconds = sum(generation.times.seconds.values())
            if name not in rows or seconds < rows[name]["seconds"]:
                rows[name] = {
                    "steps": generation.num_steps,
                    "seconds": seconds,
                    **{f"seconds_{phase}": value for phase, value in generation.times.seconds.items()},
                }
    without, overlapping = rows.values()
    result = {
        "thinking_lengths": [len(rollout.thinking.token_ids) for rollout in rollouts["phases that overlap"]],
        "same_tokens": len({str([(r.thinking.token_ids, r.summaries) for r in each]) for each in rollouts.values()})
        == 1,
        "steps_ratio": without["steps"] / overlapping["steps"],
        "seconds_ratio": without["seconds"] / overlapping["seconds"],
        "runs": rows,
    }
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"traces of {result['thinking_lengths']} tokens; same tokens both ways: {result['same_tokens']}\n")
    for name, row in rows.items():
        print(f"{name:28}{row['steps']:5d} steps {row['seconds']:7.2f} s")
    print(f"\nratio: {result['steps_ratio']:.2f} steps, {result['seconds_ratio']:.2f} seconds")


if __name__ == "__main__":
    main()
