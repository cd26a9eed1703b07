"""Two processes with gloo: groups that are split across ranks, and rewards that fail on one of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of both ranks, by kind of reward."""
    output_dir = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parent / "two_ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run([*command, str(output_dir)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["fine", "none"])
def test_both_ranks_end_with_the_same_model(ranks, kind):
    first, second = (rank[kind] for rank in ranks)
    assert first["weights"] == second["weights"]
    log = first["log"][0]
    assert log["loss"] != 0 and log["grad_norm"] > 0
    # Rewards of None on one rank: half of the rollouts are left out, on both ranks
    assert log["anytime/unscored_ratio"] == (0.5 if kind == "none" else 0)
    names = [name for name in log if not name.startswith(("time/", "step_time"))]
    assert {name: second["log"][0][name] for name in names} == {name: log[name] for name in names}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("short", "`reward` failed: ValueError: it returned 23 rewards for 24 summaries"),
        ("nan", "`reward` failed: ValueError: it returned nan in row 3, for the prompt"),
        ("raises", "`reward` failed: KeyError: 'no such column'"),
    ],
)
def test_a_reward_that_fails_on_one_rank_is_an_error_on_both(ranks, kind, message):
    for rank in ranks:
        assert message in rank[kind]["error"]
