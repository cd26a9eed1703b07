import inspect
import re

import pytest
from trl import TrlParser

from trl_anytime import BRPOConfig


def make(**settings):
    return BRPOConfig("unused", bf16=False, **settings)


def test_defaults_are_the_papers():
    config = make()
    assert (config.budgets, config.prior, config.num_summaries) == ([2000, 4000, 6000, 8000], "uniform", 4)
    assert config.eval_budgets == config.budgets
    assert (config.baseline, config.progress_decay, config.summary_policy) == ("brpo", 0.5, "decoupled")
    assert (config.loss_type, config.scale_rewards, config.beta, config.epsilon) == ("dr_grpo", "none", 0.0, 0.2)
    assert (config.learning_rate, config.temperature, config.num_generations) == (1e-6, 1.0, 8)
    assert config.max_summary_length == 118


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": [4000, 2000]}, r"`budgets`.*\[4000, 2000\]"),
        ({"eval_budgets": [0]}, r"`eval_budgets`.*\[0\]"),
        ({"prior": [1.0]}, r"`prior`.*\b1\b.*\b4\b"),
        ({"prior": [1.0, -1.0, 1.0, 1.0]}, r"`prior`.*-1\.0"),
        ({"prior": [0.0] * 4}, r"`prior`.*\[0\.0, 0\.0, 0\.0, 0\.0\]"),
        ({"prior": "exponential"}, "`prior`.*'uniform', 'linear', 'base'"),
        ({"num_summaries": 0}, r"`num_summaries`.*\b1\b.*\b0\b"),
        ({"max_summary_length": 0}, r"`max_summary_length`.*\b1\b.*\b0\b"),
        ({"baseline": "group"}, "`baseline`.*'brpo'.*'group'"),
        ({"summary_policy": "all"}, "`summary_policy`.*'decoupled'.*'all'"),
        ({"packing": "flex"}, "`packing`.*'auto'.*'flex'"),
        ({"progress_decay": 1.5}, r"`progress_decay`.*\b1\.5"),
        ({"torch_compile": True}, "`torch_compile=True`"),
        ({"scale_rewards": "group"}, "`scale_rewards='group'`"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "`reward_weights`"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level"),
        ({"mask_truncated_completions": True}, "`mask_truncated_completions"),
        ({"off_policy_mask_threshold": 0.1}, "`off_policy_mask_threshold"),
        ({"vllm_structured_outputs_regex": "a+"}, "`vllm_structured_outputs_regex"),
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "`vllm_importance_sampling_mode"),
        ({"loss_type": "vespo"}, "`loss_type='vespo'"),
        ({"loss_type": "luspo"}, "`loss_type='luspo'"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, "'max_new_tokens'"),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a+"}}}, "'structured_outputs'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),  # refused by TRL itself
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_every_own_field_is_documented():
    own = set(BRPOConfig.__annotations__)
    documented = set(re.findall(r"^ {4}(\w+) \(`", inspect.cleandoc(BRPOConfig.__doc__), re.MULTILINE))
    assert {name for name in own if not BRPOConfig.__dataclass_fields__[name].metadata["help"]} == set()
    assert documented == own


@pytest.mark.parametrize("prior", ["linear", [0.5, 0.5]])
def test_yaml_and_command_line(tmp_path, prior):
    path = tmp_path / "config.yaml"
    path.write_text(f"output_dir: x\nbf16: false\nbudgets: [100, 200]\nprior: {prior}\n")
    (config,) = TrlParser(BRPOConfig).parse_args_and_config(
        ["--config", str(path), "--eval_budgets", "50", "100", "--num_summaries", "2"]
    )
    assert (config.budgets, config.prior, config.eval_budgets, config.num_summaries) == (
        [100, 200],
        prior,
        [50, 100],
        2,
    )
    (config,) = TrlParser(BRPOConfig).parse_args_and_config(
        ["--output_dir", "x", "--bf16", "false", "--prior", "base"]
    )
    assert config.prior == "base"
