"""
What leaving out rows without gradient (`prune`) saves, right behind a warm start:

    python -m benchmarks.pruning  # the quickstart's task
    python -m benchmarks.pruning --study studies/learning/configs/main.yaml --task registers
    python -m benchmarks.pruning --study studies/real_model/configs/main.yaml --task chain_sum \
        --models outputs/real_model/models

Two trainers begin with the same weights and draw the same rollouts. One of them prunes.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from examples import toy_task
from studies.learning.study import Job, Study
from studies.learning.training import arm_settings
from trl_anytime import BRPOConfig, BRPOTrainer

BUDGETS = [10, 20, 30, 40]
PROMPTS_PER_UPDATE, GROUP_SIZE = 32, 8
ARM = "ar_uniform"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=5)
    quickstart = parser.add_argument_group("the quickstart's task")
    quickstart.add_argument("--sft_steps", type=int, default=700, help="steps of the warm start")
    quickstart.add_argument("--prompts", type=int, default=PROMPTS_PER_UPDATE, help="prompts of an update")
    study = parser.add_argument_group("a task of a study")
    study.add_argument("--study", type=Path, help="the study's YAML file")
    study.add_argument("--task", help="one of its tasks")
    study.add_argument("--models", type=Path, help="the study's models. A warm start that is not there is made")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make = of_quickstart(options, Path(folder)) if options.study is None else of_study(options, Path(folder))
        logs = {prune: train(make(prune)) for prune in (True, False)}
    print("update | left out, % | updating, CPU s | with prune=False | gradient norm | with prune=False")
    for update, (pruned, whole) in enumerate(zip(logs[True], logs[False], strict=True), start=1):
        print(
            f"{update} | {100 * pruned['anytime/pruned_ratio']:.0f} | {pruned['time/updating']:.2f} | "
            f"{whole['time/updating']:.2f} | {pruned['grad_norm']:.4f} | {whole['grad_norm']:.4f}"
        )


def of_quickstart(options: argparse.Namespace, folder: Path) -> Callable[[bool], BRPOTrainer]:
    """Return what makes a trainer that prunes or not."""
    model, tokenizer, dataset, _ = toy_task.load(
        seed=0,
        sft_steps=options.sft_steps,
        train_problems=options.updates * options.prompts,
        eval_problems=1,
        longest=BUDGETS[-1],
        output_dir=folder,
    )

    def make(prune: bool) -> BRPOTrainer:
        args = BRPOConfig(
            str(folder),
            budgets=BUDGETS,
            num_summaries=2,
            num_generations=GROUP_SIZE,
            per_device_train_batch_size=options.prompts * GROUP_SIZE,
            max_steps=options.updates,
            learning_rate=8e-4,
            prune=prune,
            disable_tqdm=True,
            **toy_task.BRPO_SETTINGS,
        )
        return BRPOTrainer(
            copy.deepcopy(model),
            args,
            dataset,
            processing_class=tokenizer,
            reward_funcs=toy_task.end_of_chain_reward,
        )

    return make


def of_study(options: argparse.Namespace, folder: Path) -> Callable[[bool], BRPOTrainer]:
    """Return what makes a trainer that prunes or not."""
    study = Study.load(options.study)
    module = import_module(f"{study.package}.training")
    cell = next(cell for stage in study.stages for cell in stage["cells"] if cell.startswith(f"{options.task}/"))
    family, warm = cell.partition("/")[2], study.warm_start_seeds[0]
    job = Job("train", options.task, family, 0, warm, ARM, study.learning_rate(cell, ARM))
    assert job.requires is not None
    models = options.models or folder
    if not (models / job.requires.name / "config.json").exists():
        module.warm_start(study, job.requires, models / job.requires.name)
    settings = arm_settings(study, job) | {"max_steps": options.updates, "eval_strategy": "no"}

    def make(prune: bool) -> BRPOTrainer:
        set_seed(job.seed)
        tokenizer = AutoTokenizer.from_pretrained(models / job.requires.name)
        model = AutoModelForCausalLM.from_pretrained(models / job.requires.name, dtype=torch.float32)
        return module.make_trainer(study, job, model, tokenizer, folder / "trained", prune=prune, **settings)

    return make


def train(trainer: BRPOTrainer) -> list[dict[str, float]]:
    """Return the logs of all updates, with times of the CPU."""
    trainer.remove_callback(PrinterCallback)
    trainer._times.clock = time.process_time
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main()
