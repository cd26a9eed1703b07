"""
A real vLLM server over loopback.

The only thing left out is the transfer of weights, which needs NCCL and so a GPU.
"""

import json
import re

import pytest

from tests.support.ranks import torchrun
from tests.support.tiny import make_model, make_tokenizer
from tests.vllm_engine.servers import serving
from trl_anytime.rollout.vllm_server import check_server


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(head_dim=32, num_attention_heads=2).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def server(model_dir, tmp_path_factory):
    """URL and process of a server, started as TRL says."""
    options = ["--model", model_dir, "--max-model-len", "128"]
    options += ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    options += ["--weight-transfer-config", '{"backend": "nccl"}']
    with serving(options, tmp_path_factory.mktemp("server") / "log", VLLM_SERVER_DEV_MODE="1") as running:
        yield running


def test_the_check_before_training(server, model_dir):
    assert check_server(server[0], 1.0, model_dir) == check_server(server[0], 1.0, "") == 128
    with pytest.raises(ValueError, match="some/other"):
        check_server(server[0], 1.0, "some/other")


# Training on two ranks; the last test, as the server does not survive it


@pytest.fixture(scope="module")
def ranks(server, model_dir, tmp_path_factory):
    """The results of both ranks."""
    output_dir = tmp_path_factory.mktemp("ranks")
    url, process = server
    done = torchrun("tests.vllm_engine.server_ranks", model_dir, url, process.pid, output_dir)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output_dir / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_training(ranks):
    log = ranks[0]["log"][0]
    assert log["grad_norm"] > 0
    assert 0 < log["sampling/sampling_logp_difference/mean"] < 1e-4  # float32 on both sides
    assert log["loss"] == ranks[1]["log"][0]["loss"]
    # Prompts and continuations of each. 4 rollouts on each of two ranks are one group: one prompt, then 3 contexts for
    # each. Evaluation: 8 prompts in groups of 8, of which 16 rollouts make a batch, with one summary.
    assert ranks[0]["requests"] == [[1, 8], [8 * 3, 2]] + 4 * [[2, 8], [16 * 3, 1]]
    assert ranks[1]["requests"] == []


def test_a_server_that_is_not_there_is_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert re.search("ConnectionError: .*http://127.0.0.1:9", rank["unreachable"]["error"])
        assert rank["unreachable"]["seconds"] < 30


def test_a_context_too_short_is_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert re.search(r"\b128\b.*`--max-model-len`", rank["too long"]["error"])


def test_a_server_that_dies_in_mid_phase_is_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert rank["killed"]["error"].startswith("RuntimeError: ")
        assert "ConnectionError" in rank["killed"]["error"]
        assert rank["killed"]["seconds"] < 60
