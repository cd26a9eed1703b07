import json
import math

import pytest
import torch

from tests.support import DATA
from trl_anytime.method.advantages import (
    baseline_diagnostics,
    segment_returns,
    summary_advantages,
    summary_weights,
    thinking_advantages,
)
from trl_anytime.method.budgets import thinking_cuts
from trl_anytime.method.packing import PackedRollouts

CASES = json.loads((DATA / "advantages.json").read_text())
BASELINES = {"brpo": "brpo", "v1only": "v1", "v2only": "v2", "none": "none"}
POLICIES = {"brpo": "decoupled", "grpo": "final"}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_released_implementation(case):
    """All check vectors, rounded to 7 digits there."""
    P, G, M, A = case["num_prompts"], case["num_generations"], len(case["budgets"]), case["num_summaries"]
    rewards = torch.tensor(case["rewards"]).view(P, G, M, A)
    lengths = torch.tensor(case["thinking_lengths"]).view(P, G)
    live = torch.tensor(case["segment_exists"]).bool()
    cuts = thinking_cuts(lengths, case["budgets"])

    segments = segment_returns(rewards, case["budgets"], case["prior"])
    thinking = thinking_advantages(rewards, case["budgets"], case["prior"], BASELINES[case["baseline"]])
    summary = summary_advantages(rewards, cuts, POLICIES[case["summary_method"]])

    def check(actual, expected):
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)

    check(segments.returns.reshape(P * G, M), torch.tensor(case["returns"]))
    check(segments.v1.reshape(P * G, M), torch.tensor(case["v1"]))
    check(segments.v2.reshape(P * G, M), torch.tensor(case["v2"]))
    check(thinking.reshape(P * G, M)[live], torch.tensor(case["thinking_advantages"])[live])
    check(summary.reshape(P * G, M, A), torch.tensor(case["summary_advantages"]))

    # Spread over the tokens: spans are (segment start, cut, branch start, summary start, branch end)
    spans = torch.tensor(case["spans"])
    token_ids = torch.zeros(P * G, int(spans.max()), dtype=torch.long)
    packed = PackedRollouts(token_ids, cuts.view(P * G, M), spans[..., 2:])
    per_token = packed.token_advantages(thinking.reshape(P * G, M), summary.reshape(P * G, M, A), case["budgets"])
    assert packed.trained().sum(1).tolist() == case["trainable_tokens"]
    # Sums of hundreds of float32 terms that were rounded to 7 digits
    torch.testing.assert_close(per_token.sum(1), torch.tensor(case["token_advantages_sum"]), atol=2e-3, rtol=1e-5)


def test_thinking_advantages_by_hand():
    # Two traces, uneven budgets 1, 3, 4, uniform prior, one summary: rewards 0 1 1 and 0 0 1, weights 1/3 each.
    # R of the first: 2/3 2/3 1/3, of the second: 1/3 1/3 1/3; V2 = their mean: 1/2 1/2 1/3.
    # V1 of the first: 0; 0 · 2/3 = 0; (0.5² · 0 + 0.5 · 1) / 0.75 · 1/3 = 2/9. V1 of the second: 0; 0; 0.
    # V = b_{j-1}/b_m V1 + (1 - b_{j-1}/b_m) V2 with b_{j-1}/b_m = 0, 1/4, 3/4:
    # first: 1/2; 3/8; 3/4 · 2/9 + 1/4 · 1/3 = 1/4. Second: 1/2; 3/8; 1/12.
    rewards = torch.tensor([[0.0, 1, 1], [0, 0, 1]]).view(1, 2, 3, 1)
    expected = {
        "brpo": [[2 / 3 - 1 / 2, 2 / 3 - 3 / 8, 1 / 3 - 1 / 4], [1 / 3 - 1 / 2, 1 / 3 - 3 / 8, 1 / 3 - 1 / 12]],
        "v1": [[2 / 3, 2 / 3, 1 / 3 - 2 / 9], [1 / 3, 1 / 3, 1 / 3]],
        "v2": [[2 / 3 - 1 / 2, 2 / 3 - 1 / 2, 0], [1 / 3 - 1 / 2, 1 / 3 - 1 / 2, 0]],
        "none": [[2 / 3, 2 / 3, 1 / 3], [1 / 3, 1 / 3, 1 / 3]],
    }
    for baseline, advantages in expected.items():
        actual = thinking_advantages(rewards, [1, 3, 4], "uniform", baseline)
        torch.testing.assert_close(actual, torch.tensor([advantages]), msg=baseline)


def test_a_budget_of_0_is_the_progress_so_far_of_the_first_segment():
    # Two traces, budgets 0, 2, 4, weights 0, 1/2, 1/2, one summary: rewards 1 0 1 and 0 0 1.
    # R of the first and of the second: 1/2 (0 + 1) for the segment up to 2, 1/2 for the one up to 4; V2 is the same.
    # V1 of the first: r_1 · 1 = 1; (0.5² · 1 + 0.5 · 0) / 0.75 · 1/2 = 1/6. V1 of the second: 0; 0.
    rewards = torch.tensor([[1.0, 0, 1], [0, 0, 1]]).view(1, 2, 3, 1)
    segments = segment_returns(rewards, [0, 2, 4], [0, 1, 1])
    torch.testing.assert_close(segments.returns[0, :, 1:], torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
    torch.testing.assert_close(segments.v1[0, :, 1:], torch.tensor([[1, 1 / 6], [0, 0]]))
    # b_{j-1} / b_m = 0 and 1/2
    torch.testing.assert_close(segments.brpo[0, :, 1:], torch.tensor([[0.5, 1 / 12 + 1 / 4], [0.5, 1 / 4]]))


def test_progress_decay_by_hand():
    # Third segment, rewards 1, 0 before it: (λ² · 1 + λ · 0) / (λ² + λ) = λ / (1 + λ), times Σ_{k≥3} P_k = 1/2
    rewards = torch.tensor([1.0, 0, 0]).view(1, 1, 3, 1)
    for decay in (0.25, 0.5, 1.0):
        v1 = segment_returns(rewards, [1, 2, 3], [1, 1, 2], decay).v1[0, 0]
        torch.testing.assert_close(v1, torch.tensor([0.0, 0.75, decay / (1 + decay) / 2]))


def test_a_group_of_one_has_no_group_mean():
    rewards = torch.ones(2, 1, 2, 3)
    assert segment_returns(rewards, [1, 2], "uniform").v2.abs().max() == 0


def test_summary_advantages_by_hand():
    # A trace of 5 tokens, budgets 3, 6, 9: cut at 3, then the shared cut at 5
    cuts = torch.tensor([[[3, 5, 5]]])
    rewards = torch.tensor([[[[1.0, 0], [1, 1], [0, 1]]]])
    # Cut 3: mean 1/2. Cut 5: mean of 1 1 0 1 = 3/4
    expected = torch.tensor([[[[0.5, -0.5], [0.25, 0.25], [-0.75, 0.25]]]])
    torch.testing.assert_close(summary_advantages(rewards, cuts), expected)
    final = torch.zeros_like(expected)
    final[0, 0, 2, 1] = 0.25
    torch.testing.assert_close(summary_advantages(rewards, cuts, "final"), final)


def test_summary_weights_by_hand():
    # Priors of budgets 1 and 3: uniform 1/2 1/2, linear 1/4 3/4, base 0 1; divided by A = 2
    expected = {"uniform": [1 / 4, 1 / 4], "linear": [1 / 8, 3 / 8], "base": [0, 1 / 2]}
    for prior, weights in expected.items():
        torch.testing.assert_close(summary_weights("objective", [1, 3], prior, 2), torch.tensor(weights))
    assert summary_weights(0.25, [1, 3], "linear", 2).tolist() == [0.25, 0.25]

    # Cut 1: mean 1/2; cut 3: mean 1/4. Times 1/8 and 3/8
    rewards = torch.tensor([[[[1.0, 0], [0.5, 0]]]])
    advantages = summary_advantages(rewards, torch.tensor([[[1, 3]]]), weights=torch.tensor(expected["linear"]))
    torch.testing.assert_close(advantages, torch.tensor([[[[1 / 16, -1 / 16], [3 / 32, -3 / 32]]]]))
    last = summary_advantages(rewards, torch.tensor([[[1, 3]]]), "final", torch.tensor(expected["linear"]))
    torch.testing.assert_close(last, torch.tensor([[[[0, 0], [0, -3 / 32]]]]))


class Enumerable:
    """
    A policy of two thinking tokens and one-token answers, all of whose groups can be listed.

    Budgets 1 and 2, so that no two budgets share a cut. `thought` holds the logits of both thinking tokens,
    `answers[j]` those of the answer at budget j after each prefix.
    """

    budgets = (1, 2)
    prior = (1.0, 3.0)

    def __init__(self, num_summaries):
        generator = torch.Generator().manual_seed(0)

        def logits(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        self.parameters = [logits(2), logits(2, 2), logits(2, 2), logits(4, 2)]
        self.rewards = [torch.rand((rows, 2), generator=generator, dtype=torch.float64) for rows in (2, 4)]
        sizes = [2, 2] + [2] * (2 * num_summaries)
        one = torch.cartesian_prod(*(torch.arange(size) for size in sizes))  # (outcomes, tokens) of one trace
        prefixes = torch.stack([one[:, 0], one[:, 0] * 2 + one[:, 1]], dim=1)
        answers = one[:, 2:].view(-1, 2, num_summaries)
        first, second, *tables = (x.log_softmax(-1) for x in self.parameters)
        self.thought = torch.stack([first[one[:, 0]], second[one[:, 0], one[:, 1]]], dim=1)  # log π of each token
        self.answer = torch.stack([tables[j][prefixes[:, j, None], answers[:, j]] for j in range(2)], dim=1)
        self.scores = torch.stack([self.rewards[j][prefixes[:, j, None], answers[:, j]] for j in range(2)], dim=1)

    def gradient_of_objective(self):
        weights = torch.tensor(self.prior) / sum(self.prior)
        one = self.thought[:, 0].exp() * self.thought[:, 1].exp() * self.answer.exp().flatten(1).prod(1)
        objective = (one * (self.scores.mean(2) * weights).sum(1)).sum()
        return torch.cat([x.flatten() for x in torch.autograd.grad(objective, self.parameters, retain_graph=True)])

    def expected_gradient(self, baseline, weight):
        """Of the loss on a group of two: Σ over all pairs of outcomes of probability · Σ A ∇log π."""
        num, num_summaries = len(self.scores), self.scores.size(2)
        pairs = torch.cartesian_prod(torch.arange(num), torch.arange(num))  # (P, G)
        thinking = thinking_advantages(self.scores[pairs], self.budgets, self.prior, baseline)
        cuts = torch.tensor(self.budgets).expand(len(pairs), 2, 2)
        weights = summary_weights(weight, self.budgets, self.prior, num_summaries)
        summary = summary_advantages(self.scores[pairs], cuts, weights=weights)
        log_thought, log_answer = self.thought[pairs], self.answer[pairs]
        probability = (log_thought.sum((1, 2)) + log_answer.sum((1, 2, 3))).exp().detach()
        per_group = (thinking * log_thought).sum((1, 2)) + (summary * log_answer).sum((1, 2, 3))
        loss = (probability * per_group).sum() / 2  # a mean over the group's traces
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, self.parameters, retain_graph=True)])


@pytest.mark.parametrize("num_summaries", [1, 2])
def test_expected_gradient_of_an_enumerable_policy(num_summaries):
    """
    With the objective's weights, thinking and summaries follow the gradient of J; with the released ones they do not.

    A mean over n rewards that holds the own one leaves 1 - 1/n of the gradient. The group's mean does so for the
    thinking, G = 2; for the summaries that of the group (A = 1) or of the cut (A = 2): 1/2 in all cases.
    """
    policy = Enumerable(num_summaries)
    exact = policy.gradient_of_objective()
    torch.testing.assert_close(policy.expected_gradient("v2", "objective"), exact / 2, atol=1e-6, rtol=0)

    released = policy.expected_gradient("v2", 1.0)
    thinking = slice(6)  # the logits of the thinking tokens come first
    torch.testing.assert_close(released[thinking], exact[thinking] / 2, atol=1e-6, rtol=0)
    # Weight 1 in place of P_j / A, with P = 1/4, 3/4
    factors = torch.tensor([4.0] * 4 + [4 / 3] * 8).double() * num_summaries
    torch.testing.assert_close(released[6:], exact[6:] / 2 * factors, atol=1e-6, rtol=0)
    assert torch.cosine_similarity(released, exact, dim=0) < 0.95

    # Without the own trace in the thinking's baseline, its gradient is whole
    for baseline in ("none", "v1"):
        gradient = policy.expected_gradient(baseline, "objective")
        torch.testing.assert_close(gradient[thinking], exact[thinking], atol=1e-6, rtol=0)


def test_a_single_summary_is_compared_with_the_group():
    # One budget, rewards 1 and 0: the group's mean is 1/2, whatever the cuts
    rewards = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    advantages = summary_advantages(rewards, torch.tensor([[[3], [4]]]))
    torch.testing.assert_close(advantages.flatten(), torch.tensor([0.5, -0.5]))


def test_unscored_summaries_are_left_out():
    nan = math.nan
    rewards = torch.tensor([[[1.0, nan], [1.0, 0.0]], [[nan, nan], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])[None]
    budgets = [2, 4]
    advantages = thinking_advantages(rewards, budgets, "uniform", "v2")
    # R: first 1/2 + 1/4 = 3/4, then 1/4; second unknown, then 1/2; third 0, 0. Means of the known: 3/8 and 1/4
    torch.testing.assert_close(
        advantages, torch.tensor([[[3 / 8, 0.0], [nan, 1 / 4], [-3 / 8, -1 / 4]]]), equal_nan=True
    )
    # A budget without weight is not missed
    base = thinking_advantages(rewards, budgets, "base", "v2")
    torch.testing.assert_close(base, torch.tensor([[[0.0, 0.0], [0.5, 0.5], [-0.5, -0.5]]]))
    cuts = torch.tensor([[[2, 4]] * 3])
    summary = summary_advantages(rewards, cuts)
    torch.testing.assert_close(summary[0, 0], torch.tensor([[0.0, nan], [0.5, -0.5]]), equal_nan=True)


def test_equal_rewards_give_no_advantage_over_the_group():
    for value in (0.0, 1.0):
        rewards = torch.full((2, 4, 3, 2), value)
        assert thinking_advantages(rewards, [1, 2, 3], "linear", "v2").abs().max() < 1e-6
        assert summary_advantages(rewards, torch.ones(2, 4, 3, dtype=torch.long)).abs().max() == 0


def test_diagnostics_by_hand():
    # Two prompts of two traces, one budget. R = 1, 0, 1, 1; V2 = 1/2, 1/2, 1, 1.
    # Var[R] = 3/16. R - V2 = 1/2, -1/2, 0, 0: variance 1/8, ratio 2/3. Cov[V2, R] = 1/16 = Var[V2]: Corr = √(1/3).
    rewards = torch.tensor([1.0, 0, 1, 1]).view(2, 2, 1, 1)
    segments = segment_returns(rewards, [4], "uniform")
    diagnostics = baseline_diagnostics(segments, torch.ones(2, 2, 1, dtype=torch.bool))
    assert diagnostics["variance_ratio"]["v2"].item() == pytest.approx(2 / 3)
    assert diagnostics["variance_ratio"]["v1"].item() == pytest.approx(1)  # V1 is 0 in the first segment
    assert diagnostics["correlation"]["v2"].item() == pytest.approx(math.sqrt(1 / 3))
    assert math.isnan(diagnostics["correlation"]["v1"].item())


def test_diagnostics_look_at_live_segments_only():
    rewards = torch.tensor([1.0, 0, 1, 0]).view(2, 2, 1, 1)
    live = torch.tensor([True, True, True, False]).view(2, 2, 1)
    segments = segment_returns(rewards, [4], "uniform")
    # R = 1, 0, 1: variance 2/9. R - V2 = 1/2, -1/2, 1/2: variance 2/9
    assert baseline_diagnostics(segments, live)["variance_ratio"]["v2"].item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: thinking_advantages(r, [1, 2], "uniform", "mean"), "`baseline`.*'brpo'.*'mean'"),
        (lambda r: thinking_advantages(r, [1, 2], "uniform", progress_decay=0.0), r"`progress_decay`.*\b0\.0"),
        (lambda r: thinking_advantages(r, [1, 2, 3], "uniform"), r"\(P, G, M, A\).*\b3\b"),
        (lambda r: summary_advantages(r, torch.ones(1, 1, 2), "coupled"), "`summary_policy`.*'decoupled'.*'coupled'"),
        (lambda r: summary_weights("J", [1, 2], "uniform", 1), "`summary_weight`"),
        (lambda r: summary_weights(-0.1, [1, 2], "uniform", 1), "`summary_weight`"),
        (lambda r: summary_weights(math.nan, [1, 2], "uniform", 1), "`summary_weight`"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 2, 1))
