"""Runs that are killed and resumed, against runs that are not: bitwise the same logs and weights."""

import re
import signal

import pytest

from trl_anytime.training.checkpoint import manifest

pytestmark = pytest.mark.slow  # processes, or a training of its own

TWO = {"world_size": 2, "per_device_train_batch_size": 2, "num_generations": 4}
KINDS = {
    "one rank": {},
    "two ranks": TWO,
    "LoRA": {"lora": True},
    "GRPO": {"plain": True},
    "GRPO, LoRA": {"plain": True, "lora": True},
    "GRPO, two ranks": {"plain": True, **TWO},
    "LoRA in bfloat16": {"lora": "bfloat16"},
    # An epoch has eight steps: its evaluation and its log are due at a step that is saved
    "epochs": {"eval_strategy": "epoch", "logging_strategy": "epoch", "max_steps": 18},
    "two ranks, epochs": {**TWO, "eval_strategy": "epoch", "max_steps": 10},
}


@pytest.fixture(scope="module")
def straight(ranks, tmp_path_factory):
    """Runs that nothing disturbs, by kind."""
    results = {}

    def run(kind):
        if kind not in results:
            ended = ranks.run("train", tmp_path_factory.mktemp("straight"), **KINDS[kind])
            assert [rank.code for rank in ended] == [0] * len(ended), ended[0].output
            results[kind] = [rank.result for rank in ended]
        return results[kind]

    return run


def assert_continues(ranks, directory, straight, kind):
    """Resume the run in `directory` from its last whole checkpoint and compare its end."""
    ended = ranks.run("train", directory, resume=True, **KINDS[kind])
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].output
    for rank, expected in zip(ended, straight(kind), strict=True):
        assert rank.result["steps"] == expected["steps"]
        assert rank.result["log"] == expected["log"]
        assert rank.result["weights"] == expected["weights"]
    return ended


def test_sigterm_where_nothing_is_saved(ranks, tmp_path):
    ended = ranks.run("terminated", tmp_path, rank=0, place="loss", count=1, save_strategy="no")
    assert ended[0].code == -signal.SIGTERM


def test_killed_and_resumed(ranks, straight, tmp_path):
    """In the third step: its rollouts are those of the first, and the checkpoint holds them."""
    ended = ranks.run("train", tmp_path, kill=("loss", 0, 3))
    assert ended[0].code == -signal.SIGKILL, ended[0].output
    assert_continues(ranks, tmp_path, straight, "one rank")


@pytest.mark.parametrize(
    ("kind", "place", "count"),
    [
        ("one rank", "generation", 5),  # after an evaluation; the second epoch begins with it
        ("one rank", "grading", 2),
        ("one rank", "loss", 12),
        ("one rank", "evaluation", 2),
        ("one rank", "data", 9),  # between two epochs
        ("one rank", "saving", 1),  # no checkpoint is whole yet
        ("one rank", "saving", 8),
        ("epochs", "evaluation", 1),  # behind the last step of an epoch
        ("epochs", "loss", 11),  # the first step of the next
        ("epochs", "evaluation", 5),  # behind the last step, in the middle of an epoch
        ("two ranks, epochs", "evaluation", 1),
        ("LoRA", "loss", 9),
        ("LoRA in bfloat16", "loss", 9),
        ("GRPO", "generation", 5),
        ("GRPO", "grading", 2),
        ("GRPO", "loss", 7),
        ("GRPO", "saving", 8),
        ("GRPO, LoRA", "loss", 9),
        ("GRPO, two ranks", "loss", 10),
        ("two ranks", "grading", 2),
        ("two ranks", "loss", 10),
        ("two ranks", "saving", 6),
    ],
)
def test_killed_at_a_place(ranks, straight, tmp_path, kind, place, count):
    last = KINDS[kind].get("world_size", 1) - 1
    rank = 0 if place == "saving" else last  # which saves
    ended = ranks.run("train", tmp_path, kill=(place, rank, count), **KINDS[kind])
    assert ended[rank].code == -signal.SIGKILL, ended[rank].output
    if (place, count) == ("saving", 1):
        ended = ranks.run("train", tmp_path, resume=True)
        assert "checkpoint-1" in ended[0].output
    else:
        assert_continues(ranks, tmp_path, straight, kind)


@pytest.mark.parametrize(
    "file",
    [
        "checkpoint-6",
        "checkpoint-6/model.safetensors",
        "checkpoint-6/optimizer.pt",
        "checkpoint-6/rank_state_0.pth",
        "checkpoint-6/manifest.new",
    ],
)
def test_killed_while_saving(ranks, straight, tmp_path, file):
    """The kill comes from outside, soon after the file appears: whatever is there then, the run goes on exactly."""
    kill = (0, signal.SIGKILL, str(tmp_path / "out" / file))
    assert ranks.run("train", tmp_path, signals=[kill])[0].code == -signal.SIGKILL
    assert_continues(ranks, tmp_path, straight, "one rank")


def test_killed_again_and_again(ranks, straight, tmp_path):
    """Each run gets a little further, and dies while it saves or soon after."""
    for step in (2, 4, 5, 6, 7):
        kill = (0, signal.SIGKILL, str(tmp_path / "out" / f"checkpoint-{step}"))
        ended = ranks.run("train", tmp_path, resume=True if step > 2 else None, signals=[kill])
        assert ended[0].code == -signal.SIGKILL, ended[0].output
    assert_continues(ranks, tmp_path, straight, "one rank")


@pytest.mark.parametrize(
    ("kind", "rank", "place", "count", "step", "due"),
    [
        ("one rank", 0, "generation", 2, 5, False),
        ("one rank", 0, "evaluation", 1, 6, False),
        ("two ranks", 1, "grading", 3, 6, False),
        ("one rank", 0, "loss", 6, 6, True),
        # The last step, after two losses of an evaluation
        ("one rank", 0, "loss", 12, 10, True),
        ("GRPO", 0, "generation", 2, 5, False),
        ("GRPO, two ranks", 1, "loss", 6, 6, True),
        ("epochs", 0, "loss", 8, 8, True),
        ("epochs", 0, "loss", 5, 5, False),
        ("epochs", 0, "loss", 22, 18, True),
        ("two ranks, epochs", 1, "loss", 8, 8, True),
    ],
)
def test_sigterm_saves_and_exits(ranks, straight, tmp_path, kind, rank, place, count, step, due):
    """An evaluation that is due in such a step is left out, and made up for when the run goes on."""
    ended = ranks.run("terminated", tmp_path, rank=rank, place=place, count=count, **KINDS[kind])
    assert [rank.code for rank in ended] == [0] * len(ended), ended[0].output
    assert [rank.result for rank in ended] == [None] * len(ended)  # it did not go on after training
    last = max(int(path.name.split("-")[1]) for path in (tmp_path / "out").glob("checkpoint-*"))
    assert last == step
    assert manifest(tmp_path / "out" / f"checkpoint-{last}")["settings"]["evaluation_due"] == due
    resumed = assert_continues(ranks, tmp_path, straight, kind)
    assert bool(re.search(rf"[Ee]valuat.*\bstep {last}\b", resumed[0].output)) == due
