"""
The tasks of the study with a real language model: problems of reasoning-gym, and made chains of thought for them.

`chain_sum` is the demo's. `leg_counting` asks in words: "how many legs are there in total if you have 5 woodlouses, 2
leechs?" The shortest thinking is `5*14=70. 2*0=0. 70+0=70.`, so the model has to know the animals.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from reasoning_gym.arithmetic.leg_counting import ANIMALS

from examples import arithmetic

# The longest names first, because one may begin another
_GROUP = rf"(\d+) ({'|'.join(sorted(ANIMALS, key=len, reverse=True))})"


@dataclass(frozen=True)
class RealTask:
    """
    A task.

    Args:
        problems_name (`Callable[[int, int], str]`):
            Names a set of problems by size and seed.
        make_thinking (`Callable[[str, random.Random], tuple[str, str]]`):
            Draws a trace for a question, and the answer that it leads to.
    """

    problems_name: Callable[[int, int], str]
    make_thinking: Callable[[str, random.Random], tuple[str, str]]


def legs_name(size: int, seed: int) -> str:
    """Name a set of problems with two or three animals, up to five of each."""
    return f"reasoning_gym:leg_counting?min_animals=2&max_animals=3&max_instances=5&size={size}&seed={seed}"


def count_legs(question: str, rng: random.Random) -> tuple[str, str]:
    """Draw a trace for `leg_counting`; one in five contains a slip, which is carried on."""
    groups = [(int(count), ANIMALS[animal]) for count, animal in re.findall(_GROUP, question)]
    slip = rng.randrange(2 * len(groups) - 1) if rng.random() < 0.2 else None
    steps: list[str] = []

    def step(text: str, value: int) -> int:
        if len(steps) == slip:
            value = max(0, value + rng.choice((-10, -2, -1, 1, 2, 10)))
        steps.append(f"{text}={value}.")
        return value

    products = [step(f"{count}*{legs}", count * legs) for count, legs in groups]
    total = products[0]
    for product in products[1:]:
        total = step(f"{total}+{product}", total + product)
    return arithmetic.ramble(steps, rng), str(total)


TASKS = {
    "chain_sum": RealTask(arithmetic.problems_name, arithmetic.make_thinking),
    "leg_counting": RealTask(legs_name, count_legs),
}
