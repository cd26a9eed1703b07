"""The answer that a summary gives, whether two answers are the same, and whether a summary contradicts itself."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

from .verifier.equality import Exact, answers_equal
from .verifier.extraction import all_boxed, answer_part, last_boxed

# Longer answers are the same only if their texts are. Plain answers are far shorter.
_MOST_CHARACTERS = 200


def read_answer(summary: str, answer_bridge: str, clipped: bool) -> str | None:
    r"""
    Return the answer that a summary gives.

    It is what stands in the box that the rewards grade. Without such a box it is the whole text without spaces around
    it, if the text came to its end.

    Args:
        summary (`str`):
            Text of a summary.
        answer_bridge (`str`):
            Text that precedes it.
        clipped (`bool`):
            Whether the summary is cut off at its length limit.

    Returns:
        `str` or `None`: `None` if there is no answer. The summary is then empty, or is cut off before a box.
    """
    box = (last_boxed(answer_part(summary, True, answer_bridge, None) or "") or "").strip()
    return box or (None if clipped else summary.strip() or None)


@lru_cache(maxsize=100_000)
def same_answer(first: str, second: str) -> bool:
    """
    Return whether two answers are the same text, or plain answers that the verifier finds equal.

    Plain are numbers, words, choices, and lists of these. Formulas that are written in two ways count as different.
    """
    if first == second:
        return True
    return max(len(first), len(second)) <= _MOST_CHARACTERS and answers_equal(first, second, Exact()) is True


def contradicts_itself(summary: str) -> bool:
    r"""Return whether two neighbouring boxes of a summary hold different answers."""
    return any(not same_answer(a.strip(), b.strip()) for a, b in pairwise(all_boxed(summary)))


def majority(answers: Sequence[str | None], agreement: float) -> str | None:
    """
    Return the answer that enough of several summaries give.

    Args:
        answers (`Sequence[str | None]`):
            Answer of each summary, `None` for one without.
        agreement (`float`):
            Share of the summaries that must give the answer, in (0, 1].

    Returns:
        `str` or `None`: the answer that most of them give, the first of several. `None` if too few do.
    """
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        for group in groups:
            if same_answer(group[0], answer):
                group.append(answer)
                break
        else:
            groups.append([answer])
    largest = max(groups, key=len, default=[])
    # The tolerance is for shares such as 2 / 3, which a user writes as 0.67
    return largest[0] if largest and len(largest) >= (agreement - 5e-3) * len(answers) else None
