"""Two processes with gloo: the same as one, groups that are split across ranks, uneven data, rewards that fail."""

import re

import pytest

pytestmark = pytest.mark.slow  # processes, or a training of its own

# 4 rollouts per rank and groups of 8: each group is split across both ranks
SPLIT = {"world_size": 2, "num_generations": 8, "prompts": 8, "steps_per_generation": 1, "num_iterations": 1}
SPLIT |= {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no"}


@pytest.mark.parametrize("kind", ["fine", "none"])
def test_both_ranks_end_with_the_same_model(ranks, tmp_path, kind):
    ended = ranks.run("rewards_on_rank_1", tmp_path, kind=kind, **SPLIT)
    assert [rank.code for rank in ended] == [0, 0], ended[0].output
    first, second = (rank.result for rank in ended)
    assert first["weights"] == second["weights"]
    log = first["log"][0]
    assert log["loss"] != 0 and log["grad_norm"] > 0
    # Rewards of None on one rank: half of the rollouts are left out, on both ranks
    assert log["anytime/unscored_ratio"] == (0.5 if kind == "none" else 0)
    assert second["log"][0] == log


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", r"`reward`.*ValueError.*\b23\b.*\b24\b"),
        ("nan", r"`reward`.*ValueError.*\bnan\b.*\b3\b"),
        ("raises", "`reward`.*KeyError: 'no such column'"),
    ],
)
def test_a_reward_that_fails_on_one_rank_is_an_error_on_both(ranks, tmp_path, kind, message):
    for rank in ranks.run("rewards_on_rank_1", tmp_path, kind=kind, **SPLIT):
        assert re.search(message, rank.result["error"]), rank.output


# Means over micro-batches, which are dealt out by length on each rank: the same only if there is one per step
OF_MICRO_BATCHES = ("entropy", "clip_ratio/")


@pytest.mark.parametrize("num_generations", [4, 8], ids=["whole groups", "groups split across ranks"])
@pytest.mark.parametrize(
    ("micro_batches", "method"),
    [
        (1, {}),
        (2, {}),
        (1, {"plain": True, "loss_type": "dapo"}),
        (2, {"plain": True, "loss_type": "grpo", "mask_truncated_completions": True}),
    ],
    ids=["BRPO", "BRPO, two micro-batches", "GRPO by tokens", "GRPO, truncated masked, two micro-batches"],
)
def test_two_ranks_do_what_one_does(ranks, tmp_path, num_generations, micro_batches, method):
    settings = {
        **method,
        "num_generations": num_generations,
        "steps_per_generation": micro_batches,
        "gradient_accumulation_steps": micro_batches,
    }
    one, two = (
        {"per_device_train_batch_size": size, "per_device_eval_batch_size": size, **settings} for size in (8, 4)
    )
    alone = ranks.run("equality", tmp_path / "one", **one)[0]
    assert alone.code == 0, alone.output
    recorded = str(tmp_path / "one" / "rollouts.json")
    together = ranks.run("equality", tmp_path / "two", world_size=2, replay=recorded, **two)
    for rank in together:
        assert rank.code == 0, rank.output
        assert len(rank.result["gradients"]) == 4
        for gradient, expected in zip(rank.result["gradients"], alone.result["gradients"], strict=True):
            assert max(map(abs, expected)) > 1e-2
            assert gradient == pytest.approx(expected, abs=1e-6)  # float32 sums in another order
        assert rank.result["weights"] == pytest.approx(alone.result["weights"], abs=1e-6)
        for entry, expected in zip(rank.result["log"], alone.result["log"], strict=True):
            assert entry.keys() == expected.keys()
            for name, value in expected.items():
                if micro_batches == 1 or name.startswith("eval_") or not name.startswith(OF_MICRO_BATCHES):
                    assert entry[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name
    evaluations = [entry for entry in alone.result["log"] if "eval_loss" in entry]
    assert len(evaluations) == 2


def test_ranks_with_nothing_in_common(ranks, tmp_path):
    both = ranks.run(
        "uneven", tmp_path, world_size=2, num_generations=8, save_strategy="no", max_steps=4, logging_steps=1
    )
    assert [rank.code for rank in both] == [0, 0], both[0].output + both[1].output
    assert both[0].result == both[1].result
    log = both[0].result["log"][0]
    assert log["thinking/finished_ratio"] == 0.5
    assert (log["rank_0"], log["rank_1"], log["anytime/unscored_ratio"]) == (1, 2, 0)
    assert log["grad_norm"] > 0
