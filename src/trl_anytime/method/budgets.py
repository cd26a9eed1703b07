"""
Thinking budgets, the prior over them, and the cuts of a trace.

Source: Optimizing Anytime Reasoning via Budget Relative Policy Optimization, https://huggingface.co/papers/2505.13438.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch

# The paper's settings for a trace of 8k tokens, and the most tokens of one of its summaries
PAPER_BUDGETS = (2000, 4000, 6000, 8000)
PAPER_SUMMARY_LENGTH = 118


def check_budgets(budgets: Sequence[int], name: str = "budgets") -> list[int]:
    """
    Check `budgets` and return them as a list of ints.

    Args:
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens. The first may be 0: the answer without thinking.
        name (`str`, *optional*, defaults to `"budgets"`):
            Name of the setting, for the error.

    Raises:
        `ValueError`: If `budgets` is empty, not strictly increasing ints of at least 0, or 0 alone.
    """
    if isinstance(budgets, int | str) or not isinstance(budgets, Iterable):
        fix = f" Set `{name}=[{budgets}]`." if type(budgets) is int and budgets > 0 else ""
        raise ValueError(f"`{name}` must be a list of ints, such as [2000, 4000, 6000, 8000], got {budgets!r}.{fix}")
    values = list(budgets)
    are_ints = all(isinstance(b, int) and not isinstance(b, bool) for b in values)
    if not values or not are_ints or values[0] < 0 or values[-1] == 0 or any(a >= b for a, b in pairwise(values)):
        in_order = sorted({b for b in values if b >= 0}) if are_ints else []
        raise ValueError(
            f"`{name}` must be strictly increasing ints (thinking tokens) that end above 0, such as "
            f"[2000, 4000, 6000, 8000], got {values}.{f' Set {in_order}.' if in_order and in_order[-1] else ''}"
        )
    return values


def exponential_budgets(first: int, last: int, count: int) -> list[int]:
    """
    Return budgets whose ratio is the same from each to the next, b_j = b_1 (b_m / b_1)^((j-1)/(m-1)).

    Source: a summary of REO-RL, https://huggingface.co/papers/2506.07104, which spaces its budgets so.

    Args:
        first (`int`):
            The smallest budget b_1 in tokens, at least 1.
        last (`int`):
            The full budget b_m in tokens.
        count (`int`):
            Number of budgets m, at least 2.

    Returns:
        `list[int]`: m budgets, rounded to whole tokens.

    Raises:
        `ValueError`: If there is no room for so many budgets between the two.
    """
    if count < 2 or first < 1:
        raise ValueError(f"`first` must be at least 1 and `count` at least 2, got {first} and {count}.")
    budgets = [round(first * (last / first) ** (j / (count - 1))) for j in range(count)]
    if any(a >= b for a, b in pairwise(budgets)):
        raise ValueError(f"There are no {count} exponentially spaced budgets from {first} to {last}. Lower `count`.")
    return budgets


def trapezoid_prior(budgets: Sequence[int]) -> list[float]:
    """
    Return the weights that make J the integral of the accuracy over the budget.

    They are those of the trapezoidal rule: the weight of b_j is (b_{j+1} - b_{j-1}) / 2. The first and the last budget
    have half the distance to their only neighbour. J is then the area under the curve from b_1 to b_m. Start with a
    budget of 0 for the area from 0 on.

    Source: a summary of REO-RL, https://huggingface.co/papers/2506.07104, which weighs its budgets so.

    Args:
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens, at least two.

    Returns:
        `list[float]`: m weights in tokens, for `prior`. They sum to b_m - b_1; [`prior_weights`] normalises them.

    Raises:
        `ValueError`: If there is only one budget, or as [`check_budgets`] does.
    """
    values = check_budgets(budgets)
    if len(values) < 2:
        raise ValueError(f"An integral over budgets needs two or more of them, got {values}.")
    before, after = [values[0], *values[:-1]], [*values[1:], values[-1]]
    return [(b - a) / 2 for a, b in zip(before, after, strict=True)]


def prior_weights(prior: str | Sequence[float], budgets: Sequence[int]) -> torch.Tensor:
    """
    Return the probability P_j of each budget.

    It is the weight of the budget's accuracy in the objective J = E[Σ_j P_j r(x, z_{≤ b_j})].

    Args:
        prior (`str` or `Sequence[float]`):
            `"uniform"` (P_j = 1/m), `"linear"` (P_j ∝ b_j), `"base"` (P_m = 1, all others 0), or m non-negative
            weights, which are normalised.
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.

    Returns:
        `torch.Tensor`: float32 of shape (M,) that sums to 1.

    Raises:
        `ValueError`: If `prior` is an unknown name. Also if its weights have the wrong length, or are negative, not
        finite or all zero.
    """
    if isinstance(prior, str):
        if prior == "uniform":
            weights = torch.ones(len(budgets))
        elif prior == "linear":
            weights = torch.tensor([float(b) for b in budgets])
        elif prior == "base":
            weights = torch.zeros(len(budgets))
            weights[-1] = 1.0
        else:
            raise ValueError(f"`prior` must be 'uniform', 'linear', 'base' or a list of weights, got {prior!r}.")
        return weights / weights.sum()

    weights = torch.tensor([float(w) for w in prior])
    if len(weights) != len(budgets):
        raise ValueError(
            f"`prior` has {len(weights)} weights, but there are {len(budgets)} budgets ({list(budgets)}). Give one "
            "weight per budget."
        )
    if not torch.isfinite(weights).all() or (weights < 0).any() or weights.sum() == 0:
        raise ValueError(f"The weights of `prior` must be finite, non-negative and not all zero, got {list(prior)}.")
    return weights / weights.sum()


def thinking_cuts(thinking_lengths: torch.Tensor, budgets: Sequence[int]) -> torch.Tensor:
    """
    Return where each trace is cut, c_j = min(b_j, |z|).

    Args:
        thinking_lengths (`torch.Tensor`):
            Shape (...), |z| in tokens.
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.

    Returns:
        `torch.Tensor`: int64 of shape (..., M), in tokens. Budgets beyond the end of a trace share its last cut.
    """
    limits = torch.tensor(list(budgets), device=thinking_lengths.device)
    return torch.minimum(thinking_lengths.unsqueeze(-1), limits)


def nonempty_segments(cuts: torch.Tensor, budgets: Sequence[int]) -> torch.Tensor:
    """
    Return which segments b_{j-1} < t ≤ b_j have tokens.

    Args:
        cuts (`torch.Tensor`):
            Shape (..., M), see [`thinking_cuts`].
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.

    Returns:
        `torch.Tensor`: bool of shape (..., M), True where a segment has tokens.
    """
    starts, ends = (torch.tensor(list(x), device=cuts.device) for x in ([0, *budgets[:-1]], budgets))
    return (cuts[..., -1:] > starts) & (ends > starts)  # that of a budget of 0 has none
