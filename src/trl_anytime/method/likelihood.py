"""
Rewards without sampled summaries: the policy's own likelihood of a reference answer at each cut.

With a reference answer y*, the reward at budget j is π = π(y* | x, z_{≤ b_j}, bridge), or its logarithm. Sampled
summaries estimate π by the share of them that equal y*. Here there is no such noise. The gradient has a part by the
thinking, which [`~trl_anytime.method.advantages.thinking_advantages`] weighs as ever, and a part by the answer's own
tokens:

    ∇ Σ_j P_j π_j = Σ_j P_j π_j ∇log π_j        ∇ Σ_j P_j log π_j = Σ_j P_j ∇log π_j

Sources: VeriFree, https://huggingface.co/papers/2505.21493, for the likelihood at the end of the thinking;
https://huggingface.co/papers/2602.03979 for its logarithm. Both at every cut: this package.

Dimensions: N rollouts, M budgets.
"""

import torch

SUMMARY_REWARDS = ("likelihood", "log_likelihood", "mean_log_likelihood")


def _check_kind(kind: str) -> None:
    if kind not in SUMMARY_REWARDS:
        raise ValueError(f"`summary_reward` must be one of {SUMMARY_REWARDS}, got {kind!r}.")


def likelihood_rewards(kind: str, logprobs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Return the reward at each cut.

    Args:
        kind (`str`):
            `"likelihood"` (π), `"log_likelihood"` (log π) or `"mean_log_likelihood"` (log π per token).
        logprobs (`torch.Tensor`):
            Shape (N, M), log π: the sum over the answer's tokens.
        lengths (`torch.Tensor`):
            Shape (N, M), tokens of the answer, at least 1.

    Returns:
        `torch.Tensor`: shape (N, M).

    Raises:
        `ValueError`: If `kind` is unknown.
    """
    _check_kind(kind)
    if kind == "likelihood":
        return logprobs.exp()
    return logprobs / lengths if kind == "mean_log_likelihood" else logprobs


def likelihood_advantages(
    kind: str, rewards: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """
    Return the advantage of an answer's tokens: the derivative of its weighted reward by log π.

    Args:
        kind (`str`):
            See [`likelihood_rewards`].
        rewards (`torch.Tensor`):
            Shape (N, M), see [`likelihood_rewards`].
        lengths (`torch.Tensor`):
            Shape (N, M), tokens of the answer.
        weights (`torch.Tensor`):
            Shape (M,), what the answer counts at each budget: P_j for the objective's own gradient, 0 to train the
            thinking alone.

    Returns:
        `torch.Tensor`: shape (N, M): w_j π, w_j or w_j / |y*|.

    Raises:
        `ValueError`: If `kind` is unknown.
    """
    _check_kind(kind)
    if kind == "likelihood":
        return weights * rewards
    return (weights / lengths if kind == "mean_log_likelihood" else weights.expand_as(rewards)).to(rewards)
