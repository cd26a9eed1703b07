"""Colocate mode on two ranks with gloo: with an engine each, and with one that both share by tensor parallelism."""

import json

import pytest

from tests.support.ranks import torchrun


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_training(tensor_parallel_size, tmp_path):
    done = torchrun("tests.vllm_engine.colocate_ranks", tensor_parallel_size, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["weights"] == second["weights"]
    assert len(first["log"]) == 2
    for log in first["log"]:
        assert log["grad_norm"] > 0
        # Each rank has its own rollouts back, after an update of the weights as well: else the trainer would score
        # other tokens than those that were sampled
        assert log["sampling/sampling_logp_difference/max"] < 1e-3
    # With tensor parallelism each rank runs the requests of both
    if tensor_parallel_size == 2:
        assert first["requested"] == second["requested"]
