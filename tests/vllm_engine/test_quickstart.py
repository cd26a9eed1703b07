"""The quickstart's task, learnt by rollouts from vLLM."""

from statistics import fmean

import quickstart
import toy_task
from transformers import AutoModelForCausalLM

from trl_anytime import BRPOConfig, BRPOTrainer


def test_quickstart_is_learnt(tmp_path):
    model, tokenizer, train_dataset, eval_dataset = toy_task.load(
        seed=0,
        sft_steps=400,
        train_problems=15 * quickstart.PROMPTS_PER_UPDATE,
        eval_problems=200,
        longest=quickstart.BUDGETS[-1],
        output_dir=tmp_path,
    )
    # vLLM loads the model by its name
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    config = BRPOConfig(
        str(tmp_path),
        budgets=quickstart.BUDGETS,
        eval_budgets=quickstart.EVAL_BUDGETS,
        num_summaries=2,
        num_generations=quickstart.GROUP_SIZE,
        per_device_train_batch_size=quickstart.PROMPTS_PER_UPDATE * quickstart.GROUP_SIZE,
        per_device_eval_batch_size=250,
        max_steps=15,
        learning_rate=8e-4,
        use_cpu=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
        **toy_task.BRPO_SETTINGS,
    )
    trainer = BRPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "sft"),
        config,
        train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        reward_funcs=toy_task.end_of_chain_reward,
    )
    before = quickstart.evaluate(trainer)
    trainer.train()
    after = quickstart.evaluate(trainer)

    # 15 of the quickstart's 60 updates took the mean over the budgets from 0.61 to 0.83, budget 10 from 0.49 to 0.88
    at_10 = quickstart.EVAL_BUDGETS.index(10)
    assert after[at_10] >= before[at_10] + 0.2
    assert fmean(after) >= fmean(before) + 0.1
    # The engine scores its samples as the trainer does, at every update of the weights. Required is 0.01; in float32
    # there is no reason for more than rounding.
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 15
    assert max(log["sampling/sampling_logp_difference/mean"] for log in logs) < 1e-4
