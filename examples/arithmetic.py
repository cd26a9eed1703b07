"""
The task of the demo: `chain_sum` of reasoning-gym, and made chains of thought for it, which are wasteful and fallible.

A question asks for a sum such as `5 - 8 - 7`. The shortest thinking is `5-8=-3. -3-7=-10.`, and SmolLM2's
tokenizer writes each digit as a token.
"""

import random
import re
from collections.abc import Callable, Collection, Sequence

from datasets import Dataset

from trl_anytime.data.problems import read_rows

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

    return ramble(steps, rng), str(total)


def ramble(steps: Sequence[str], rng: random.Random) -> str:
    """Draw a trace that goes through the steps once to three times, with repetitions and fillers between."""
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
    return " ".join(parts)


def problems_name(size: int, seed: int) -> str:
    """Name a set of problems with three or four terms of one digit, as `trl-anytime eval --dataset` takes it."""
    return f"reasoning_gym:chain_sum?min_terms=3&max_terms=4&min_digits=1&max_digits=1&size={size}&seed={seed}"


def make_problems(
    count: int, seed: int, held_out: Collection[str] = (), name: Callable[[int, int], str] = problems_name
) -> Dataset:
    """
    Draw problems, of which none is held out.

    Args:
        count (`int`):
            How many to draw.
        seed (`int`):
            Seed of the draw.
        held_out (`Collection[str]`, *optional*):
            Questions to leave out.
        name (`Callable[[int, int], str]`, *optional*):
            Names a set by size and seed. Defaults to that of this task.

    Returns:
        `Dataset`: rows with the columns `question`, `answer` and `entry`, which the reward needs.
    """
    size = count
    while True:
        rows = read_rows(name(size, seed)).rows
        kept = [i for i, question in enumerate(rows["question"]) if question not in held_out]
        if len(kept) >= count:
            return rows.select(kept[:count])
        size += size // 4 + 1
