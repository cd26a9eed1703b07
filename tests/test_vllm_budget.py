"""Budgets inside vLLM, by what vLLM calls. A real engine and server are in `make test-vllm`."""

import importlib
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import trl.import_utils  # noqa: F401  which looks for vLLM, before there seems to be one

from tests.support.anytime import GREEDY, expected_tokens, make_anytime_config
from trl_anytime import anytime_generate
from trl_anytime.rollout import vllm_backend  # noqa: F401  likewise

QUESTIONS = ["1 2 3", "4", "5 6"]
AROUND = 3 + 4 + 1  # bridges, a summary and EOS


@pytest.fixture
def processor_class(monkeypatch):
    """`VLLMThinkingBudget`, on stand-ins for what it inherits and imports."""

    class Adapter:
        def __init__(self, vllm_config, device, is_pin_memory):
            pass

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.v1", "vllm.v1.sample")}
    modules["vllm.v1.sample.logits_processor"] = SimpleNamespace(AdapterLogitsProcessor=Adapter)
    modules["vllm"].SamplingParams = SimpleNamespace
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "trl_anytime.vllm_budget", raising=False)
    module = importlib.import_module("trl_anytime.vllm_budget")
    monkeypatch.delitem(sys.modules, "trl_anytime.vllm_budget")
    return module.VLLMThinkingBudget


@pytest.fixture
def make(processor_class, config, tokenizer, tmp_path):
    """Makes the processor of a model's folder, with an engine's `additional_config`."""
    make_anytime_config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    def make(model=tmp_path, tokenizer=tmp_path, **additional):
        model_config = SimpleNamespace(model=str(model), tokenizer=str(tokenizer))
        vllm_config = SimpleNamespace(model_config=model_config, additional_config=additional)
        processor = processor_class(vllm_config, torch.device("cpu"), False)
        processor._anytime_config = config  # whose traces end, by a usual token that is no marker to the tokenizer
        return processor

    return make


def params(budget=None, max_tokens=None):
    extra = None if budget is None else {"thinking_budget": budget}
    return SimpleNamespace(extra_args=extra, max_tokens=max_tokens)


@torch.no_grad()
def sample(model, processor, prompt_ids, params):
    """Greedy tokens, as vLLM's sampler takes them."""
    limit = processor.new_req_logits_processor(params)
    token_ids = []
    while len(token_ids) < (params.max_tokens or 40) and token_ids[-1:] != [2]:
        logits = model(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, -1]
        if limit is not None:
            takes_prompts = len(inspect.signature(limit).parameters) == 3
            logits = limit(prompt_ids, token_ids, logits) if takes_prompts else limit(token_ids, logits)
        token_ids.append(logits.argmax().item())
    return token_ids


@pytest.fixture
def prompts(config, tokenizer):
    return [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.mark.parametrize(
    ("asked", "additional", "budget"),
    [
        (params(3), {}, 3),
        (params(), {}, 12),  # the config's last
        (params(), {"thinking_budget": 7}, 7),
        (params(3), {"thinking_budget": 7}, 3),
        (params(11), {"thinking_budget": -1}, 11),
        (params(max_tokens=5 + AROUND), {}, 5),  # so that the answer fits in
        (params(max_tokens=100), {}, 12),
    ],
)
def test_budgets(make, model, tokenizer, config, prompts, asked, additional, budget):
    processor = make(**additional)
    outputs = anytime_generate(model, tokenizer, prompts, [budget], config=config, sampling=GREEDY)
    for prompt_ids, output in zip(config.prompt_ids(tokenizer, prompts), outputs, strict=True):
        assert sample(model, processor, prompt_ids, asked) == expected_tokens(output)


@pytest.mark.parametrize(("asked", "additional"), [(params(0), {}), (params(), {"thinking_budget": 0})])
def test_no_thinking(make, model, tokenizer, config, prompts, asked, additional):
    (prompt_ids, *_) = config.prompt_ids(tokenizer, prompts)
    markers = config.markers
    bridge = [*markers.truncation_bridge_ids, *markers.answer_bridge_ids]
    tokens = sample(model, make(**additional), prompt_ids, asked)
    assert tokens[: len(bridge)] == bridge and tokens[-1] == 2
    assert len(tokens) <= len(bridge) + config.max_summary_length + 1


def test_what_is_left_as_it_is(make, model, tokenizer, config, prompts):
    """Requests that say so, and prompts that do not end as the template ends them, such as those behind a bridge."""
    (prompt_ids, *_) = config.prompt_ids(tokenizer, prompts)
    behind = [*prompt_ids, *config.markers.truncation_bridge_ids]
    asked_to_be = ((make(), params(-1)), (make(thinking_budget=-1), params()))
    for processor, asked in asked_to_be:
        assert processor.new_req_logits_processor(asked) is None
    logits = torch.zeros(50)
    limit = make(thinking_budget=0).new_req_logits_processor(params())
    assert limit(behind, [], logits) is logits
    assert limit(prompt_ids, [], logits) is not logits


def test_the_config_of_an_adapter(make, model, config, tmp_path):
    """It is beside the tokenizer. The base model has none, or that of another training."""
    base = tmp_path / "base"
    base.mkdir()
    assert make(model=base)._default == 12
    make_anytime_config(budgets=(2, 4)).save_pretrained(base)
    assert make(model=base)._default == 12
    (tmp_path / "anytime_config.json").unlink()
    assert make(model=base)._default == 4


@pytest.mark.parametrize("budget", [-2, True, 2.5, "3", [3]])
def test_what_is_not_a_budget(processor_class, make, budget):
    with pytest.raises(ValueError, match="`thinking_budget`"):
        processor_class.validate_params(params(budget))
    with pytest.raises(ValueError, match="`thinking_budget`"):
        make(thinking_budget=budget)
    for good in (None, 0, -1, 5):
        processor_class.validate_params(params(good))
