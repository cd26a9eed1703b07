"""What goes wrong on one of two ranks ends both, soon, with what went wrong on display."""

import signal
from pathlib import Path

import pytest

TWO = {"world_size": 2, "per_device_train_batch_size": 2, "max_steps": 4, "eval_strategy": "no", "save_total_limit": 2}
# The collectives' own timeout is 1800 s; a loaded machine may need several seconds for what takes two
SOON = 20


@pytest.mark.parametrize(
    ("place", "rank"),
    [
        ("dataset", 1),
        ("data", 0),
        ("generation", 0),
        ("generation", 1),
        ("grading", 1),
        ("loss", 1),
        ("backward", 1),
        ("saving", 0),
    ],
)
def test_a_fault_on_one_rank_ends_both(ranks, tmp_path, place, rank):
    ended = ranks.run("fault", tmp_path, place=place, rank=rank, count=2, **TWO)
    assert [rank.code for rank in ended] == [1, 1]
    for one in ended:
        assert f"Planned: in {place} of rank {rank}" in one.output
    failed = float((tmp_path / "failed_at").read_text())
    ended_at = max((tmp_path / f"output_{rank}.txt").stat().st_mtime for rank in range(2))
    print(f"{place} of rank {rank}: {ended_at - failed:.1f} s")
    assert ended_at - failed < SOON


def test_a_rank_that_is_killed_ends_the_other(ranks, tmp_path):
    ended = ranks.run("train", tmp_path, kill=("loss", 1, 2), **TWO)
    assert ended[1].code == -signal.SIGKILL and ended[0].code == 1
    assert ended[0].seconds - ended[1].seconds < SOON


def test_a_rank_that_is_stopped_in_a_collective_is_ended(ranks, tmp_path):
    """Rank 0 waits for good in a collective of its own, as with NCCL: the watch ends it."""
    ended = ranks.run("fault_while_waiting", tmp_path, world_size=2)
    assert [rank.code for rank in ended] == [1, 1]
    assert "Rank 0 ends, because another one failed. Rank 1 failed" in ended[0].output
    assert "Planned: while rank 0 waits" in ended[0].output


@pytest.mark.parametrize("world_size", [1, 2])
def test_full_disk(ranks, tmp_path, world_size):
    """Writing fails at the third checkpoint: the second is whole, and the third is known not to be."""
    settings = {**TWO, "world_size": world_size, "per_device_train_batch_size": 4 // world_size}
    ended = ranks.run("full_disk", tmp_path, step=3, size=20_000, **settings)
    assert [rank.code for rank in ended] == [1] * world_size
    assert all("File too large" in rank.output for rank in ended)
    resumed = ranks.run("train", tmp_path, resume=True, **settings)
    assert [rank.code for rank in resumed] == [0] * world_size, resumed[0].output
    assert "checkpoint-3 is unfinished: the run ended while saving it." in resumed[0].output
    assert resumed[0].result["steps"] == 4
    names = {path.name for path in Path(tmp_path / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-3", "checkpoint-4"}  # `save_total_limit` counts whole ones
