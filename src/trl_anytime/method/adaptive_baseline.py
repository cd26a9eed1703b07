"""
A learned baseline for the thinking's advantage. It predicts returns from earlier generation batches.

Dimensions: P prompts, G traces per prompt (the group), M budgets, A summaries per trace and budget, F features.
"""

from collections.abc import Mapping

import torch

from .advantages import Returns

# A generation batch counts half after ten: the policy moves on, and a few thousand rollouts determine few coefficients
_FORGETTING = 0.5**0.1
_ROWS_PER_COEFFICIENT = 20
# Ridge, as a share of the features' mean square. It only decides between coefficients that the data do not tell apart.
_RIDGE = 1e-6


class AdaptiveBaseline:
    """
    Least-squares prediction of a segment's return R_j from what is known before the segment, fitted on earlier
    batches.

    The features of segment j are r̄_1 … r̄_{j-1} of the own trace, the mean of R_j over the *other* traces of the
    group, and 1. Neither the features nor the coefficients depend on the tokens of the segment, so the gradient stays
    unbiased. V1, V2 and V without the own sample are special cases of such a prediction.

    Older batches count less. A segment uses the paper's mix V until it has seen 20 traces per coefficient. So do rows
    whose features are not all known (NaN).

    All ranks see the same gathered rewards and fit in float64 on the CPU. So they get the same coefficients.

    Args:
        num_budgets (`int`):
            Number of budgets M.
    """

    def __init__(self, num_budgets: int):
        num_features = num_budgets + 1
        self.rows = torch.zeros(num_budgets, dtype=torch.float64)  # M
        self.gram = torch.zeros(num_budgets, num_features, num_features, dtype=torch.float64)  # M, F, F: Σ x xᵀ
        self.moment = torch.zeros(num_budgets, num_features, dtype=torch.float64)  # M, F: Σ x R

    def predict(self, rewards: torch.Tensor, segments: Returns) -> torch.Tensor:
        """
        Return the baseline of a batch, predicted from earlier batches.

        Args:
            rewards (`torch.Tensor`):
                Shape (P, G, M, A), the reward of each summary. NaN where no reward function scored it.
            segments ([`Returns`]):
                Returns of the same batch, and V for the places without a prediction.

        Returns:
            `torch.Tensor`: shape (P, G, M).
        """
        features = _features(rewards, segments)
        predicted = torch.einsum("pgmf,mf->pgm", features, self.coefficients()).to(segments.brpo)
        return torch.where(predicted.isfinite(), predicted, segments.brpo)

    def update(self, rewards: torch.Tensor, segments: Returns, live: torch.Tensor) -> None:
        """
        Learn from a batch, for later batches.

        Args:
            rewards (`torch.Tensor`):
                Shape (P, G, M, A), the reward of each summary. NaN where no reward function scored it.
            segments ([`Returns`]):
                Returns of the same batch.
            live (`torch.Tensor`):
                Bool of shape (P, G, M), True where the segment has tokens. Nothing is learned from the others.
        """
        x_PGMF = _features(rewards, segments)
        R_PGM = segments.returns.detach().to("cpu", torch.float64)
        used = live.cpu() & R_PGM.isfinite() & x_PGMF.isfinite().all(dim=-1)
        x_PGMF = torch.where(used.unsqueeze(-1), x_PGMF, 0.0)
        R_PGM = torch.where(used, R_PGM, 0.0)
        self.rows = _FORGETTING * self.rows + used.sum(dim=(0, 1))
        self.gram = _FORGETTING * self.gram + torch.einsum("pgmf,pgme->mfe", x_PGMF, x_PGMF)
        self.moment = _FORGETTING * self.moment + torch.einsum("pgmf,pgm->mf", x_PGMF, R_PGM)

    def coefficients(self) -> torch.Tensor:
        """
        Return the coefficients of each segment, shape (M, F).

        A row holds the weights of r̄_1 … r̄_{M-1} (0 from r̄_j on), of the others' mean, and of 1. It is NaN as long
        as there is not enough data.
        """
        num_budgets, num_features = self.moment.shape
        weights = torch.full_like(self.moment, torch.nan)
        for j in range(num_budgets):
            known = [*range(j), num_features - 2, num_features - 1]
            if self.rows[j] < _ROWS_PER_COEFFICIENT * len(known):
                continue
            gram, moment = self.gram[j][known][:, known], self.moment[j, known]
            ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(known), dtype=gram.dtype)
            weights[j] = 0.0
            weights[j, known] = torch.linalg.solve(gram + ridge, moment)
        return weights

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that has been learned, for a checkpoint."""
        return {"rows": self.rows, "gram": self.gram, "moment": self.moment}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """
        Load the state that `state_dict()` returned.

        Raises:
            `ValueError`: If the state was saved with another number of budgets.
        """
        if state["rows"].shape != self.rows.shape:
            raise ValueError(
                f"The adaptive baseline was saved with {len(state['rows'])} budgets, but there are {len(self.rows)} "
                "now. Resume with the same `budgets`."
            )
        self.rows, self.gram, self.moment = state["rows"], state["gram"], state["moment"]


def leave_one_out_mean(returns: torch.Tensor) -> torch.Tensor:
    """
    Return the mean of the returns over the *other* traces of the group.

    Args:
        returns (`torch.Tensor`):
            Shape (P, G, M), NaN where unknown.

    Returns:
        `torch.Tensor`: shape (P, G, M), 0 where there are no others.
    """
    known = returns.isfinite()
    values = returns.nan_to_num() * known
    others = known.sum(dim=1, keepdim=True) - known.to(returns)
    return torch.where(others > 0, (values.sum(dim=1, keepdim=True) - values) / others.clamp(min=1), 0.0)


def _features(rewards: torch.Tensor, segments: Returns) -> torch.Tensor:
    """
    Return the features, float64 of shape (P, G, M, F), on the CPU.

    Rewards that come after the segment has begun are 0.
    """
    mean_PGM = rewards.nanmean(dim=3).detach().to("cpu", torch.float64)
    num_budgets = mean_PGM.size(2)
    before = torch.ones(num_budgets, num_budgets - 1).tril(-1).bool()  # k < j
    earlier = torch.where(before, mean_PGM[:, :, None, :-1], 0.0)
    others = leave_one_out_mean(segments.returns.detach().to("cpu", torch.float64)).unsqueeze(-1)
    return torch.cat([earlier, others, torch.ones_like(others)], dim=-1)
