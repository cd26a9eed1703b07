"""
The tasks of the study: generated problems of graded difficulty, and the wasteful, fallible chains of thought that the
warm start teaches. One word is one token; the answer to every problem is one word.

`pointers` is the quickstart's: follow a chain of arrows to its end. `registers` is arithmetic modulo 5 on two
registers, of which the question asks for one:

    q+3 b+4 p=1 c. a=3 r. a  ->  a3 b2 c.  ->  2

The entries come in any order, `a=3` starts register a, `b+4` and so on are its next steps, and `c.` ends it. A chain
can be wrong by a slip in any step. It wastes tokens in five ways that have nothing to do with being right: a preamble,
fillers, repeated steps, steps of the register that was not asked for, and the whole computation again.
"""

import random
from dataclasses import dataclass

from examples.toy_task import FILLERS, POINTERS, Task

MODULUS = 5
REGISTERS = ("abcdefg", "pqrstuv")
_STEPS = [f"+{n}" for n in range(1, MODULUS)]


@dataclass(frozen=True)
class RegisterProblem:
    """`programs` holds, for each register, its start value and its steps; `asked` is the register in question."""

    question: str
    programs: tuple[tuple[str, ...], tuple[str, ...]]
    asked: int

    @property
    def answer(self) -> str:
        return str(values(self.programs[self.asked])[-1])


def values(program: tuple[str, ...], slip: int | None = None, error: int = 0) -> list[int]:
    """The register after each step of `program`, with `error` added at step `slip`."""
    register, out = 0, []
    for i, (operator, operand) in enumerate(program):
        register = int(operand) + (register if operator == "+" else 0) + (error if i == slip else 0)
        out.append(register % MODULUS)
    return out


def make_register_problem(rng: random.Random) -> RegisterProblem:
    """One to five steps for the register in question, one to four for the other, the entries shuffled."""
    asked = rng.randrange(2)
    programs, entries = [], []
    for lane, labels in enumerate(REGISTERS):
        num_steps = rng.randint(1, 5 if lane == asked else 4)
        program = (f"={rng.randrange(MODULUS)}", *rng.choices(_STEPS, k=num_steps))
        programs.append(program)
        entries += [label + step for label, step in zip(labels, (*program, "."), strict=False)]
    rng.shuffle(entries)
    question = " ".join([*entries, REGISTERS[asked][0]])
    return RegisterProblem(question, (programs[0], programs[1]), asked)


def make_register_thinking(problem: RegisterProblem, rng: random.Random) -> tuple[list[str], str]:
    """One chain in five contains a slip, a wrong value that all later steps and repetitions go on from."""
    program, labels = problem.programs[problem.asked], REGISTERS[problem.asked]
    slip = rng.randrange(len(program)) if rng.random() < 0.2 else None
    results = values(program, slip, rng.randrange(1, MODULUS))
    walk = [f"{label}{value}" for label, value in zip(labels, results, strict=False)] + [f"{labels[len(program)]}."]
    other, other_labels = problem.programs[1 - problem.asked], REGISTERS[1 - problem.asked]
    unasked = [f"{label}{value}" for label, value in zip(other_labels, values(other), strict=False)]

    def fillers(most: int) -> list[str]:
        return rng.choices(FILLERS, k=rng.randint(1, most))

    thinking = fillers(8) if rng.random() < 0.8 else []
    if rng.random() < 0.5:
        thinking += unasked[: rng.randint(1, len(unasked))]
    for repetition in range(4):
        if repetition > 0 and rng.random() > 0.65:
            break
        for step in walk:
            thinking += [step, step] if rng.random() < 0.35 else [step]
            if rng.random() < 0.35:
                thinking += fillers(2)
    return thinking, str(results[-1])


def _register_words() -> tuple[str, ...]:
    starts = [f"{labels[0]}={n}" for labels in REGISTERS for n in range(MODULUS)]
    steps = [label + step for labels in REGISTERS for label in labels[1:] for step in (*_STEPS, ".")]
    results = [f"{label}{n}" for labels in REGISTERS for label in labels for n in range(MODULUS)]
    queries = [labels[0] for labels in REGISTERS]
    return (*FILLERS, *queries, *map(str, range(MODULUS)), *starts, *steps, *results)


TASKS = {
    "pointers": POINTERS,
    "registers": Task(_register_words(), make_register_problem, make_register_thinking),
}
