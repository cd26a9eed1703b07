r"""
Which questions a curve consists of: from which budget on each is right, and what more thinking loses again.

A question is right at a budget if its mean reward over all samples is at least a threshold.

Dimensions: Q questions, M budgets.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .journal import mean_rewards

RIGHT_AT = 0.5


def stays_right(right_QM: np.ndarray) -> np.ndarray:
    """
    Return where questions are right at a budget and at every larger one.

    Args:
        right_QM (`np.ndarray`):
            Whether each question is right at each budget, shape (Q, M).

    Returns:
        `np.ndarray`: shape (Q, M), booleans.
    """
    return np.logical_and.accumulate(right_QM[:, ::-1], axis=1)[:, ::-1]


def first_stable(right_QM: np.ndarray, budgets: Sequence[int]) -> list[int | None]:
    """Return the first budget from which each question stays right, or `None` if there is none."""
    counts_Q = stays_right(right_QM).sum(axis=1)
    return [int(budgets[-count]) if count else None for count in counts_Q]


def flips(right_QM: np.ndarray) -> np.ndarray:
    """Return how often each question is right at a budget and wrong at the next one, shape (Q,)."""
    return (right_QM[:, :-1] & ~right_QM[:, 1:]).sum(axis=1)


def lost(values_QM: np.ndarray) -> np.ndarray:
    r"""
    Return the accuracy that thinking on has lost by each budget.

    $$\mathrm{lost}_j = \frac{1}{Q} \sum_q \Big(\max_{i \le j} r_{qi} - r_{qj}\Big)$$

    The first term is the curve that would be, if each question kept the best mean reward so far.

    Args:
        values_QM (`np.ndarray`):
            Mean rewards r of the questions, shape (Q, M).

    Returns:
        `np.ndarray`: shape (M,), from 0 upwards.
    """
    return (np.maximum.accumulate(values_QM, axis=1) - values_QM).mean(axis=0)


def stability(sets: Sequence[np.ndarray], budgets: Sequence[int], right_at: float = RIGHT_AT) -> dict[str, Any]:
    """
    Count the questions that stay right and those that flip.

    Args:
        sets (`Sequence[np.ndarray]`):
            Mean rewards of sets of questions, each of shape (Q, M). Counts are sums over the sets. Accuracies are
            means over the sets, each with the same weight.
        budgets (`Sequence[int]`):
            Budgets b_1 … b_M.
        right_at (`float`, *optional*, defaults to `0.5`):
            Least mean reward of a question that is right.

    Returns:
        `dict`: `questions`, how many `never_right` at any budget, and how many are `right_at_last`. `flipped`
            questions are right at a budget and wrong at a later one, and `flips` counts how often. `at` has for each
            budget how many questions are `right`, how many of these are `stable`, how many have `fallen` (were right
            before and are wrong now), and the accuracy that is [`lost`].
    """
    right_QM = np.concatenate([values_QM >= right_at for values_QM in sets])
    before_QM = np.logical_or.accumulate(right_QM, axis=1)
    flips_Q = flips(right_QM)
    lost_M = np.mean([lost(values_QM) for values_QM in sets], axis=0)
    return {
        "questions": len(right_QM),
        "never_right": int((~before_QM[:, -1]).sum()),
        "right_at_last": int(right_QM[:, -1].sum()),
        "flipped": int((flips_Q > 0).sum()),
        "flips": int(flips_Q.sum()),
        "at": [
            {"budget": budget, "right": int(right), "stable": int(stable), "fallen": int(fallen), "lost": float(share)}
            for budget, right, stable, fallen, share in zip(
                budgets,
                right_QM.sum(axis=0),
                stays_right(right_QM).sum(axis=0),
                (before_QM & ~right_QM).sum(axis=0),
                lost_M,
                strict=True,
            )
        ],
    }


def right_in_sample(record: Mapping[str, Any], budgets: Sequence[int], right_at: float = RIGHT_AT) -> np.ndarray:
    """
    Return whether one sample is right at each budget.

    Args:
        record (`Mapping`):
            Sample of a journal.
        budgets (`Sequence[int]`):
            Budgets b_1 … b_M.
        right_at (`float`, *optional*, defaults to `0.5`):
            Least mean reward over the summaries of a cut that is right.

    Returns:
        `np.ndarray`: shape (1, M), booleans.
    """
    return mean_rewards(record, budgets)[None] >= right_at
