"""The printed deployments say what the contract says. vLLM's is run in `make test-vllm`."""

import json
from dataclasses import replace

import pytest
from tiny_contract import make_contract

from trl_anytime.inference.serving import SERVERS, deployment


@pytest.mark.parametrize("server", SERVERS)
def test_requests_carry_the_contract(server):
    contract = replace(make_contract(), max_summary_length=7)
    found = deployment(server, "some/model", contract, budget=100)
    assert any("some/model" in word for word in found.command)
    *_, think, answer = found.requests
    text = found.text()
    assert "[9, 5, 8]" in text and "[8]" in text  # both bridges, as ids
    assert "100" in json.dumps(think.body) and "7" in json.dumps(answer.body)
    assert "stop" in json.dumps(think.body)
    assert ("Not run here" in text) == (server != "vllm")


def test_vllm():
    found = deployment("vllm", "some/model", make_contract(), budget=100)
    assert found.command[-2:] == ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat, think, answer = (request.body for request in found.requests)
    assert (think["max_tokens"], think["stop_token_ids"]) == (100, [2, 5])
    assert (answer["max_tokens"], answer["stop_token_ids"]) == (4, [2])
    assert chat["vllm_xargs"] == {"thinking_budget": 100} and chat["temperature"] == 0
    assert chat["max_tokens"] == 100 + 3 + 4 + 1


def test_an_unknown_server():
    with pytest.raises(ValueError, match="must be one of vllm, sglang, llama.cpp, got 'ollama'"):
        deployment("ollama", "some/model", make_contract(), budget=100)
