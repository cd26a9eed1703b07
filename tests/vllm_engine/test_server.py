"""
A real vLLM server over loopback.

The only thing left out is the transfer of weights, which needs NCCL and so a GPU.
"""

import json

import pytest

from tests.support.ranks import torchrun
from tests.support.servers import LoopbackServer, QuietHandler
from tests.support.servers import serving as in_thread
from tests.support.tiny import make_config, make_model, make_tokenizer
from tests.vllm_engine.servers import serving
from trl_anytime.rollout.vllm_backend import check_server


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


def make_args(tmp_path, url):
    return make_config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=1.0)


# What the check before TRL's says


def test_a_server_that_fits(server, model_dir, tmp_path):
    assert check_server(make_args(tmp_path, server[0]), model_dir) == 128
    assert check_server(make_args(tmp_path, server[0]), "") == 128  # a model made on the spot has no name


def test_the_wrong_model(server, model_dir, tmp_path):
    with pytest.raises(
        ValueError, match=rf"serves '{model_dir}', but the model to be trained is 'some/other'\. Serve"
    ):
        check_server(make_args(tmp_path, server[0]), "some/other")


MODELS = {"data": [{"id": "alias", "root": "some/model", "max_model_len": 64}]}
INFO = {"weight_transfer_config": {"backend": "nccl"}, "cache_config": {"enable_prefix_caching": True}}


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "VLLM_SERVER_DEV_MODE=1"),
        ({**INFO, "weight_transfer_config": None}, "--weight-transfer-config"),
        ({**INFO, "cache_config": {"enable_prefix_caching": False}}, "--enable-prefix-caching"),
        (INFO, None),
    ],
)
def test_a_server_that_lacks_something(tmp_path, info, message):
    """Stands in for servers started otherwise, by what they answer."""

    class Handler(QuietHandler):
        def do_GET(self):
            answer = MODELS if self.path == "/v1/models" else info and {"vllm_config": info}
            self.send(answer, 404 if answer is None else 200)

    with in_thread(LoopbackServer(Handler)) as other:
        args = make_args(tmp_path, other.url)
        if message is None:
            assert check_server(args, "alias") == check_server(args, "some/model") == 64
        else:
            with pytest.raises(ValueError, match=message):
                check_server(args, "some/model")


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
        assert "ConnectionError: The vLLM server at http://127.0.0.1:9 did not answer" in rank["unreachable"]["error"]
        assert rank["unreachable"]["seconds"] < 30


def test_a_context_too_short_is_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert "vLLM's context of 128. Restart the vLLM server" in rank["too long"]["error"]


def test_a_server_that_dies_in_mid_phase_is_an_error_on_every_rank(ranks):
    for rank in ranks:
        assert rank["killed"]["error"].startswith("RuntimeError: The vLLM server failed: ConnectionError")
        assert rank["killed"]["seconds"] < 60
