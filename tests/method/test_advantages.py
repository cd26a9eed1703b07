import json
import math

import pytest
import torch

from tests.support import DATA
from trl_anytime.method.advantages import (
    baseline_diagnostics,
    segment_returns,
    summary_advantages,
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
        (lambda r: thinking_advantages(r, [1, 2], "uniform", "mean"), "`baseline` must be one of"),
        (lambda r: thinking_advantages(r, [1, 2], "uniform", progress_decay=0.0), "`progress_decay` must lie"),
        (lambda r: thinking_advantages(r, [1, 2, 3], "uniform"), r"shape \(P, G, M, A\) with M = 3"),
        (lambda r: summary_advantages(r, torch.ones(1, 1, 2), "coupled"), "`summary_policy` must be one of"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 2, 1))
