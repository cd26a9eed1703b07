"""Warm starts and training runs of the study, each of which yields one record of results."""

import random
import time
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from examples import toy_task
from trl_anytime import BRPOConfig, BRPOTrainer

from .study import Job, Study
from .tasks import TASKS


def make_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Make a random model of the quickstart's shape."""
    qwen3 = toy_task.make_model(tokenizer)
    # The committed runs drew the weights of Qwen3 before those of any other family
    return qwen3 if family == "qwen3" else toy_task.make_model(tokenizer, family)


class Clock(TrainerCallback):
    """Seconds of every update, on the wall and of this process's CPU time, evaluation left out."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])


def make_trainer(
    study: Study,
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    output_dir: Path,
    trainer_class: type[BRPOTrainer] = BRPOTrainer,
    **settings: Any,
) -> BRPOTrainer:
    """Make the trainer of a job, on its problems; `settings` override the study's."""
    training, task = study.training, TASKS[job.task]
    rng = random.Random(f"{job.task} {job.seed} reinforcement")
    held_out = make_held_out(study, job)
    most_updates = max(arm.get("updates", training["updates"]) for arm in study.arms.values())
    problems = toy_task.make_problems(
        task, most_updates * training["prompts_per_update"], rng, {p.question for p in held_out}
    )
    settings = {
        **toy_task.BRPO_SETTINGS,
        "seed": job.seed,
        "num_generations": training["num_generations"],
        "per_device_train_batch_size": training["prompts_per_update"] * training["num_generations"],
        "per_device_eval_batch_size": 500,
        "eval_budgets": study.eval_budgets(job.task),
        "disable_tqdm": True,
        **settings,
    }
    trainer = trainer_class(
        model,
        BRPOConfig(str(output_dir), **settings),
        toy_task.make_rl_dataset(problems),
        eval_dataset=toy_task.make_rl_dataset(held_out[: training["eval_problems"]]),
        processing_class=tokenizer,
        reward_funcs=toy_task.end_of_chain_reward,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_held_out(study: Study, job: Job) -> list[Any]:
    rng = random.Random(f"{job.task} {job.warm_start_seed} held out")
    return toy_task.make_problems(TASKS[job.task], study.training["warm_start_problems"], rng)


def evaluation_record(study: Study, job: Job, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "accuracy": [round(metrics[f"eval_anytime/reward@{b}"], 4) for b in study.eval_budgets(job.task)],
        "thinking_length": round(metrics["eval_thinking/mean_length"], 2),
        "finished": round(metrics["eval_thinking/finished_ratio"], 4),
    }


def warm_start(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Supervised fine-tuning on wasteful, fallible chains; leaves the model in `output_dir`."""
    set_seed(job.seed)
    task, settings = TASKS[job.task], study.tasks[job.task]
    tokenizer = toy_task.make_tokenizer(task)
    model = make_model(job.family, tokenizer)
    rng = random.Random(f"{job.task} {job.seed} warm start")
    steps, held_out = settings["warm_start_steps"], {problem.question for problem in make_held_out(study, job)}
    problems = toy_task.make_problems(task, steps * toy_task.SFT_BATCH_SIZE, rng, held_out)
    dataset = toy_task.make_sft_dataset(task, problems, tokenizer, rng, settings["full_budget"])
    toy_task.supervised_fine_tune(
        model, tokenizer, dataset, steps, job.seed, output_dir, study.families[job.family]["warm_start_learning_rate"]
    )
    trainer = make_trainer(study, job, model, tokenizer, output_dir, budgets=[settings["full_budget"]])
    metrics = trainer.evaluate(toy_task.make_rl_dataset(make_held_out(study, job)))
    trainer.save_model()
    return evaluation_record(study, job, metrics)


def train(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Train an arm from the warm start; leaves the model in `output_dir`."""
    assert job.requires is not None
    checkpoint = output_dir.parent / job.requires.name
    set_seed(job.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    trainer = make_trainer(study, job, model, tokenizer, output_dir, **arm_settings(study, job))
    record = run_arm(study, job, trainer)
    trainer.save_model()
    return record


def arm_settings(study: Study, job: Job) -> dict[str, Any]:
    """Return the settings of the trainer that an arm has of its own."""
    arm = study.arms[job.arm]
    of_study = ("num_budgets", "budget_fractions", "updates")  # what the others are made of
    return {
        "max_steps": arm.get("updates", study.training["updates"]),
        "budgets": study.budgets(job.task, job.arm),
        "learning_rate": job.learning_rate,
        "eval_strategy": "steps",
        "eval_steps": study.training["eval_every"],
        **{name: value for name, value in arm.items() if name not in of_study},
    }


def run_arm(study: Study, job: Job, trainer: BRPOTrainer) -> dict[str, Any]:
    """Train; returns the curve and the costs so far at each evaluation, and the seconds of an update by phase."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()

    budgets = trainer.args.budgets
    history = trainer.state.log_history
    logs = [log for log in history if "loss" in log]
    per_rollout = len(budgets) * trainer.args.num_summaries
    rollouts = study.training["prompts_per_update"] * study.training["num_generations"]
    tokens = [
        # With a likelihood reward, no summary is sampled
        rollouts * (log["thinking/mean_length"] + per_rollout * log.get("summary/mean_length", 0))
        for log in logs
    ]
    return {
        "budgets": budgets,
        "phase_seconds": {
            name.removeprefix("time/"): round(sum(log[name] for log in logs) / len(logs), 4)
            for name in logs[0]
            if name.startswith("time/")
        },
        "evaluations": [
            {
                "update": log["step"],
                "tokens": round(sum(tokens[: log["step"]])),  # generated so far
                "seconds": round(sum(clock.wall[: log["step"]]), 3),
                "cpu_seconds": round(sum(clock.cpu[: log["step"]]), 3),
                **evaluation_record(study, job, log),
            }
            for log in history
            if "eval_runtime" in log
        ],
    }
