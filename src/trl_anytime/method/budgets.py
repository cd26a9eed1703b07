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
