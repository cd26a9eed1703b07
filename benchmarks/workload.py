"""What several benchmarks compute with: shapes of models, budgets, and clocks."""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

SHAPES = {
    "small": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
BRIDGE = 10  # tokens


def add_options(parser: argparse.ArgumentParser, summary: int, repeats: int = 3) -> None:
    """Add the options that the benchmarks share, with their own number of tokens of a summary."""
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--model-shape", default="small", choices=list(SHAPES))
    parser.add_argument("--num-summaries", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--summary", type=int, default=summary, help="tokens of a summary")
    parser.add_argument("--repeats", type=int, default=repeats)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the options, and compute with one thread on a CPU."""
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)  # steadier than several on a busy machine
    return options


def quarters(lengths: tuple[int, ...], given: list[int] | None) -> list[list[int]]:
    """Return the lists of budgets to measure: the one that is given, or the quarters of each length."""
    return [given] if given else [[n // 4, n // 2, 3 * n // 4, n] for n in lengths]


def make_model(options: argparse.Namespace, **settings) -> PreTrainedModel:
    """Make a random model of the shape, type and device of the options."""
    config = Qwen2Config(**SHAPES[options.model_shape], max_position_embeddings=131072, **settings)
    torch.manual_seed(0)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))


def finished_at(device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return the time at which the device has finished what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return clock()
