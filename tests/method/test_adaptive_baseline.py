"""The adaptive baseline: what it predicts, from which batches, and that a checkpoint carries it on."""

import pytest
import torch

from tests.support.tiny import make_dataset, tiny_trainer
from trl_anytime.method.adaptive_baseline import _FORGETTING, AdaptiveBaseline, leave_one_out_mean
from trl_anytime.method.advantages import segment_returns

BUDGETS = [10, 20]


def batch(seed: int, num_prompts: int = 64):
    """Rewards (P, 4, 2, 1) whose second one repeats the first with probability 3/4, all segments live."""
    generator = torch.Generator().manual_seed(seed)
    first = (torch.rand(num_prompts, 4, generator=generator) < 0.5).float()
    repeats = torch.rand(num_prompts, 4, generator=generator) < 0.75
    rewards = torch.stack([first, torch.where(repeats, first, 1 - first)], dim=2).unsqueeze(-1)
    return rewards, segment_returns(rewards, BUDGETS, "uniform"), torch.ones(num_prompts, 4, 2).bool()


def fitted(seed: int = 0) -> AdaptiveBaseline:
    adaptive = AdaptiveBaseline(2)
    adaptive.update(*batch(seed))
    return adaptive


def test_leave_one_out_mean():
    # Of 1, 2, 6 the others' means are (2 + 6)/2, (1 + 6)/2, (1 + 2)/2; an unknown return counts for nobody
    returns = torch.tensor([[[1.0], [2.0], [6.0]], [[1.0], [torch.nan], [6.0]]])
    assert leave_one_out_mean(returns).squeeze(-1).tolist() == [[4.0, 3.5, 1.5], [6.0, 3.5, 1.0]]
    assert leave_one_out_mean(torch.ones(2, 1, 3)).tolist() == torch.zeros(2, 1, 3).tolist()  # alone


def test_the_fit_is_least_squares():
    rewards, segments, _ = batch(0)
    weights = fitted().coefficients()
    R = segments.returns.double()
    others = leave_one_out_mean(R)
    for j, earlier in enumerate(([], [rewards.double().mean(dim=3)[..., 0].flatten()])):
        x = torch.stack([*earlier, others[..., j].flatten(), torch.ones(R[..., j].numel()).double()], dim=1)
        expected = torch.linalg.lstsq(x, R[..., j].flatten()).solution.tolist()
        # r̄_1 is not known before the first segment
        assert weights[j].tolist() == pytest.approx([*([0.0] if j == 0 else []), *expected], abs=1e-4)  # ridge


def test_a_prediction_by_hand():
    # The second reward equals the first, in every group two right and two wrong. R_2 = r̄_2 / 2 is 1/2 for a right
    # thinking, whose r̄_1 is 1, and 0 for a wrong one, whose r̄_1 is 0.
    # R_1 is 1 where the others' mean is 1/3, and 0 where it is 2/3: predicted exactly as 2 - 3 · mean.
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 4, 1, 1).expand(30, 4, 2, 1)
    segments = segment_returns(rewards, BUDGETS, "uniform")
    adaptive = AdaptiveBaseline(2)
    adaptive.update(rewards, segments, torch.ones(30, 4, 2).bool())
    assert adaptive.coefficients()[0].tolist() == pytest.approx([0.0, -3.0, 2.0], abs=1e-3)  # ridge
    right, wrong = adaptive.predict(rewards, segments)[0, [0, 2]].tolist()
    assert right == pytest.approx([1.0, 0.5], abs=1e-3) and wrong == pytest.approx([0.0, 0.0], abs=1e-3)


def test_falls_back_to_the_mix_until_there_is_enough_data():
    rewards, segments, live = batch(0, num_prompts=11)
    adaptive = AdaptiveBaseline(2)
    assert torch.equal(adaptive.predict(rewards, segments), segments.brpo)
    adaptive.update(rewards, segments, live)
    # 44 traces: enough for the two coefficients of the first segment (40), not for the three of the second (60)
    predicted = adaptive.predict(rewards, segments)
    assert torch.equal(predicted[..., 1], segments.brpo[..., 1])
    assert not torch.equal(predicted[..., 0], segments.brpo[..., 0])


def test_segments_without_tokens_are_not_learned_from():
    rewards, segments, live = batch(0)
    live[:, :, 1] = False
    adaptive = AdaptiveBaseline(2)
    adaptive.update(rewards, segments, live)
    assert adaptive.rows.tolist() == [256.0, 0.0]
    assert adaptive.coefficients()[1].isnan().all()


def test_the_prediction_does_not_see_its_own_thinking():
    """Neither its return nor its rewards from the segment's end on: the gradient stays unbiased."""
    rewards, segments, _ = batch(1)
    adaptive = fitted()
    before = adaptive.predict(rewards, segments)
    changed = rewards.clone()
    changed[0, 0, 1] = 1 - changed[0, 0, 1]  # at the end of the second segment
    after = adaptive.predict(changed, segment_returns(changed, BUDGETS, "uniform"))
    assert torch.equal(after[0, 0], before[0, 0])
    assert not torch.equal(after[0, 1:], before[0, 1:])  # the others' means do


def test_unknown_rewards_are_left_out():
    rewards, segments, live = batch(0)
    rewards[0, 0, 0] = torch.nan
    segments = segment_returns(rewards, BUDGETS, "uniform")
    adaptive = fitted(1)
    predicted = adaptive.predict(rewards, segments)
    assert predicted[0, 0, 1] == segments.brpo[0, 0, 1]  # a feature is missing
    adaptive.update(rewards, segments, live)
    assert adaptive.coefficients().isfinite().all()


def test_lowest_variance_on_a_fresh_batch():
    adaptive = fitted()
    rewards, segments, _ = batch(1, num_prompts=1000)
    R = segments.returns
    fraction = 1 - adaptive.predict(rewards, segments).sub(R).var(dim=(0, 1)) / R.var(dim=(0, 1))
    # Groups differ by chance only, so nothing is known before the first segment. Before the second, r̄_1 is: the second
    # reward is right with probability 3/4 or 1/4, variance 3/16 in place of 1/4. Chance in 4,000 samples: below 0.05.
    assert fraction.tolist() == pytest.approx([0.0, 0.25], abs=0.05)


def test_earlier_batches_count_less():
    adaptive = fitted()
    assert adaptive.rows[0] == 256
    for _ in range(10):
        adaptive.update(batch(1)[0], batch(1)[1], torch.zeros(64, 4, 2).bool())
    assert adaptive.rows[0] == pytest.approx(128)


def test_state_round_trip():
    adaptive, other = fitted(), AdaptiveBaseline(2)
    other.load_state_dict(adaptive.state_dict())
    rewards, segments, live = batch(1)
    for one in (adaptive, other):
        one.update(rewards, segments, live)
    assert torch.equal(adaptive.coefficients(), other.coefficients())
    with pytest.raises(ValueError, match="2 budgets.* 3 .*`budgets`"):
        AdaptiveBaseline(3).load_state_dict(adaptive.state_dict())


def test_a_batch_is_judged_by_earlier_batches_only(tmp_path, monkeypatch):
    calls = []
    for name in ("predict", "update"):
        method = getattr(AdaptiveBaseline, name)

        def recorded(self, rewards, *args, name=name, method=method):
            calls.append((name, rewards))
            return method(self, rewards, *args)

        monkeypatch.setattr(AdaptiveBaseline, name, recorded)
    trainer = tiny_trainer(tmp_path, baseline="adaptive")
    trainer.train()
    # For the advantages, then for the metrics
    assert [name for name, _ in calls] == ["predict", "predict", "update"] * 2
    assert torch.equal(calls[0][1], calls[2][1]) and torch.equal(calls[3][1], calls[5][1])
    assert any(name.startswith("baseline/variance_ratio/adaptive@") for name in trainer.state.log_history[0])


def test_evaluation_teaches_it_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, baseline="adaptive", eval_budgets=[2, 4])
    trainer.evaluate(make_dataset())
    assert trainer._adaptive_baseline.rows.tolist() == [0.0, 0.0, 0.0]


def test_a_checkpoint_carries_it_on(tmp_path):
    trainer = tiny_trainer(tmp_path, baseline="adaptive", save_strategy="steps", save_steps=1)
    trainer.train()
    learned = torch.load(tmp_path / "checkpoint-2" / "adaptive_baseline.pth", weights_only=True)
    assert learned["rows"][0] > 8  # both batches of eight traces
    resumed = tiny_trainer(tmp_path, baseline="adaptive", max_steps=3, save_strategy="steps")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # One more batch of eight traces, all of which have a first segment
    assert resumed._adaptive_baseline.rows[0] == _FORGETTING * learned["rows"][0] + 8


@pytest.mark.slow
def test_both_ranks_learn_the_same(ranks, tmp_path):
    """Each group is split across the ranks; 32 traces in a batch are enough to predict the third."""
    batch = {"num_generations": 8, "per_device_train_batch_size": 16, "steps_per_generation": 1, "num_iterations": 1}
    run = {"max_steps": 3, "save_strategy": "no", "eval_strategy": "no", "prompts": 16}
    ended = ranks.run("adaptive_baseline", tmp_path, world_size=2, **batch, **run)
    assert [rank.code for rank in ended] == [0, 0], ended[0].output
    learned = ended[0].result
    assert ended[1].result == learned
    # Both ranks' 16 traces count: 32 from each of three batches, the earlier ones a little less
    assert learned["rows"][0] == pytest.approx(32 * (1 + _FORGETTING + _FORGETTING**2))
    assert learned["coefficients"][0][-1] == learned["coefficients"][0][-1]  # not NaN: it has been fitted
