"""The printed deployments say what the contract says. vLLM's is run in `make test-vllm`."""

import json
from dataclasses import replace

import pytest
from test_inference import make_contract
from tiny import make_tokenizer

from trl_anytime.serving import SERVERS, deployment


@pytest.mark.parametrize("server", SERVERS)
def test_requests_carry_the_contract(server):
    contract = replace(make_contract(), max_summary_length=7)
    found = deployment(server, "some/model", contract, make_tokenizer(), budget=100)
    assert any("some/model" in word for word in found.command)
    think, answer, *_ = found.requests
    text = found.text()
    assert "[9, 5, 8]" in text and "[8]" in text  # both bridges, as ids
    assert "100" in json.dumps(think.body) and "7" in json.dumps(answer.body)
    assert "stop" in json.dumps(think.body)
    assert ("Not run here" in text) == (server != "vllm")


def test_vllm():
    found = deployment("vllm", "some/model", make_contract(), make_tokenizer(), budget=100)
    config = json.loads(found.command[found.command.index("--reasoning-config") + 1])
    assert config == {"reasoning_start_str": "<think>", "reasoning_end_str": "so </think>answer"}
    think, answer, chat = (request.body for request in found.requests)
    assert (think["max_tokens"], think["stop_token_ids"]) == (100, [2, 5])
    assert (answer["max_tokens"], answer["stop_token_ids"]) == (4, [2])
    assert chat["thinking_token_budget"] == 100 and chat["temperature"] == 0


def test_bridges_that_vllm_would_encode_otherwise_are_named():
    found = deployment("vllm", "some/model", make_contract(), make_tokenizer(), budget=100)
    # A word-level tokenizer reads "</think>answer" as an unknown word
    assert "vLLM makes other tokens of the bridges" in found.text()


def test_an_unknown_server():
    with pytest.raises(ValueError, match="must be one of vllm, sglang, llama.cpp, got 'ollama'"):
        deployment("ollama", "some/model", make_contract(), make_tokenizer(), budget=100)
