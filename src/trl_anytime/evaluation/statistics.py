"""
Accuracy-versus-budget curves with their uncertainty, and the comparison of two curves.

The bootstrap resamples questions. Where all questions are wrong, or all are right, it has nothing to resample. There,
Wilson's interval is used.

Dimensions: Q questions, M budgets, B bootstrap samples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLES = 10_000
_CONFIDENCE = 0.95
_ROWS_AT_ONCE = 1000  # of the resampling weights, which are B × Q
_Z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)


@dataclass(frozen=True)
class Estimate:
    """
    Mean over questions with its 95 % confidence interval.

    Args:
        mean, low, high (`float`):
            The mean, and the ends of the interval.
    """

    mean: float
    low: float
    high: float

    def in_percent(self, width: int = 0) -> str:
        """Return the mean and the interval as text, each number with at least `width` characters."""
        mean, low, high = (f"{100 * value:{width}.1f}" for value in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Comparison:
    """
    Difference of two curves over the same questions.

    Args:
        difference ([`Estimate`]):
            Mean difference.
        p_value (`float`):
            Two-sided probability of a difference at least as large if both were the same. It is computed by
            exchanging the two at random within each question.
    """

    difference: Estimate
    p_value: float


def resampled_means(values_QM: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Return means over questions that are drawn with replacement.

    Args:
        values_QM (`np.ndarray`):
            Shape (Q, M).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.

    Returns:
        `np.ndarray`: shape (B, M).
    """
    generator = np.random.default_rng(seed)
    num_questions = len(values_QM)
    even = np.full(num_questions, 1 / num_questions)
    return np.concatenate(
        [
            generator.multinomial(num_questions, even, size=_ROWS_AT_ONCE) @ values_QM / num_questions
            for _ in range(_RESAMPLES // _ROWS_AT_ONCE)
        ]
    )


@dataclass(frozen=True)
class ResampledCurve:
    """
    Curve with its bootstrap samples, from which everything that depends on it is estimated.

    For several sets of questions, the curve is the mean over the sets. Each set is resampled by itself.

    Args:
        sets (`list[np.ndarray]`):
            Accuracies of shape (Q, M). Each is the mean over the samples of a question at a budget.
        means_M (`np.ndarray`):
            The curve, shape (M,).
        means_BM (`np.ndarray`):
            The curve of each bootstrap sample, shape (B, M).
    """

    sets: list[np.ndarray]
    means_M: np.ndarray
    means_BM: np.ndarray

    @classmethod
    def of(cls, sets: list[np.ndarray], seed: int = 0) -> "ResampledCurve":
        """Resample sets of accuracies, each of shape (Q, M)."""
        means_M = np.mean([values_QM.mean(axis=0) for values_QM in sets], axis=0)
        means_BM = np.mean([resampled_means(values_QM, seed + i) for i, values_QM in enumerate(sets)], axis=0)
        return cls(sets, means_M, means_BM)

    def weighted(self, weights_M: np.ndarray) -> Estimate:
        """
        Estimate a weighted sum over budgets.

        If each set's questions all have the sum 0, or all have the sum 1, the interval is the mean of the sets' Wilson
        intervals. It is then a little too wide.

        Args:
            weights_M (`np.ndarray`):
                Weight of each budget, shape (M,). They sum to 1.
        """
        estimate = quantile_estimate(self.means_M @ weights_M, self.means_BM @ weights_M)
        return _widened(estimate, [values_QM @ weights_M for values_QM in self.sets])

    def at_budgets(self) -> list[Estimate]:
        """Estimate the curve at each budget."""
        return [self.weighted(weights_M) for weights_M in np.eye(len(self.means_M))]

    def average(self) -> Estimate:
        """Estimate the mean over budgets, which is the anytime average."""
        estimate = quantile_estimate(self.means_M.mean(), self.means_BM.mean(axis=1))
        return _widened(estimate, [values_QM.mean(axis=1) for values_QM in self.sets])

    def statistic(self, function: Callable[[np.ndarray], np.ndarray]) -> Estimate | None:
        """
        Estimate any function of the curve.

        Args:
            function (`Callable`):
                Function of curves of shape (…, M), with values of shape (…). NaN means that it is not defined there.

        Returns:
            [`Estimate`], *optional*: `None` where the function of the curve is not defined. The interval leaves out
                bootstrap samples for which it is not.
        """
        mean, values_B = float(function(self.means_M)), function(self.means_BM)
        return None if np.isnan(mean) else quantile_estimate(mean, values_B[~np.isnan(values_B)])


def compare(ours: list[np.ndarray], theirs: list[np.ndarray], seed: int = 0) -> tuple[list[Comparison], Comparison]:
    """
    Estimate the difference of two curves, at each budget and on average.

    Args:
        ours, theirs (`list[np.ndarray]`):
            The same sets of questions in the same order, each of shape (Q, M).
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    resampled = ResampledCurve.of(differences, seed)
    curve = [
        quantile_estimate(mean, resampled.means_BM[:, j]) for j, mean in enumerate(resampled.means_M)
    ]  # differences of 0 or 1 are no proportions, so Wilson's interval does not apply
    average = quantile_estimate(resampled.means_M.mean(), resampled.means_BM.mean(axis=1))
    generator = np.random.default_rng(seed)
    observed_M = resampled.means_M
    flipped = []
    for _ in range(_RESAMPLES // _ROWS_AT_ONCE):
        flips = [generator.choice([-1.0, 1.0], size=(_ROWS_AT_ONCE, len(d))) @ d / len(d) for d in differences]
        flipped.append(np.mean(flips, axis=0))
    flipped_BM = np.concatenate(flipped)

    def p_value(observed: float, under_exchange_B: np.ndarray) -> float:
        # The observed exchange counts, too. The tolerance keeps equal differences equal despite rounding.
        as_large = (np.abs(under_exchange_B) >= abs(observed) - 1e-12).sum()
        return float((as_large + 1) / (len(under_exchange_B) + 1))

    return (
        [Comparison(e, p_value(observed_M[j], flipped_BM[:, j])) for j, e in enumerate(curve)],
        Comparison(average, p_value(observed_M.mean(), flipped_BM.mean(axis=1))),
    )


def _widened(estimate: Estimate, sets: list[np.ndarray]) -> Estimate:
    """Return Wilson's interval if each set's values, (Q,), are all 0 or all 1, else the estimate."""
    if not all((values_Q == values_Q[0]).all() and values_Q[0] in (0, 1) for values_Q in sets):
        return estimate
    # At 0 of n Wilson's interval is [0, z² / (n + z²)], and at n of n its mirror image
    widths = [_Z**2 / (len(values_Q) + _Z**2) for values_Q in sets]
    ends = [(1 - width, 1) if values_Q[0] else (0, width) for values_Q, width in zip(sets, widths, strict=True)]
    low, high = np.mean(ends, axis=0)
    return Estimate(estimate.mean, float(low), float(high))


def quantile_estimate(mean: float, means_B: np.ndarray) -> Estimate:
    """
    Return an estimate with the interval between quantiles of the bootstrap.

    Args:
        mean (`float`):
            The estimate.
        means_B (`np.ndarray`):
            The same of each bootstrap sample, of shape (B,).
    """
    low, high = np.quantile(means_B, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Estimate(float(mean), float(low), float(high))
