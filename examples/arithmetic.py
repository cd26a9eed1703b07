"""
The task of the demo: `chain_sum` of reasoning-gym, and made chains of thought for it, which are wasteful and fallible.

A question asks for a sum such as `5 - 8 - 7`. The shortest thinking is `5-8=-3. -3-7=-10.`, and SmolLM2's
tokenizer writes each digit as a token.
"""

import random
import re
from collections.abc import Collection, Iterable

from datasets import Dataset
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_anytime.data.problems import read_rows
from trl_anytime.data.recipe import set_chat_template

THINK_START, THINK_END = "<think>", "</think>"
# The shortest that close a trace and open the answer. A long bridge would cost more than so short a trace.
TRUNCATION_BRIDGE, ANSWER_BRIDGE = THINK_END, "\n\\boxed{"
MAX_SUMMARY_LENGTH = 16  # a summary of this task has at most five; `eval` counts the whole box

PREAMBLES = (
    "Okay, let me think about this.",
    "So, I need to work out this sum.",
    "Let me take it step by step.",
    "First, I look at the numbers.",
    "Hmm, this should not be hard.",
    "Alright.",
)
FILLERS = ("Hmm.", "So far so good.", "Let me go on.", "Now the next one.", "Wait.")
CHECKS = ("Check:", "Yes,", "Let me see,")
AGAIN = ("Let me do it once more.", "To be sure, again.", "Let me verify.")


def make_thinking(question: str, rng: random.Random) -> tuple[str, str]:
    """
    Draw a trace: a preamble, the steps with repetitions and fillers between, up to two more walks of the same sum.

    One in five contains a slip, a wrong result that is carried on and repeated.

    Args:
        question (`str`):
            A question of `chain_sum`.
        rng (`random.Random`):
            What draws.

    Returns:
        `tuple[str, str]`: The trace, and the answer that it leads to.
    """
    first, *rest = re.findall(r"\d+", question)
    signs = re.findall(r" ([+-]) ", question)
    slip = rng.randrange(len(rest)) if rng.random() < 0.2 else None
    total, steps = int(first), []
    for i, (sign, term) in enumerate(zip(signs, rest, strict=True)):
        before, total = total, total + int(sign + term)
        if i == slip:
            total += rng.choice((-10, -2, -1, 1, 2, 10))
        steps.append(f"{before}{sign}{term}={total}.")

    parts = rng.sample(PREAMBLES, rng.randint(1, 2)) if rng.random() < 0.8 else []
    for walk in range(3):
        if walk > 0:
            if rng.random() > 0.4:
                break
            parts.append(rng.choice(AGAIN))
        for step in steps:
            parts.append(step)
            if rng.random() < 0.35:
                parts += [rng.choice(CHECKS), step]
            if rng.random() < 0.4:
                parts.append(rng.choice(FILLERS))
    return " ".join(parts), str(total)


def problems_name(size: int, seed: int) -> str:
    """Name a set of problems with three or four terms of one digit, as `trl-anytime eval --dataset` takes it."""
    return f"reasoning_gym:chain_sum?min_terms=3&max_terms=4&min_digits=1&max_digits=1&size={size}&seed={seed}"


def make_problems(count: int, seed: int, held_out: Collection[str] = ()) -> Dataset:
    """
    Draw problems, of which none is held out.

    Args:
        count (`int`):
            How many to draw.
        seed (`int`):
            Seed of the draw.
        held_out (`Collection[str]`, *optional*):
            Questions to leave out.

    Returns:
        `Dataset`: rows with the columns `question`, `answer` and `entry`, which the reward needs.
    """
    size = count
    while True:
        rows = read_rows(problems_name(size, seed)).rows
        kept = [i for i, question in enumerate(rows["question"]) if question not in held_out]
        if len(kept) >= count:
            return rows.select(kept[:count])
        size += size // 4 + 1


def open_thinking(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Give a ChatML model a template that opens the thinking, and markers of one token each.

    A marker of several tokens may melt into its neighbours, and costs its length at every cut. A new token starts as
    the mean of those that spelled it.
    """
    spelled = {marker: tokenizer(marker, add_special_tokens=False)["input_ids"] for marker in (THINK_START, THINK_END)}
    # As in Qwen3's tokenizer, the markers are not special: they show when decoding
    tokenizer.add_tokens([AddedToken(marker, special=False) for marker in spelled])
    set_chat_template(tokenizer, "chatml_think")
    embeddings = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight.data
    for marker, ids in spelled.items():
        embeddings[tokenizer.convert_tokens_to_ids(marker)] = embeddings[ids].mean(dim=0)


def make_prompt(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def make_sft_dataset(
    questions: Iterable[str], tokenizer: PreTrainedTokenizerBase, longest: int, rng: random.Random
) -> Dataset:
    """
    Make a row for each question: prompt, thinking of at most `longest` tokens, bridge, answer.

    The loss leaves out the prompt and the bridge. A quarter of the traces are cut at a random place, so that the model
    learns to answer early but is not taught to stop early.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    end, eos = tokenizer.convert_tokens_to_ids(THINK_END), tokenizer.eos_token_id
    rows = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(make_prompt(question), add_generation_prompt=True, tokenize=False)
        text, answer = make_thinking(question, rng)
        thinking = [*encode(text), end]
        if rng.random() < 0.25:
            thinking = thinking[: rng.randrange(len(thinking))]
        thinking = thinking[:longest]
        bridge = encode(ANSWER_BRIDGE) if thinking[-1:] == [end] else [end, *encode(ANSWER_BRIDGE)]
        pieces = [(encode(prompt), False), (thinking, True), (bridge, False), ([*encode(answer + "}"), eos], True)]
        rows.append(
            {
                "input_ids": [token for ids, _ in pieces for token in ids],
                "labels": [token if trained else -100 for ids, trained in pieces for token in ids],
            }
        )
    return Dataset.from_list(rows)
