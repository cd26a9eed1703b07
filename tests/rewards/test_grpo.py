"""The rewards in TRL's own trainer: signature, metric names, several rewards at once."""

import pytest
from trl import GRPOConfig, GRPOTrainer

from tests.support.tiny import make_dataset, make_model, make_tokenizer
from trl_anytime.rewards import ExactMatch, FormatReward, MathReward, NumericClose


@pytest.mark.parametrize("end_of_thinking", ["</think>", None])
def test_plain_grpo_trainer(tmp_path, end_of_thinking):
    classes = (MathReward, ExactMatch, NumericClose, FormatReward)
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=[reward_class(end_of_thinking=end_of_thinking) for reward_class in classes],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=8,
            max_steps=2,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        ),
        processing_class=make_tokenizer(),
        train_dataset=make_dataset(),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(logs) == 2
    for entry in logs:
        for reward_class in classes:
            assert entry[f"rewards/{reward_class.__name__}/mean"] == 0.0  # a random model boxes nothing
        counted = [entry[f"rewards/MathReward/{name}"] for name in MathReward.COUNTERS]
        assert sum(counted) == 4.0  # each completion of the batch once
        if end_of_thinking is None:
            assert entry["rewards/MathReward/no_box"] == 4.0
