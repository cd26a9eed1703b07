"""The printed deployments say what the contract says. vLLM's is run in `make test-vllm`."""

from dataclasses import replace

from tiny_contract import make_contract

from trl_anytime.serving import deployment


def test_requests_carry_the_contract():
    contract = replace(make_contract(), max_summary_length=7)
    found = deployment("some/model", contract, budget=100)
    assert found.command[:3] == ["vllm", "serve", "some/model"]
    assert found.command[-2:] == ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat, think, answer = (request.body for request in found.requests)
    assert (think["max_tokens"], think["stop_token_ids"]) == (100, [2, 5])
    assert (answer["max_tokens"], answer["stop_token_ids"]) == (7, [2])
    assert chat["vllm_xargs"] == {"thinking_budget": 100} and chat["temperature"] == 0
    assert chat["max_tokens"] == 100 + 3 + 7 + 1
    text = found.text()
    assert "[9, 5, 8]" in text and "[8]" in text  # both bridges, as ids
