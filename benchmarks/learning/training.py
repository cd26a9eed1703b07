"""Warm starts and training runs of the study, each of which yields one record of results."""

import random
import time
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from examples import quickstart
from trl_anytime import BRPOTrainer

from .study import Job, Study
from .tasks import TASKS

# Kept for every update, where the trainer logs it
_UPDATE_METRICS = (
    "reward",
    "grad_norm",
    "anytime/no_advantage_ratio",
    "thinking/mean_length",
    "thinking/finished_ratio",
    "summary/mean_length",
)


def make_model(family: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh model of the quickstart's shape."""
    model = quickstart.make_model(tokenizer)
    if family == "qwen3":
        return model
    assert family == "llama", family
    shape = model.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("head_dim", "intermediate_size", "max_position_embeddings", "initializer_range", "tie_word_embeddings")
    names += ("pad_token_id", "eos_token_id", "bos_token_id")
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(shape, name) for name in names}))


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
    **settings: Any,
) -> BRPOTrainer:
    """The quickstart's trainer on the problems of a job; `settings` override the study's."""
    training, task = study.training, TASKS[job.task]
    rng = random.Random(f"{job.task} {job.seed} reinforcement")
    held_out = make_held_out(study, job)
    most_updates = max(arm.get("updates", training["updates"]) for arm in study.arms.values())
    problems = quickstart.make_problems(
        most_updates * training["prompts_per_update"], rng, {p.question for p in held_out}, task.make_problem
    )
    trainer = quickstart.make_trainer(
        model,
        tokenizer,
        quickstart.make_rl_dataset(problems),
        quickstart.make_rl_dataset(held_out[: training["eval_problems"]]),
        **{
            "updates": 1,
            "output_dir": str(output_dir),
            "seed": job.seed,
            "num_generations": training["num_generations"],
            "per_device_train_batch_size": training["prompts_per_update"] * training["num_generations"],
            "per_device_eval_batch_size": 500,
            "eval_budgets": study.eval_budgets(job.task),
            "disable_tqdm": True,
            **settings,
        },
    )
    for printing in (quickstart.ProgressBar, PrinterCallback):
        trainer.remove_callback(printing)
    return trainer


def make_held_out(study: Study, job: Job) -> list[Any]:
    rng = random.Random(f"{job.task} {job.warm_start_seed} held out")
    return quickstart.make_problems(study.training["warm_start_problems"], rng, (), TASKS[job.task].make_problem)


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
    tokenizer = quickstart.make_tokenizer(task.words)
    model = make_model(job.family, tokenizer)
    rng = random.Random(f"{job.task} {job.seed} warm start")
    steps, held_out = settings["warm_start_steps"], {problem.question for problem in make_held_out(study, job)}
    problems = quickstart.make_problems(steps * quickstart.SFT_BATCH_SIZE, rng, held_out, task.make_problem)
    dataset = quickstart.make_sft_dataset(problems, tokenizer, rng, task.make_thinking, settings["full_budget"])
    quickstart.supervised_fine_tune(
        model, tokenizer, dataset, steps, job.seed, output_dir, study.families[job.family]["warm_start_learning_rate"]
    )
    trainer = make_trainer(study, job, model, tokenizer, output_dir, budgets=[settings["full_budget"]])
    metrics = trainer.evaluate(quickstart.make_rl_dataset(make_held_out(study, job)))
    trainer.save_model()
    return evaluation_record(study, job, metrics)


def train(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Train an arm from the warm start; leaves the model in `output_dir`."""
    assert job.requires is not None
    checkpoint = output_dir.parent / job.requires.name
    set_seed(job.seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32")
    settings = dict(study.arms[job.arm])
    for name in ("num_budgets", "budget_fractions"):
        settings.pop(name, None)
    updates = settings.pop("updates", study.training["updates"])
    budgets = study.budgets(job.task, job.arm)
    trainer = make_trainer(
        study,
        job,
        model,
        tokenizer,
        output_dir,
        updates=updates,
        budgets=budgets,
        learning_rate=job.learning_rate,
        eval_strategy="steps",
        eval_steps=study.training["eval_every"],
        **settings,
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()

    history = trainer.state.log_history
    logs = [log for log in history if "loss" in log]
    names = [n for n in logs[0] if n in _UPDATE_METRICS or n.startswith("anytime/reward@")]
    per_rollout = len(budgets) * trainer.args.num_summaries
    rollouts = study.training["prompts_per_update"] * study.training["num_generations"]
    tokens = [rollouts * (log["thinking/mean_length"] + per_rollout * log["summary/mean_length"]) for log in logs]
    record = {
        "budgets": budgets,
        "tokens": [round(n) for n in tokens],  # generated, by update
        "seconds": [round(s, 3) for s in clock.wall],
        "cpu_seconds": [round(s, 3) for s in clock.cpu],
        "phase_seconds": {
            name.removeprefix("time/"): round(sum(log[name] for log in logs) / len(logs), 4)
            for name in logs[0]
            if name.startswith("time/")
        },
        "logs": {name: [_rounded(log.get(name)) for log in logs] for name in names},
        "evaluations": [
            {"update": log["step"], **evaluation_record(study, job, log)} for log in history if "eval_runtime" in log
        ],
    }
    trainer.save_model()
    return record


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
