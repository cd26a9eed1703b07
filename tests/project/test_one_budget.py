"""What docs/grpo_with_a_budget.md says: one budget and one answer per trace leave nothing else to choose."""

import pytest
import torch

from tests.support.tiny import make_config, make_dataset, make_model, make_tokenizer, parity_reward
from trl_anytime import BRPOTrainer


def trained_weights(folder, **settings):
    trainer = BRPOTrainer(
        make_model(),
        make_config(folder, budgets=[6], num_summaries=1, **settings),
        make_dataset(),
        reward_funcs=parity_reward,
        processing_class=make_tokenizer(),
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    return after


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"prior": "base"}, {"baseline": "v2"}, {"summary_policy": "final"}], ids=lambda s: next(iter(s))
)
def test_other_settings_change_nothing(tmp_path, settings):
    plain, changed = trained_weights(tmp_path / "plain"), trained_weights(tmp_path / "changed", **settings)
    for name, weight in plain.items():
        torch.testing.assert_close(changed[name], weight, rtol=0, atol=0)


def test_a_setting_that_does_change_something(tmp_path):
    """The comparison above can fail."""
    plain, changed = trained_weights(tmp_path / "plain"), trained_weights(tmp_path / "changed", baseline="none")
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)
