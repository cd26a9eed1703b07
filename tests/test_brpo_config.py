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
        ({"budgets": [4000, 2000]}, "`budgets` must be strictly increasing"),
        ({"eval_budgets": [0]}, "`eval_budgets` must be strictly increasing"),
        ({"prior": [1.0]}, "1 weights but there are 4 budgets"),
        ({"prior": [1.0, -1.0, 1.0, 1.0]}, "non-negative"),
        ({"prior": [0.0] * 4}, "not all zero"),
        ({"prior": "exponential"}, "'uniform', 'linear', 'base'"),
        ({"num_summaries": 0}, "`num_summaries` must be at least 1"),
        ({"max_summary_length": 0}, "`max_summary_length` must be at least 1"),
        ({"baseline": "group"}, "`baseline` must be one of"),
        ({"summary_policy": "all"}, "`summary_policy` must be one of"),
        ({"packing": "flex"}, "`packing` must be one of"),
        ({"progress_decay": 1.5}, "`progress_decay` must lie"),
        ({"scale_rewards": "group"}, "`scale_rewards='group'` has no meaning in BRPO"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "use `reward_weights`"),
        ({"importance_sampling_level": "sequence"}, "sequence-level ratio is not defined"),
        ({"mask_truncated_completions": True}, "truncated traces are what BRPO learns from"),
        ({"off_policy_mask_threshold": 0.1}, "one sequence-level statistic"),
        ({"vllm_structured_outputs_regex": "a+"}, "would constrain the thinking"),
        ({"vllm_importance_sampling_mode": "sequence_mask"}, "one ratio per sequence"),
        ({"loss_type": "vespo"}, "weighs whole sequences"),
        ({"loss_type": "luspo"}, "weighs whole sequences"),
        ({"generation_kwargs": {"max_new_tokens": 5}}, r"must not set \['max_new_tokens'\]"),
        ({"generation_kwargs": {"structured_outputs": {"regex": "a+"}}}, r"must not set \['structured_outputs'\]"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is not supported"),  # refused by TRL itself
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
