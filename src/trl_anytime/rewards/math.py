"""The default reward: 1 if the boxed final answer is mathematically equal to a gold answer, 0 otherwise."""

import warnings
from collections import Counter
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from .pooled import PooledReward, shortfall
from .verifier.equality import Exact, answers_equal
from .verifier.gold_answers import bad_gold_message, gold_alternatives
from .verifier.pool import get_pool


@dataclass(frozen=True, kw_only=True)
class MathReward(PooledReward):
    r"""Reward 1 for a completion whose final answer is mathematically equal to a gold answer, 0 otherwise.

    See [`AnswerReward`] for how the answer is found. What is plain (numbers, words, choices, lists of these) is graded
    in this process, the rest in worker processes that are killed when they hang. An answer that took all of its own
    time scores 0 and is counted as `timeouts`, or as `dead_workers` if its worker died. An answer whose turn did not
    come within the time of the call was not looked at: it gets no reward (`None`) and is counted as `ungraded`. A
    warning gives the share of both, once for each process and settings. Instances hold settings only and can be
    pickled; the workers belong to the process that grades.

    Args:
        workers (`int`, *optional*):
            Worker processes of this rank. Defaults to half the cores of this rank, at most 4.
        cpu_limit (`float`, *optional*, defaults to `2.0`):
            CPU seconds for one answer.
        hard_limit (`float`, *optional*, defaults to `10.0`):
            Seconds after which a worker that does not answer is killed.
        batch_limit (`float`, *optional*, defaults to `60.0`):
            Seconds for one call, on top of `cpu_limit` for each answer that workers grade, divided by the workers.
        memory_limit (`int`, *optional*, defaults to `1024`):
            MiB of address space of one worker.
        tasks_per_worker (`int`, *optional*, defaults to `2000`):
            Answers after which a worker is replaced by a fresh one.
        kwargs (`dict`):
            Settings of [`AnswerReward`]: `answer_columns`, `answer_bridge`, `end_of_thinking`, `on_bad_gold` and
            `max_answer_length`.

    Example:

    ```python
    >>> from trl_anytime.rewards import MathReward

    >>> reward = MathReward(end_of_thinking=None)
    >>> reward(prompts=["Half?"] * 2, completions=[r"\boxed{\frac12}", r"\boxed{2}"], answer=["0.5", "0.5"])
    [1.0, 0.0]
    ```
    """

    def _score(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float | None]:
        exact = Exact()
        outcomes: dict[tuple[str, str], str | None] = {}  # of a gold and an answer, each pair once; None: for a worker
        for gold_answers, answer in pairs:
            for gold in gold_answers:
                if (gold, answer) not in outcomes:
                    verdict = answers_equal(gold, answer, exact)
                    outcomes[gold, answer] = None if verdict is None else "equal" if verdict else "different"
        pending = [pair for pair, outcome in outcomes.items() if outcome is None]
        if pending:
            outcomes |= zip(pending, get_pool(self._pool_settings()).grade(pending), strict=True)
        scores: list[float | None] = []
        for gold_answers, answer in pairs:
            found = {outcomes[gold, answer] for gold in gold_answers}
            late = "late" in found and "equal" not in found
            scores.append(None if late else float("equal" in found))
            if late:
                counts["ungraded"] += 1
            elif "equal" not in found:
                counts["timeouts"] += "timeout" in found
                counts["dead_workers"] += "dead" in found
        return scores


def grade_answers(
    answers: Sequence[str],
    gold_answers: Sequence[Any],
    *,
    counts: MutableMapping[str, float] | None = None,
    **settings: Any,
) -> list[float | None]:
    r"""Grade bare answers, as they stand in a box, in bulk.

    A warning says which share of them hit a limit, if any did.

    Args:
        answers (`Sequence[str]`):
            Contents of boxes, without `\boxed{}`.
        gold_answers (`Sequence`):
            One gold answer for each: a string, an int, a float, or a list of these, of which any is right.
        counts (`MutableMapping[str, float]`, *optional*):
            Gets the numbers of answers that are `graded`, `too_long` (score 0), `timeouts` and `dead_workers` (of
            those graded, at a limit: score 0), and `ungraded` (not looked at within the time of the call: `None`).
        settings (`dict`):
            Settings of [`MathReward`], such as `workers` or `cpu_limit`.

    Returns:
        `list[float | None]`: 1.0 or 0.0 for each answer, `None` for one that was not looked at.

    Raises:
        `ValueError`: If the lengths differ or a gold answer is none.

    Example:

    ```python
    >>> from trl_anytime.rewards import grade_answers

    >>> grade_answers([r"\frac12", "(2,1)", "1{,}000"], ["0.5", "(1,2)", 1000])
    [1.0, 0.0, 1.0]
    ```
    """
    if len(answers) != len(gold_answers):
        raise ValueError(f"There are {len(answers)} answers but {len(gold_answers)} gold answers.")
    reward = MathReward(**settings)
    found = Counter(dict.fromkeys(("graded", "too_long", "timeouts", "dead_workers", "ungraded"), 0))
    scores: list[float | None] = [0.0] * len(answers)
    rows, pairs = [], []
    for row, (answer, value) in enumerate(zip(answers, gold_answers, strict=True)):
        alternatives = gold_alternatives(value)
        if alternatives is None:
            raise ValueError(bad_gold_message(row, "gold_answers", value, "drop them"))
        if len(answer) <= reward.max_answer_length or answer in alternatives:
            rows.append(row)
            pairs.append((alternatives, answer))
    for row, score in zip(rows, reward._score(pairs, found), strict=True):
        scores[row] = score
    found["graded"] = len(pairs) - found["ungraded"]
    found["too_long"] = len(answers) - len(pairs)
    said = shortfall(found, len(answers))
    if found["too_long"]:
        share = f"{found['too_long']} of {len(answers)} answers ({found['too_long'] / len(answers):.1%})"
        said += f" {share} have more than {reward.max_answer_length} characters (`max_answer_length`), and score 0."
    if said:
        warnings.warn(said.strip(), stacklevel=2)
    if counts is not None:
        counts.update(found)
    return scores
