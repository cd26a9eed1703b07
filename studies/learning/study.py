"""A study as its YAML file describes it: which arms are trained on which tasks, models and seeds, in which order."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Job:
    """
    One piece of work, done once. What it yields is one line of the study's results.

    Args:
        kind (`str`):
            `"warm_start"` (supervised fine-tuning), `"train"` (an arm) or `"measure"` (variances, on a checkpoint).
        task (`str`):
            Name of the task.
        family (`str`):
            Model family: a `model_type` of transformers.
        seed (`int`):
            Seeds problems and samples, and of a warm start weights too.
        warm_start_seed (`int`):
            Seed of the warm start that it begins with, and of the held-out problems.
        arm (`str`, *optional*, defaults to `""`):
            Arm that is trained. Of a measurement: whose final checkpoint is measured, empty for the warm start's.
        learning_rate (`float`, *optional*, defaults to `0.0`):
            Learning rate of the arm.
    """

    kind: str
    task: str
    family: str
    seed: int
    warm_start_seed: int
    arm: str = ""
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        """Names the job and its files."""
        parts = [self.kind, self.task, self.family, f"seed{self.seed}"]
        if self.arm:
            parts += [self.arm, f"lr{self.learning_rate:g}"]
        return "-".join(parts)

    @property
    def requires(self) -> "Job | None":
        """The job that must be done before this one."""
        if self.kind == "warm_start":
            return None
        if self.kind == "measure" and self.arm:
            return replace(self, kind="train")
        return Job("warm_start", self.task, self.family, self.warm_start_seed, self.warm_start_seed)


@dataclass(frozen=True)
class Study:
    """
    A study.

    Args:
        tasks (`dict`):
            For each task `full_budget` in tokens and `warm_start_steps`.
        families (`dict`):
            For each model family `warm_start_learning_rate`.
        training (`dict`):
            Settings of all training runs: `updates`, `prompts_per_update`, `num_generations`, `eval_every`,
            `warm_start_problems` (held-out problems, on which the warm start is judged), `eval_problems` (how many of
            them judge the arms), and `measure`: how many `prompts` to fit and to judge, `group_sizes` to look at,
            `gradient_prompts` and `gradient_priors`.
        arms (`dict`):
            For each arm its settings in [`~trl_anytime.BRPOConfig`], with `num_budgets` or `budget_fractions` in
            place of `budgets`, and `updates` where it differs.
        learning_rates (`dict`):
            By cell (`task/family`), then by arm; `default` stands for the arms that are not named.
        warm_start_seeds (`list`):
            Warm starts of each cell. Seed s begins with number s modulo their count.
        stages (`list`):
            In order of importance, each with `cells`, `arms`, `seeds`, and optionally `learning_rates` to try in
            place of the set ones, or `measure: true` to measure the checkpoints (`warm_start` among the arms) instead
            of training.
    """

    tasks: dict[str, dict[str, Any]]
    families: dict[str, dict[str, Any]]
    training: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    learning_rates: dict[str, dict[str, float]]
    warm_start_seeds: list[int]
    stages: list[dict[str, Any]]

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        return cls(**yaml.safe_load(Path(path).read_text()))

    def jobs(self) -> list[Job]:
        """All jobs in the order in which they are to be done, without repetitions."""
        jobs: dict[Job, None] = {}
        for stage in self.stages:
            for seed in stage["seeds"]:
                for cell in stage["cells"]:
                    task, family = cell.split("/")
                    warm = self.warm_start_seeds[seed % len(self.warm_start_seeds)]
                    jobs[Job("warm_start", task, family, warm, warm)] = None
                    kind = "measure" if stage.get("measure") else "train"
                    for arm in stage["arms"]:
                        if arm == "warm_start":
                            jobs[Job(kind, task, family, seed, warm)] = None
                            continue
                        for rate in stage.get("learning_rates") or [self.learning_rate(cell, arm)]:
                            jobs[Job(kind, task, family, seed, warm, arm, float(rate))] = None
        return list(jobs)

    def learning_rate(self, cell: str, arm: str) -> float:
        rates = self.learning_rates[cell]
        return float(rates.get(arm, rates["default"]))

    def budgets(self, task: str, arm: str) -> list[int]:
        """The budgets of an arm: evenly spaced, or by `budget_fractions` of the task's full budget."""
        full, settings = self.tasks[task]["full_budget"], self.arms[arm]
        if "budget_fractions" in settings:
            return [round(full * fraction) for fraction in settings["budget_fractions"]]
        return even_budgets(full, settings["num_budgets"])

    def eval_budgets(self, task: str) -> list[int]:
        """The grid on which accuracy is shown: eighths of the full budget."""
        full = self.tasks[task]["full_budget"]
        return [full * eighths // 8 for eighths in (1, 2, 3, 4, 6, 8)]


def even_budgets(full: int, count: int) -> list[int]:
    """`count` evenly spaced budgets up to `full` tokens."""
    return [full * (j + 1) // count for j in range(count)]
