"""LoRA in colocate mode: the engine samples from the adapted model."""

from itertools import pairwise

import pytest
import torch
from peft import LoraConfig

from tests.support.tiny import make_model, make_tokenizer, tiny_trainer
from trl_anytime.rollout.backend import RolloutSettings

PROMPT = [3, 6, 10, 11, 2, 3, 7, 4]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(head_dim=32, num_attention_heads=2).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return tiny_trainer(
        path,
        model=str(path),
        peft_config=LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=64,
        max_steps=3,
        learning_rate=1e-1,
        model_init_kwargs={"dtype": "float32"},
    )


def engine_logprob(trainer, monkeypatch):
    """The engine's log-probability of the likeliest token after the prompt."""
    monkeypatch.setattr(trainer.vllm_generation, "temperature", 0.0)
    (rollout,) = trainer.generation.roll_out([PROMPT], RolloutSettings([1], 1, 1, trainer.markers, [2]))
    return rollout.thinking.logprobs[0]


@torch.no_grad()
def model_logprob(trainer):
    """The same by the trainer's model, in nats."""
    return trainer.model(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1).max().item()


def test_training(trainer):
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert all(log["grad_norm"] > 0 for log in logs)
    # The second and third batch are sampled with an adapter that has been trained
    assert all(log["sampling/sampling_logp_difference/mean"] < 1e-4 for log in logs)


def test_the_engines_logprobs_change_with_the_adapter(trainer, monkeypatch):
    adapter = [param for name, param in trainer.model.named_parameters() if "lora_B" in name]
    assert all(param.requires_grad for param in adapter)
    torch.manual_seed(0)
    found = []
    for scale in (0.0, 0.1, 0.2):
        for param in adapter:
            param.data.normal_(std=scale)
        trainer.vllm_generation.sync_weights()
        found.append(engine_logprob(trainer, monkeypatch))
        assert found[-1] == pytest.approx(model_logprob(trainer), abs=1e-4)
    with trainer.model.disable_adapter():
        assert found[0] == pytest.approx(model_logprob(trainer), abs=1e-4)
    assert min(abs(a - b) for a, b in pairwise(found)) > 1e-2
