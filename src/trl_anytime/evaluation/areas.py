r"""
One number for a whole curve: the area under it, the Anytime Index, and the gap to a frontier.

Between two budgets a curve is a straight line. Areas are divided by the length of the range of budgets, so that they
are mean accuracies. Unlike the anytime average, they do not depend on how densely budgets lie.

Dimensions: M budgets.
"""

from collections.abc import Sequence

import numpy as np


def area_weights(budgets: Sequence[int], low: float | None = None, high: float | None = None) -> np.ndarray:
    r"""
    Return the weights of the accuracies in the mean of their curve over a range of budgets.

    Over all budgets they are those of the trapezoid rule, $w_j = (b_{j+1} - b_{j-1}) / 2(b_M - b_1)$, with half a
    trapezoid at both ends.

    Args:
        budgets (`Sequence[int]`):
            Increasing budgets b_1 … b_M.
        low, high (`float`, *optional*):
            Ends of the range, from b_1 to b_M. They default to b_1 and b_M. If they are the same, the mean is the
            curve's value there.

    Returns:
        `np.ndarray`: shape (M,). The weights sum to 1.
    """
    low = budgets[0] if low is None else low
    high = budgets[-1] if high is None else high
    ends = sorted({low, high, *(budget for budget in budgets if low < budget < high)})
    steps = np.diff(ends)
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2 / (high - low) if high > low else np.ones(1)
    # The curve at an end between two budgets is a mean of both
    at_ends = np.stack([np.interp(ends, budgets, one) for one in np.eye(len(budgets))], axis=1)
    return weights @ at_ends


def anytime_index(curves: np.ndarray, budgets: Sequence[int]) -> np.ndarray:
    r"""
    Return the Anytime Index of curves (arXiv 2601.11038).

    With the best accuracy so far, $Q^*_j = \max_{i \le j} Q_i$, it is the share of the best accuracy that is had on
    average over the budgets:

    $$\mathrm{AI} = \frac{1}{(b_M - b_1)\, Q^*_M} \sum_{j=1}^{M-1} \frac{Q^*_j + Q^*_{j+1}}{2} (b_{j+1} - b_j)$$

    It is 1 for a curve that is at its best from the first budget on. How good that is does not count.

    Args:
        curves (`np.ndarray`):
            Accuracies Q of shape (…, M).
        budgets (`Sequence[int]`):
            Increasing budgets b_1 … b_M.

    Returns:
        `np.ndarray`: shape (…). NaN where the best accuracy is not positive, or if there is only one budget.
    """
    so_far = np.maximum.accumulate(curves, axis=-1)
    best = so_far[..., -1]
    defined = (best > 0) & (len(budgets) > 1)
    return np.where(defined, so_far @ area_weights(budgets) / np.where(defined, best, 1), np.nan)
