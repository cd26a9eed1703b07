"""
Advantages from rewards: the mathematics of Budget Relative Policy Optimization.

Source: https://huggingface.co/papers/2505.13438, section 3. Where the paper leaves a choice, its released
implementation decides.

Dimensions: P prompts, G traces per prompt (the group), M budgets, A summaries per trace and budget.

A reward of NaN marks a summary that no reward function scored. It is left out of every mean. Where all A summaries of
a trace at a budget are NaN, the returns that include this budget are unknown. They are left out of the group's mean.
Their advantages are NaN, and the caller leaves them out of the loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .budgets import prior_weights

BASELINES = ("brpo", "v1", "v2", "none")
SUMMARY_POLICIES = ("decoupled", "final")
OBJECTIVE = "objective"
# Equal rewards of order 1, weighted by a prior and averaged, differ by no more than this in float32
ROUNDING = 1e-6


@dataclass(frozen=True)
class Returns:
    """
    Returns and baselines of each segment of each trace. Every tensor has shape (P, G, M).

    Segment j holds the thinking tokens b_{j-1} < t ≤ b_j, with b_0 = 0.

    Args:
        returns (`torch.Tensor`):
            R_j = Σ_{k ≥ j} P_k r̄_k, the part of the objective that the segment can still change.
        v1 (`torch.Tensor`):
            Progress so far, V1_j = (Σ_{k<j} λ^{j-k} r̄_k / Σ_{k<j} λ^{j-k}) · Σ_{k ≥ j} P_k. 0 for the first segment.
        v2 (`torch.Tensor`):
            Mean of R_j over the group, 0 when G = 1.
        brpo (`torch.Tensor`):
            The mix V_j = (b_{j-1}/b_m) · V1_j + ((b_m - b_{j-1})/b_m) · V2_j.
    """

    returns: torch.Tensor
    v1: torch.Tensor
    v2: torch.Tensor
    brpo: torch.Tensor

    def baseline(self, name: str) -> torch.Tensor:
        """
        Return the baseline called `name`, shape (P, G, M).

        Args:
            name (`str`):
                `"brpo"`, `"v1"`, `"v2"` or `"none"`.

        Raises:
            `ValueError`: If `name` is another one.
        """
        if name not in BASELINES:
            raise ValueError(f"`baseline` must be one of {BASELINES}, got {name!r}.")
        return torch.zeros_like(self.returns) if name == "none" else getattr(self, name)


def segment_returns(
    rewards: torch.Tensor, budgets: Sequence[int], prior: str | Sequence[float], progress_decay: float = 0.5
) -> Returns:
    """
    Compute the return and the baselines of every segment, see [`Returns`] for the formulas.

    Args:
        rewards (`torch.Tensor`):
            Shape (P, G, M, A), the reward of each summary. NaN where no reward function scored it.
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.
        prior (`str` or `Sequence[float]`):
            Weights of the budgets, see [`prior_weights`].
        progress_decay (`float`, *optional*, defaults to `0.5`):
            λ in (0, 1]. The smaller it is, the faster earlier rewards lose weight in V1.

    Returns:
        [`Returns`]: return and baselines, each of shape (P, G, M).

    Raises:
        `ValueError`: If `progress_decay`, `prior` or the shape of `rewards` is not valid.
    """
    if not 0 < progress_decay <= 1:
        raise ValueError(f"`progress_decay` must lie in (0, 1], got {progress_decay}.")
    P_M = prior_weights(prior, budgets).to(rewards)
    num_budgets = len(budgets)
    if rewards.dim() != 4 or rewards.size(2) != num_budgets:
        raise ValueError(f"`rewards` must have shape (P, G, M, A) with M = {num_budgets}, got {tuple(rewards.shape)}.")
    mean_PGM = rewards.nanmean(dim=3)

    def from_here_on(x: torch.Tensor) -> torch.Tensor:  # Σ_{k ≥ j}
        return x.flip(-1).cumsum(-1).flip(-1)

    # A budget of weight 0 adds nothing to the return, not even its NaN
    returns_PGM = from_here_on(torch.where(P_M > 0, P_M * mean_PGM, 0.0))

    step = torch.arange(num_budgets, device=rewards.device)
    distance_MM = step[:, None] - step[None, :]  # j - k
    decay_MM = torch.where(distance_MM > 0, progress_decay ** distance_MM.clamp(min=0), 0.0).to(rewards)
    progress_PGM = mean_PGM.nan_to_num() @ decay_MM.T
    weight_PGM = mean_PGM.isfinite().to(rewards) @ decay_MM.T
    v1_PGM = torch.where(weight_PGM > 0, progress_PGM / weight_PGM, 0.0) * from_here_on(P_M)

    group_mean_PGM = returns_PGM.nanmean(dim=1, keepdim=True).expand_as(returns_PGM)
    v2_PGM = group_mean_PGM if rewards.size(1) > 1 else torch.zeros_like(returns_PGM)

    thought_M = torch.tensor([0, *budgets[:-1]], device=rewards.device) / budgets[-1]  # b_{j-1} / b_m
    return Returns(returns=returns_PGM, v1=v1_PGM, v2=v2_PGM, brpo=thought_M * v1_PGM + (1 - thought_M) * v2_PGM)


def thinking_advantages(
    rewards: torch.Tensor,
    budgets: Sequence[int],
    prior: str | Sequence[float],
    baseline: str | Callable[[torch.Tensor, Returns], torch.Tensor] = "brpo",
    progress_decay: float = 0.5,
) -> torch.Tensor:
    """
    Compute the advantage A_j = R_j - V_j of every thinking token of segment j.

    Segment j holds the tokens b_{j-1} < t ≤ b_j. The advantage is not divided by a standard deviation.

    Args:
        rewards (`torch.Tensor`):
            Shape (P, G, M, A), the reward of each summary. NaN where no reward function scored it.
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.
        prior (`str` or `Sequence[float]`):
            Weights of the budgets, see [`prior_weights`].
        baseline (`str` or `Callable`, *optional*, defaults to `"brpo"`):
            `"brpo"` (V), `"v1"` (progress only), `"v2"` (the group's mean only, GRPO per segment) or `"none"` (0). It
            can also be a function of `rewards` and [`Returns`] that returns shape (P, G, M), such as a learned
            baseline.
        progress_decay (`float`, *optional*, defaults to `0.5`):
            λ in (0, 1]. The smaller it is, the faster earlier rewards lose weight in V1.

    Returns:
        `torch.Tensor`: shape (P, G, M). A segment past the end of its thinking has a value but no tokens.

    Raises:
        `ValueError`: If `baseline` is an unknown name, or as [`segment_returns`] does.
    """
    segments = segment_returns(rewards, budgets, prior, progress_decay)
    return segments.returns - (baseline(rewards, segments) if callable(baseline) else segments.baseline(baseline))


def summary_weights(
    weight: float | str, budgets: Sequence[int], prior: str | Sequence[float], num_summaries: int
) -> torch.Tensor:
    """
    Return the weight of each summary relative to a thinking token, by budget.

    The gradient of J = E[Σ_j P_j r(x, z_{≤ b_j})] with respect to the summaries' tokens is
    Σ_j P_j / A Σ_a (r_{j,a} - b_j) ∇log π.

    Args:
        weight (`float` or `str`):
            The same number for all summaries (1 in the released implementation), or `"objective"` for P_j / A.
        budgets (`Sequence[int]`):
            Thinking budgets b_1 < … < b_m in tokens.
        prior (`str` or `Sequence[float]`):
            Weights P_j of the budgets, see [`prior_weights`].
        num_summaries (`int`):
            Number of summaries A per trace and budget.

    Returns:
        `torch.Tensor`: float32 of shape (M,).

    Raises:
        `ValueError`: If `weight` is neither `"objective"` nor a finite number of at least 0.
    """
    if weight == OBJECTIVE:
        return prior_weights(prior, budgets) / num_summaries
    if isinstance(weight, str) or not 0 <= weight < math.inf:
        raise ValueError(f"`summary_weight` must be a finite number of at least 0 or {OBJECTIVE!r}, got {weight!r}.")
    return torch.full((len(budgets),), float(weight))


def summary_advantages(
    rewards: torch.Tensor, cuts: torch.Tensor, policy: str = "decoupled", weights: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Return the advantage of every summary's tokens.

    Args:
        rewards (`torch.Tensor`):
            Shape (P, G, M, A), the reward of each summary. NaN where no reward function scored it.
        cuts (`torch.Tensor`):
            Shape (P, G, M), the thinking tokens that the summaries of each budget saw. Budgets with the same cut share
            a context, and so a baseline.
        policy (`str`, *optional*, defaults to `"decoupled"`):
            `"decoupled"`: the reward minus the mean reward of all summaries sampled at the same cut of the same trace.
            With A = 1, the reward minus the group's mean at that budget. `"final"`: the same for the last summary of
            each trace, and 0 for all others.
        weights (`torch.Tensor`, *optional*):
            Shape (M,), factor of the advantages at each budget, see [`summary_weights`]. Defaults to 1.

    Returns:
        `torch.Tensor`: shape (P, G, M, A).

    Raises:
        `ValueError`: If `policy` is unknown.
    """
    if policy not in SUMMARY_POLICIES:
        raise ValueError(f"`summary_policy` must be one of {SUMMARY_POLICIES}, got {policy!r}.")
    if rewards.size(3) == 1:
        baseline = rewards.nanmean(dim=1, keepdim=True)
    else:
        same_cut_PGMM = (cuts.unsqueeze(-1) == cuts.unsqueeze(-2)).to(rewards)
        total_PGM = (same_cut_PGMM @ rewards.nansum(dim=3).unsqueeze(-1)).squeeze(-1)
        count_PGM = (same_cut_PGMM @ rewards.isfinite().sum(dim=3).to(rewards).unsqueeze(-1)).squeeze(-1)
        baseline = (total_PGM / count_PGM).unsqueeze(-1)
    advantages = rewards - baseline
    if weights is not None:
        advantages = advantages * weights.to(advantages)[:, None]
    if policy == "final":
        final = torch.zeros_like(advantages)
        final[:, :, -1, -1] = advantages[:, :, -1, -1]
        return final
    return advantages


def baseline_diagnostics(
    segments: Returns, live: torch.Tensor, extra_baselines: Mapping[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """
    Compute how well each baseline predicts the returns, per segment (the paper's variance analysis).

    Args:
        segments ([`Returns`]):
            Returns and baselines of a batch.
        live (`torch.Tensor`):
            Bool of shape (P, G, M), True where the segment has tokens.
        extra_baselines (`Mapping[str, torch.Tensor]`, *optional*):
            Other baselines by name, each of shape (P, G, M).

    Returns:
        `dict`: `{"variance_ratio" | "correlation": {name: tensor of shape (M,)}}` with Var[R - V] / Var[R] and
        Corr[V, R] over the live segments. The names are `"v1"`, `"v2"`, `"brpo"` and those of `extra_baselines`. NaN
        where a variance is zero.
    """

    def mean(x_PGM: torch.Tensor) -> torch.Tensor:
        return torch.where(live, x_PGM, 0.0).sum(dim=(0, 1)) / live.sum(dim=(0, 1))

    def covariance(x_PGM: torch.Tensor, y_PGM: torch.Tensor) -> torch.Tensor:
        return mean((x_PGM - mean(x_PGM)) * (y_PGM - mean(y_PGM)))

    def positive(x_M: torch.Tensor, total_M: torch.Tensor) -> torch.Tensor:
        # A variance that consists of rounding errors counts as zero
        return torch.where(x_M > 1e-10 * total_M.clamp(min=1e-10), x_M, torch.nan)

    live = live & segments.returns.isfinite()
    R = segments.returns.nan_to_num()
    var_R = positive(covariance(R, R), mean(R**2))
    diagnostics: dict[str, dict[str, torch.Tensor]] = {"variance_ratio": {}, "correlation": {}}
    baselines = {name: segments.baseline(name) for name in ("v1", "v2", "brpo")}
    for name, V in {**baselines, **(extra_baselines or {})}.items():
        V = V.nan_to_num()
        var_V = positive(covariance(V, V), mean(V**2))
        diagnostics["variance_ratio"][name] = covariance(R - V, R - V) / var_R
        diagnostics["correlation"][name] = covariance(V, R) / (var_V * var_R).sqrt()
    return diagnostics
