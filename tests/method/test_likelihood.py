"""Rewards by the likelihood of a reference answer, by hand."""

import math

import pytest
import torch

from tests.support.packed import drawing
from trl_anytime.method.likelihood import likelihood_advantages, likelihood_rewards

# One rollout, two budgets: log π = log 1/2 and log 1/8, answers of 1 and 3 tokens, weights 1/4 and 3/4
LOGPROBS = torch.tensor([[math.log(0.5), math.log(0.125)]])
LENGTHS = torch.tensor([[1, 3]])
WEIGHTS = torch.tensor([0.25, 0.75])


@pytest.mark.parametrize(
    ("kind", "rewards", "advantages"),
    [
        ("likelihood", [0.5, 0.125], [0.25 * 0.5, 0.75 * 0.125]),
        ("log_likelihood", [-math.log(2), -math.log(8)], [0.25, 0.75]),
        # log 1/8 over three tokens is log 1/2 per token
        ("mean_log_likelihood", [-math.log(2), -math.log(2)], [0.25, 0.25]),
    ],
)
def test_rewards_and_advantages_by_hand(kind, rewards, advantages):
    actual = likelihood_rewards(kind, LOGPROBS, LENGTHS)
    torch.testing.assert_close(actual, torch.tensor([rewards]))
    torch.testing.assert_close(
        likelihood_advantages(kind, actual, LENGTHS, WEIGHTS), torch.tensor([advantages]), msg=kind
    )


def test_unknown_kinds():
    with pytest.raises(ValueError, match="summary_reward"):
        likelihood_rewards("probability", LOGPROBS, LENGTHS)
    with pytest.raises(ValueError, match="summary_reward"):
        likelihood_advantages("probability", LOGPROBS, LENGTHS, WEIGHTS)


def test_sums_over_the_drawn_summaries():
    # Tokens 0 … 12 with values 2^index: summaries stand at 5; 7, 8; 10; 12, thinking and bridges do not count
    values = 2.0 ** torch.arange(13)[None]
    assert drawing().summary_sums(values).tolist() == [[[2.0**5, 2.0**7 + 2**8], [2.0**10, 2.0**12]]]
    assert drawing().summary_lengths().tolist() == [[[1, 2], [1, 1]]]
