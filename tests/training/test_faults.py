"""What goes wrong on one of two ranks ends both, soon, with what went wrong on display."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.ranks import torchrun

pytestmark = pytest.mark.slow  # processes, or a training of its own

TWO = {
    "world_size": 2,
    "per_device_train_batch_size": 2,
    "num_iterations": 1,
    "max_steps": 4,
    "eval_strategy": "no",
    "save_total_limit": 2,
}
# The collectives' own timeout is 1800 s; a loaded machine may need several seconds for what takes two
SOON = 20


@pytest.mark.parametrize(
    ("place", "rank", "plain"),
    [
        ("dataset", 1, False),
        ("train begin", 0, False),
        ("data", 0, False),
        ("generation", 0, False),
        ("generation", 1, False),
        ("grading", 1, False),
        ("loss", 1, False),
        ("backward", 1, False),
        ("saving", 0, False),
        ("generation", 1, True),
        ("backward", 1, True),
    ],
)
def test_a_fault_on_one_rank_ends_both(ranks, tmp_path, place, rank, plain):
    count = 1 if place == "train begin" else 2
    ended = ranks.run("fault", tmp_path, place=place, rank=rank, count=count, plain=plain, **TWO)
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


def test_an_exit_without_a_code_is_a_fault_on_one_rank(ranks, tmp_path):
    """`sys.exit(0)` where a callback, the data or anything else runs: the run is not finished, and says so."""
    ended = ranks.run("exits", tmp_path, place="loss", **{**TWO, "world_size": 1, "per_device_train_batch_size": 4})
    assert ended[0].code == 1
    assert "RuntimeError: " in ended[0].output and "code 0" in ended[0].output
    assert "in leave" in ended[0].output  # where the exit was


@pytest.mark.parametrize("code", [0, None, 3])
def test_an_exit_on_one_rank_ends_both(ranks, tmp_path, code):
    ended = ranks.run("exits", tmp_path, place="loss", rank=1, code=code, **TWO)
    assert [rank.code for rank in ended] == [1, code or 1]
    assert "Rank 1 failed" in ended[0].output and "in leave" in ended[0].output


def test_a_rank_that_is_stopped_in_a_collective_is_ended(ranks, tmp_path):
    """Rank 0 waits for good in a collective of its own, as with NCCL: the watch ends it."""
    ended = ranks.run("fault_while_waiting", tmp_path, world_size=2)
    assert [rank.code for rank in ended] == [1, 1]
    assert "Rank 0" in ended[0].output and "Rank 1" in ended[0].output
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
    assert "checkpoint-3" in resumed[0].output
    assert resumed[0].result["steps"] == 4
    names = {path.name for path in Path(tmp_path / "out").glob("checkpoint-*")}
    assert names == {"checkpoint-3", "checkpoint-4"}  # `save_total_limit` counts whole ones


def test_log_probabilities_that_are_nan(ranks, tmp_path):
    # Rollouts without any advantage would not be computed
    ended = ranks.run("weights_become_nan", tmp_path, step=1, save_strategy="no", prune=False)
    assert ended[0].code == 1
    assert re.search(r"FloatingPointError: .*\bStep 1\b.*log-probabilities.*\b4 of 4\b", ended[0].output)
    assert "['<|im_start|> user" in ended[0].output


@pytest.mark.parametrize("plain", [False, True])
def test_a_loss_that_is_nan(ranks, tmp_path, plain):
    ended = ranks.run("loss_becomes_nan", tmp_path, save_strategy="no", plain=plain)
    assert ended[0].code == 1
    assert re.search(r"FloatingPointError: .*\bStep 0\b.*\bloss\b.*\b4 rollouts\b", ended[0].output)
    assert "<|im_start|> user" not in ended[0].output  # which of the prompts it was is not known


# BRPO scores a micro-batch at a time, GRPO a generation batch
@pytest.mark.parametrize(("kind", "scored"), [({}, 4), ({"by_prefix": True}, 4), ({"plain": True}, 8)])
def test_nan_that_meets_sampling_first(ranks, tmp_path, kind, scored):
    """All ways to generate with transformers; on a GPU `multinomial` itself would end in an assertion."""
    ended = ranks.run("train", tmp_path, nan_weights=True, save_strategy="no", **kind)
    assert ended[0].code == 1
    output = ended[0].output
    assert re.search(rf"FloatingPointError: .*\bStep 0\b.*log-probabilities.*\b{scored} of {scored}\b", output)
    assert "['<|im_start|> user" in output


@pytest.mark.parametrize(("world_size", "plain"), [(1, False), (2, False), (2, True)])
def test_a_gradient_that_is_nan(ranks, tmp_path, world_size, plain):
    settings = {"world_size": world_size, "save_strategy": "no", "max_steps": 3, "logging_steps": 1, "plain": plain}
    settings |= {"per_device_train_batch_size": 4 // world_size}
    ended = ranks.run("gradient_becomes_nan", tmp_path, count=2, **settings)
    assert [rank.code for rank in ended] == [1] * world_size
    fault = r"FloatingPointError: .*\bStep 1\b.*\bgradient\b.*\bnan\b"
    assert all(re.search(fault, rank.output) for rank in ended)

    ended = ranks.run("gradient_becomes_nan", tmp_path, count=2, on_nonfinite="skip", **settings)
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].output
    for rank in ended:
        logs = [entry for entry in rank.result["log"] if "loss" in entry]
        assert [entry["nonfinite/skipped_ratio"] for entry in logs] == [0, 1, 0]
        assert all(weight == weight for weight in rank.result["weights"])
        assert rank.result["weights"] == ended[0].result["weights"]


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        (
            "generation",
            ["per_device_train_batch_size", "vllm_gpu_memory_utilization", "max_completion_length", "budgets[-1]"],
        ),
        ("loss", ["per_device_train_batch_size", "gradient_checkpointing", "max_completion_length", "budgets[-1]"]),
    ],
)
def test_out_of_memory_says_what_helps(ranks, tmp_path, place, settings):
    ended = ranks.run("out_of_memory", tmp_path, place=place, save_strategy="no", plain=True)
    assert ended[0].code == 1 and "can't allocate memory" in ended[0].output
    assert all(f"`{setting}" in ended[0].output for setting in settings)
    assert ended[0].output.count("`per_device_train_batch_size`") == 1  # the advice of one phase


def test_soak_for_sixty_steps(tmp_path):
    """The benchmark itself, in short: nothing grows, no process is left."""
    command = [sys.executable, "-m", "benchmarks.soak", str(tmp_path), "--steps", "60", "--every", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["flat"] and summary["step"] == 60 and summary["checkpoints"] == 2
    assert summary["killed"] >= 5 and summary["timeout"] >= 2


@pytest.mark.parametrize("plain", [False, True])
def test_a_reward_model_that_returns_nan(ranks, tmp_path, plain):
    settings = {"save_strategy": "no", "per_device_train_batch_size": 4, "plain": plain}
    ended = ranks.run("reward_model", tmp_path, world_size=2, **settings)
    for rank in ended:
        assert rank.code == 1
        assert re.search(r"FloatingPointError: .*\bStep 0\b.*`spoilt`.*\bnan\b", rank.output)
        assert "'role': 'user'" in rank.output  # the prompt


@pytest.mark.parametrize("plain", [False, True])
def test_a_reward_that_exits_on_one_rank(ranks, tmp_path, plain):
    for rank in ranks.run("exiting_reward", tmp_path, plain=plain, **TWO):
        assert rank.code == 1
        assert re.search(r"ValueError: .*\bStep 0\b.*`leaves`.*sys\.exit\(0\)", rank.output)


def test_an_exception_under_torchrun(tmp_path):
    """As users start it: the launcher must not wait either."""
    fault = {"place": "backward", "save_strategy": "no", "per_device_train_batch_size": 2}
    began = time.monotonic()
    done = torchrun("tests.support.scenarios", "fault", tmp_path, json.dumps(fault), limit=100)
    assert done.returncode == 1
    assert "Planned: in backward of rank 1" in done.stderr  # torchrun may end rank 0 before it can say so, too
    assert time.monotonic() - began < 60
