"""
What an answer costs in a session, whose keys and values are kept:

    python benchmarks/session.py
    python benchmarks/session.py --device cuda --dtype bfloat16 --model-shape qwen2.5-1.5b --thinking 2000 8000 \
        --prompt 256 --summary 118

An answer of a session computes bridge and summary. Its first token is compared with a forward pass over prompt, trace
and bridge, which is what an answer without a kept cache begins with. The whole answer is compared with `generate()` on
the same tokens. No summary ends early. Times are the fastest of several interleaved runs.
"""

import argparse
import random
from dataclasses import replace
from functools import partial

import torch
from generation import BRIDGE, Timer
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, Qwen2Config
from tree_attention import SHAPES

from trl_anytime import AnytimeConfig, AnytimeSession, Sampling
from trl_anytime.rollout.markers import ThinkingMarkers


def make_session(options: argparse.Namespace) -> AnytimeSession:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([], vocab_size=512, special_tokens=["<|end|>", "</think>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    torch.manual_seed(0)
    longest = options.prompt + max(options.thinking) + BRIDGE + options.summary + 1
    shape = {**SHAPES[options.model_shape], "max_position_embeddings": longest}
    model = (
        AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=getattr(torch, options.dtype))
        .to(options.device)
        .eval()
    )
    model.generation_config.eos_token_id = None
    never = model.config.vocab_size + 1  # a token that is never sampled: nothing ends early
    markers = ThinkingMarkers("</think>", (never,), "\n</think>", tuple(range(10, 10 + BRIDGE - 1)), "\n", (9,))
    config = AnytimeConfig(markers, [1], [1.0], options.summary, Sampling(temperature=0), [never])
    letters = random.Random(0).choices("abcdefgh", k=options.prompt)  # a token each
    return AnytimeSession(model, tokenizer, "".join(letters), config=config, seed=0)


def measure(session: AnytimeSession, options: argparse.Namespace, thinking: int) -> dict[str, float]:
    session.think(thinking - len(session.token_ids))
    model, markers = session._backend._model, session.config.markers
    bridge = [*markers.truncation_bridge_ids, *markers.answer_bridge_ids]
    context = torch.tensor([[*session._trace.all_ids, *bridge]], device=options.device)
    settings = GenerationConfig(max_new_tokens=options.summary, do_sample=False, pad_token_id=0)
    state = session.state()
    first = replace(state, config={**state.config, "max_summary_length": 1})
    short = AnytimeSession.resume(first, model, session._tokenizer)
    timer = Timer(options.device)
    mask = torch.ones_like(context)
    for _ in range(options.repeats):
        timer.run("first token", short.answer)
        answer = timer.run("answer", session.answer)
        with torch.no_grad():
            timer.run("prefill", partial(model, context, logits_to_keep=1))
            generate = partial(model.generate, context, attention_mask=mask, generation_config=settings)
            found = timer.run("generate()", generate)
        assert len(answer.answer_ids[0]) == found.size(1) - context.size(1) == options.summary
    return timer.fastest


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-shape", choices=SHAPES, default="small")
    parser.add_argument("--thinking", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--summary", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    session = make_session(options)
    for thinking in options.thinking:
        seconds = measure(session, options, thinking)
        milliseconds = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in seconds.items())
        print(f"thinking {thinking}: {milliseconds}; first token over prefill "
              f"{seconds['first token'] / seconds['prefill']:.2f}, answer over generate() "
              f"{seconds['answer'] / seconds['generate()']:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
