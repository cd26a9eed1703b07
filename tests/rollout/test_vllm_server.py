"""The check of TRL's vLLM server, on servers that say what vLLM's would. Real ones are in `make test-vllm`."""

import json

import pytest

from tests.support.servers import listening
from tests.support.tiny import make_config
from trl_anytime.rollout.vllm_server import check_server, server_url

MODELS = {"data": [{"id": "alias", "root": "some/model", "max_model_len": 64}]}
INFO = {"weight_transfer_config": {"backend": "nccl"}, "cache_config": {"enable_prefix_caching": True}}


def saying(info):
    """A server that says this about itself, or has no development endpoints."""

    def answer(handler):
        said = MODELS if handler.path == "/v1/models" else info and {"vllm_config": info}
        handler.send(json.dumps(said).encode(), 404 if said is None else 200)

    return listening(answer)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (None, "VLLM_SERVER_DEV_MODE=1"),
        ({**INFO, "weight_transfer_config": None}, "--weight-transfer-config"),
        ({**INFO, "cache_config": {"enable_prefix_caching": False}}, "--enable-prefix-caching"),
    ],
)
def test_a_server_that_lacks_something(info, message):
    with saying(info) as (url, _), pytest.raises(ValueError, match=message):
        check_server(url, 1.0, "some/model")


@pytest.mark.parametrize("name", ["alias", "some/model", ""])  # a model made on the spot has no name
def test_a_server_that_fits(name):
    with saying(INFO) as (url, _):
        assert check_server(url, 1.0, name) == 64


def test_the_wrong_model():
    with saying(INFO) as (url, _), pytest.raises(ValueError, match="some/model.*some/other"):
        check_server(url, 1.0, "some/other")


def test_a_server_that_starts_late():
    """It is asked again as long as the timeout lasts, whatever it says meanwhile."""

    def start(handler):
        said = MODELS if handler.path == "/v1/models" else {"vllm_config": INFO}
        handler.send(json.dumps(said).encode(), 503 if len(seen) < 3 else 200)

    with listening(start) as (url, seen):
        assert check_server(url, 2.0, "some/model") == 64
    assert len(seen) == 4


def test_a_server_that_is_not_there():
    with pytest.raises(ConnectionError, match="http://127.0.0.1:9 .*vllm_server_timeout"):
        check_server("http://127.0.0.1:9", 0.1, "some/model")


def test_the_address_of_a_server(tmp_path):
    args = make_config(tmp_path, vllm_server_host="there", vllm_server_port=9)
    assert server_url(args) == "http://there:9"
    args.vllm_server_base_url = "https://here"
    assert server_url(args) == "https://here"
