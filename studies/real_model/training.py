"""Warm starts and training runs of SmolLM2-135M-Instruct, each of which yields one record of results."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback, set_seed

from examples import arithmetic, smollm2
from examples import warm_start as teaching
from studies.learning.study import Job, Study
from studies.learning.training import arm_settings, evaluation_record, run_arm
from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.rewards import TaskReward

from .tasks import TASKS

# Seeds of the problems, on top of ten times the run's
EVAL_SEED, SFT_SEED, RL_SEED = 1, 2, 3


@dataclass(frozen=True)
class LengthDiscount:
    """
    Reward of right answers, discounted by the length of the whole trace.

    Args:
        full_budget (`int`):
            Length in tokens at which the whole discount applies.
        discount (`float`):
            What the longest trace loses, from 0 to 1.
    """

    full_budget: int
    discount: float
    __name__ = "length_discount"  # TRL names metrics by it

    def __call__(self, thinking_length: Sequence[int], **columns: Any) -> list[float | None]:
        scores = TaskReward(answer_bridge=teaching.ANSWER_BRIDGE)(**columns)
        return [
            None if score is None else score * (1 - self.discount * min(1.0, length / self.full_budget))
            for score, length in zip(scores, thinking_length, strict=True)
        ]


def make_held_out(study: Study, job: Job) -> Dataset:
    count = study.training["eval_problems"]
    return arithmetic.make_problems(count, EVAL_SEED + 10 * job.warm_start_seed, name=TASKS[job.task].problems_name)


def as_prompts(problems: Dataset) -> Dataset:
    return problems.map(lambda row: {"prompt": teaching.make_prompt(row["question"])})


def make_trainer(
    study: Study,
    job: Job,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    length_discount: float = 0.0,
    **settings: Any,
) -> BRPOTrainer:
    """Make the trainer of a job, on its problems; `settings` override the study's."""
    training, full_budget = study.training, study.tasks[job.task]["full_budget"]
    held_out = make_held_out(study, job)
    most_updates = max(arm.get("updates", training["updates"]) for arm in study.arms.values())
    problems = arithmetic.make_problems(
        most_updates * training["prompts_per_update"],
        RL_SEED + 10 * job.seed,
        set(held_out["question"]),
        TASKS[job.task].problems_name,
    )
    settings = {
        **teaching.common_settings(job.seed),
        "max_summary_length": teaching.MAX_SUMMARY_LENGTH,
        "truncation_bridge": teaching.TRUNCATION_BRIDGE,
        "answer_bridge": teaching.ANSWER_BRIDGE,
        "num_generations": training["num_generations"],
        # The logits of more rows would be what takes the memory
        "per_device_train_batch_size": training["num_generations"],
        "gradient_accumulation_steps": training["prompts_per_update"],
        "per_device_eval_batch_size": 64,
        "num_generations_eval": 1,
        "eval_budgets": study.eval_budgets(job.task),
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    reward = LengthDiscount(full_budget, length_discount) if length_discount else TaskReward()
    trainer = BRPOTrainer(
        model,
        BRPOConfig(str(output_dir), **settings),
        as_prompts(problems),
        eval_dataset=as_prompts(held_out),
        processing_class=tokenizer,
        reward_funcs=reward,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def warm_start(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Supervised fine-tuning on wasteful, fallible chains; leaves the model in `output_dir`."""
    base = output_dir.parent / "base"
    if not base.exists():
        smollm2.get_model(base)
    set_seed(job.seed)
    task, steps = TASKS[job.task], study.tasks[job.task]["warm_start_steps"]
    full_budget = study.tasks[job.task]["full_budget"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    teaching.open_thinking(model, tokenizer)
    held_out = set(make_held_out(study, job)["question"])
    problems = arithmetic.make_problems(
        steps * teaching.SFT_BATCH_SIZE, SFT_SEED + 10 * job.seed, held_out, task.problems_name
    )
    dataset = teaching.make_sft_dataset(
        problems["question"], task.make_thinking, tokenizer, full_budget, random.Random(job.seed)
    )
    sft = teaching.make_sft_trainer(model, tokenizer, dataset, output_dir, steps, job.seed)
    sft.args.save_strategy = "no"
    sft.train()
    trainer = make_trainer(study, job, sft.model, tokenizer, output_dir, budgets=[full_budget])
    metrics = trainer.evaluate()
    trainer.save_model()
    teaching.make_anytime_config(tokenizer, study.eval_budgets(job.task)).save_pretrained(output_dir)
    return evaluation_record(study, job, metrics)


def train(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Train an arm from the warm start; leaves the model in `output_dir`."""
    assert job.requires is not None
    checkpoint = output_dir.parent / job.requires.name
    set_seed(job.seed)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = make_trainer(study, job, model, tokenizer, output_dir, **arm_settings(study, job))
    record = run_arm(study, job, trainer)
    trainer.save_model()
    return record
