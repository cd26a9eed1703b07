"""Curves and their comparison, on numbers that a reader can recompute."""

import numpy as np
import pytest

from trl_anytime.evaluation.statistics import ResampledCurve, compare, resampled_means


def estimates(sets):
    curve = ResampledCurve.of(sets)
    return curve.at_budgets(), curve.average()


def test_a_curve_without_uncertainty():
    curve, average = estimates([np.array([[0.25, 0.75]] * 5)])
    assert [(e.mean, e.low, e.high) for e in curve] == [(0.25, 0.25, 0.25), (0.75, 0.75, 0.75)]
    assert (average.mean, average.low, average.high) == (0.5, 0.5, 0.5)


def test_the_interval_is_that_of_the_binomial():
    # 400 questions, half right: the standard error of the mean is sqrt(0.25 / 400) = 0.025, and 1.96 of it 0.049
    values = np.array([[0.0], [1.0]] * 200)
    ((e,), _) = estimates([values])
    assert e.mean == 0.5
    assert (e.low, e.high) == (pytest.approx(0.451, abs=0.004), pytest.approx(0.549, abs=0.004))
    assert np.array_equal(resampled_means(values, seed=3), resampled_means(values, seed=3))


def test_data_sets_weigh_alike_and_are_resampled_each_by_itself():
    # A set of 2 questions, all right, and one of 100, half right: (1 + 0.5) / 2
    ((e,), _) = estimates([np.ones((2, 1)), np.array([[0.0], [1.0]] * 50)])
    assert e.mean == 0.75
    # Only the second varies: half of 1.96 · sqrt(0.25 / 100) = 0.049
    assert (e.low, e.high) == (pytest.approx(0.701, abs=0.006), pytest.approx(0.799, abs=0.006))


def test_intervals_at_0_and_1_are_wilson_s():
    # 0 of 10: z² / (n + z²) = 3.8415 / 13.8415 = 0.2775. At 10 of 10 its mirror image
    curve, average = estimates([np.array([[0.0, 1.0]] * 10)])
    assert [(e.mean, e.low, e.high) for e in curve] == [
        (0.0, 0.0, pytest.approx(0.2775, abs=1e-4)),
        (1.0, pytest.approx(0.7225, abs=1e-4), 1.0),
    ]
    assert (average.mean, average.low, average.high) == (0.5, 0.5, 0.5)  # every question has the same mean
    # With a set of 6 at 1, 3.8415 / 9.8415 = 0.3903: [(0 + 0.6097) / 2, (0.2775 + 1) / 2]
    ((e,), _) = estimates([np.zeros((10, 1)), np.ones((6, 1))])
    assert (e.mean, e.low, e.high) == (0.5, pytest.approx(0.3048, abs=1e-4), pytest.approx(0.6388, abs=1e-4))


def test_a_paired_comparison():
    # Three questions, each better by the same: only the exchange of none or of all has a mean as large, 2 of 8
    theirs = np.array([[0.1], [0.5], [0.9]])
    ((c,), average) = compare([theirs + 0.1], [theirs])
    assert (c.difference.mean, c.difference.low, c.difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert c.p_value == pytest.approx(0.25, abs=0.02)
    assert average == c


def test_no_difference():
    values = np.random.default_rng(0).random((20, 3))
    curve, average = compare([values], [values])
    assert all(c.p_value == 1 and c.difference.mean == 0 for c in [*curve, average])
