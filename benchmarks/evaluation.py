"""
What a curve of 32 budgets costs, against an evaluation of the same samples at the last budget alone:

    python benchmarks/evaluation.py [--backend vllm]

The model is random, and never ends a trace or a summary by itself: the worst case for the curve. Budgets and
the length of summaries are an eighth of the paper's (32 budgets up to 8000, bridge and summary 128).
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_anytime import AnytimeConfig, Sampling
from trl_anytime.evaluation.evaluate import Evaluation
from trl_anytime.evaluation.problems import ProblemSet
from trl_anytime.evaluation.results import results_of
from trl_anytime.rollout.markers import ThinkingMarkers

LAST = 1000
BUDGETS = list(range(LAST // 32, LAST + 1, LAST // 32))[-32:]
BRANCH = 16  # tokens of bridge and summary


def make_model(folder: Path) -> None:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=512, special_tokens=["<|end|>", "<think>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:3] = 0.0  # never the largest score
    model.save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (2,), "\n</think>", (201, 2), "\n", (201,))
    AnytimeConfig(markers, BUDGETS, [1 / 32] * 32, BRANCH - 3, Sampling(temperature=0), [0]).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    problems = ProblemSet("questions", [f"{i} + {i} ?" for i in range(options.samples)], list(range(options.samples)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if options.backend == "vllm":
            from vllm import LLM

            # Whole blocks are cached; the CPU backend's are 128 tokens by default and 32 at least, a GPU's 16
            model = LLM(temporary, dtype="float32", enforce_eager=True, block_size=32)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        config = AnytimeConfig.from_pretrained(folder)

        def evaluate(name: str, budgets: list[int]) -> tuple[float, float]:
            settings = replace(config, budgets=budgets)
            evaluation = Evaluation(model, tokenizer, settings, [problems], "random", instruction="", batch_size=16)
            start = time.perf_counter()
            cost = results_of(evaluation.protocol, evaluation.run(folder / f"{name}.jsonl"))["cost"]
            print(f"{name}: {cost['tokens']:.0f} tokens, {cost['seconds']:.1f} s of generation, "
                  f"{time.perf_counter() - start:.1f} s in all")  # fmt: skip
            return cost["tokens"], cost["seconds"]

        evaluate("warm-up", [64])
        alone, curve = (
            [evaluate(f"{name}, run {run}", budgets) for run in range(3)]
            for name, budgets in (("the last budget alone", [LAST]), ("32 budgets", BUDGETS))
        )
        seconds = min(seconds for _, seconds in curve) / min(seconds for _, seconds in alone)
        print(f"ratio: tokens {curve[0][0] / alone[0][0]:.2f}, time {seconds:.2f} (the fastest run of each)")


if __name__ == "__main__":
    main()
