import pytest
import torch

from trl_anytime.method.budgets import (
    check_budgets,
    exponential_budgets,
    nonempty_segments,
    prior_weights,
    thinking_cuts,
    trapezoid_prior,
)


@pytest.mark.parametrize(
    ("prior", "weights"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.1, 0.2, 0.3, 0.4]),  # 100, 200, 300, 400 of 1000
        ("base", [0.0, 0.0, 0.0, 1.0]),
        ([1, 0, 2, 1], [0.25, 0.0, 0.5, 0.25]),
    ],
)
def test_prior_weights(prior, weights):
    torch.testing.assert_close(prior_weights(prior, [100, 200, 300, 400]), torch.tensor(weights))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ("quadratic", "'uniform', 'linear', 'base' or a list"),
        ([0.5, 0.5, 0.0], "`prior` has 3 .* 2 budgets"),
        ([1.5, -0.5], "non-negative"),
        ([0.0, 0.0], "not all zero"),
        ([float("nan"), 1.0], "finite"),
    ],
)
def test_bad_priors(prior, message):
    with pytest.raises(ValueError, match=message):
        prior_weights(prior, [100, 200])


@pytest.mark.parametrize("budgets", [[], [0], [5, 5], [0, 0], [8, 4], [-1, 4], [1.5, 3], [True, 2], ["4"]])
def test_bad_budgets(budgets):
    with pytest.raises(ValueError, match="`eval_budgets`"):
        check_budgets(budgets, "eval_budgets")


@pytest.mark.parametrize(
    ("budgets", "fix"),
    [
        (8, r"`budgets=\[8\]`"),
        ([32, 16, 8, 16], r"Set \[8, 16, 32\]"),
        ("32,16", "list of ints"),
        (True, "list of ints"),
        (8.0, "list of ints"),
        (-8, "list of ints"),
    ],
)
def test_bad_budgets_name_the_fix(budgets, fix):
    with pytest.raises(ValueError, match=f"`budgets` .*{fix}"):
        check_budgets(budgets)


def test_the_first_budget_may_be_0():
    assert check_budgets([0, 5]) == [0, 5]
    assert thinking_cuts(torch.tensor([1, 9]), [0, 5]).tolist() == [[0, 1], [0, 5]]
    # Nothing is thought up to 0 tokens; then 1 … 5 and 6 … 8
    live = nonempty_segments(torch.tensor([[0, 1, 1], [0, 5, 8]]), [0, 5, 8])
    assert live.tolist() == [[False, True, False], [False, True, True]]


def test_budgets_beyond_the_end_share_the_last_cut():
    cuts = thinking_cuts(torch.tensor([0, 2, 3, 9]), [3, 6])
    assert cuts.tolist() == [[0, 0], [2, 2], [3, 3], [3, 6]]


@pytest.mark.parametrize(
    ("arguments", "budgets"),
    [
        ((250, 8000, 6), [250, 500, 1000, 2000, 4000, 8000]),  # 32 = 2^5
        ((10, 1000, 3), [10, 100, 1000]),
        ((100, 200, 3), [100, 141, 200]),  # 100 √2 = 141.4
        ((7, 56, 2), [7, 56]),
    ],
)
def test_exponential_budgets(arguments, budgets):
    assert exponential_budgets(*arguments) == budgets


@pytest.mark.parametrize("arguments", [(0, 8, 3), (1, 8, 1), (8, 8, 2), (9, 8, 2), (1, 3, 4)])
def test_no_exponential_budgets(arguments):
    with pytest.raises(ValueError, match="`count`"):
        exponential_budgets(*arguments)


@pytest.mark.parametrize(
    ("budgets", "weights"),
    [
        ([2, 4, 8], [1, 3, 2]),  # (4 - 2) / 2, (8 - 2) / 2, (8 - 4) / 2
        ([0, 4, 10], [2, 5, 3]),
        ([10, 20, 30, 40], [5, 10, 10, 5]),
    ],
)
def test_trapezoid_prior(budgets, weights):
    assert trapezoid_prior(budgets) == weights
    # A straight line is integrated exactly: that of b from b_1 to b_m is (b_m² - b_1²) / 2
    assert sum(w * b for w, b in zip(weights, budgets, strict=True)) == (budgets[-1] ** 2 - budgets[0] ** 2) / 2


def test_no_trapezoid_prior():
    with pytest.raises(ValueError, match="two or more"):
        trapezoid_prior([8])
