"""`ReliableGRPOTrainer` on one rank, undisturbed; test_restart.py and test_faults.py disturb it."""

import pytest
import torch
from trl import GRPOTrainer

from tests.support.scenarios import summary
from tests.support.tiny import make_dataset, make_grpo_config, make_model, parity_reward, tiny_trainer
from trl_anytime import ReliableGRPOTrainer


def test_it_trains_as_grpo_does(tmp_path):
    settings = {"max_steps": 6, "num_iterations": 2, "eval_strategy": "steps", "eval_steps": 3}
    results = []
    for kind in (GRPOTrainer, ReliableGRPOTrainer):
        trainer = tiny_trainer(tmp_path / kind.__name__, kind, eval_dataset=make_dataset(3), **settings)
        trainer.train()
        results.append(summary(trainer))
    expected, found = results
    assert (
        found["weights"] == expected["weights"] != torch.cat([p.flatten() for p in make_model().parameters()]).tolist()
    )
    for entry, other in zip(found["log"], expected["log"], strict=True):
        assert {name: entry[name] for name in other} == other


def test_non_finite_values_are_raised_or_skipped(tmp_path):
    with pytest.raises(ValueError, match="on_nonfinite"):
        tiny_trainer(tmp_path, ReliableGRPOTrainer, on_nonfinite="ignore")


def test_deepspeed_skips_no_step(tmp_path):
    """It steps by itself, whatever is left of the gradients."""
    config = make_grpo_config(tmp_path)
    config.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="DeepSpeed"):
        ReliableGRPOTrainer(make_model(), parity_reward, config, make_dataset(), on_nonfinite="skip")
