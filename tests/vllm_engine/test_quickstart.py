"""The quickstart's task, learnt by rollouts from vLLM."""

import random
from statistics import fmean

import quickstart
from transformers import Qwen3ForCausalLM, set_seed


def test_quickstart_is_learnt(tmp_path):
    set_seed(0)
    rng = random.Random(0)
    tokenizer = quickstart.make_tokenizer()
    model = quickstart.make_model(tokenizer)
    held_out = quickstart.make_problems(200, rng)
    questions = {problem.question for problem in held_out}
    sft_problems = quickstart.make_problems(400 * quickstart.SFT_BATCH_SIZE, rng, questions)
    sft_dataset = quickstart.make_sft_dataset(sft_problems, tokenizer, rng)
    quickstart.supervised_fine_tune(model, tokenizer, sft_dataset, 400, 0, tmp_path)
    # vLLM loads the model by its name
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")

    trainer = quickstart.make_trainer(
        Qwen3ForCausalLM.from_pretrained(tmp_path / "sft"),
        tokenizer,
        quickstart.make_rl_dataset(quickstart.make_problems(15 * quickstart.PROMPTS_PER_UPDATE, rng, questions)),
        quickstart.make_rl_dataset(held_out),
        15,
        output_dir=str(tmp_path),
        use_cpu=True,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=128,
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
