"""
How well each baseline predicts the returns, and how noisy the gradient is with it, on one checkpoint.

The baselines are those of training, which compare a trace with a group that contains it (`v2`, `brpo`), and the
same with the mean of the *other* traces (`v2_others`, `brpo_others`): a mean that contains the sample shrinks the
advantage by 1 - 1/G, and with it every variance, without making the gradient any less noisy. `adaptive` is fitted on
one half of the prompts; everything is judged on the other half.

Dimensions: P prompts, G traces per prompt (the group), M budgets, A summaries per trace and budget.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from examples import toy_task
from trl_anytime import BRPOTrainer
from trl_anytime.method.adaptive_baseline import AdaptiveBaseline, leave_one_out_mean
from trl_anytime.method.advantages import Returns, baseline_diagnostics, segment_returns, summary_advantages
from trl_anytime.method.budgets import nonempty_segments
from trl_anytime.method.packing import PackedRollouts

from .study import Job, Study, even_budgets
from .tasks import TASKS
from .training import make_held_out, make_trainer

PRIORS = ("uniform", "linear", "base")
# Rolled out at the largest number; budgets of the smaller ones are among its own
NUM_BUDGETS = (4, 8)
NUM_SUMMARIES = 4
_RESAMPLES = 200


@dataclass(frozen=True)
class Rollouts:
    """Rewards (P, G, M, A), cuts (P, G, M), and the batch that the trainer would train on."""

    rewards: torch.Tensor
    cuts: torch.Tensor
    batch: dict[str, Any]


def measure(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Variances for all priors, numbers of budgets and group sizes, and the gradient's at the setting of the arms."""
    assert job.requires is not None
    checkpoint = output_dir.parent / job.requires.name
    set_seed(job.seed)
    settings = study.training["measure"]
    group, full = study.training["num_generations"], study.tasks[job.task]["full_budget"]
    trainer = make_trainer(
        study,
        job,
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"),
        PreTrainedTokenizerFast.from_pretrained(checkpoint),
        output_dir,
        budgets=even_budgets(full, max(NUM_BUDGETS)),
        num_summaries=NUM_SUMMARIES,
    )
    rng = random.Random(f"{job.task} {job.seed} measure")
    held_out = {problem.question for problem in make_held_out(study, job)}
    problems = toy_task.make_problems(TASKS[job.task], 2 * settings["prompts"], rng, held_out)
    fit, judged = (
        roll_out(trainer, problems[start : start + settings["prompts"]], group) for start in (0, settings["prompts"])
    )
    record: dict[str, Any] = {"variance": []}
    for num_budgets in NUM_BUDGETS:
        for group_size in settings["group_sizes"]:
            for prior in PRIORS:
                of_setting = (
                    select(rollouts, num_budgets, group_size, max(NUM_BUDGETS)) for rollouts in (fit, judged)
                )
                budgets = even_budgets(full, num_budgets)
                name = {"num_budgets": num_budgets, "group_size": group_size, "prior": prior}
                record["variance"].append({**name, **variance_record(*of_setting, budgets, prior)})
    record["gradient"] = {
        prior: gradient_record(trainer, fit, judged, even_budgets(full, 4), prior, settings["gradient_prompts"])
        for prior in settings["gradient_priors"]
    }
    return record


def roll_out(trainer: BRPOTrainer, problems: list[Any], group: int) -> Rollouts:
    """One generation batch of the trainer, as it would train on it."""
    rewards: list[float] = []

    def recorded(*args, **kwargs):
        rewards.extend(toy_task.end_of_chain_reward(*args, **kwargs))
        return rewards[-len(kwargs["well_formed"]) :]

    trainer.reward_funcs = [recorded]
    rows = [row for row in toy_task.make_rl_dataset(problems) for _ in range(group)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    cuts = batch["cuts"].view(len(problems), group, -1)
    return Rollouts(torch.tensor(rewards).view(*cuts.shape, -1), cuts, batch)


def select(rollouts: Rollouts, num_budgets: int, group_size: int, rolled_out: int) -> Rollouts:
    """The same rollouts, looked at with fewer budgets, in smaller groups."""
    step = rolled_out // num_budgets
    parts = (x[:, :group_size, step - 1 :: step] for x in (rollouts.rewards, rollouts.cuts))
    return Rollouts(*parts, rollouts.batch)


def baselines(segments: Returns, budgets: list[int], adaptive: torch.Tensor) -> dict[str, torch.Tensor]:
    """All baselines by name, each of shape (P, G, M)."""
    others = leave_one_out_mean(segments.returns)
    group_share = 1 - torch.tensor([0, *budgets[:-1]]) / budgets[-1]
    return {
        "none": torch.zeros_like(segments.returns),
        "v1": segments.v1,
        "v2": segments.v2,
        "brpo": segments.brpo,
        "v2_others": others,
        "brpo_others": segments.brpo + group_share * (others - segments.v2),
        "adaptive": adaptive,
    }


def fitted_adaptive(fit: Rollouts, budgets: list[int], prior: str) -> AdaptiveBaseline:
    adaptive = AdaptiveBaseline(len(budgets))
    adaptive.update(fit.rewards, segment_returns(fit.rewards, budgets, prior), nonempty_segments(fit.cuts, budgets))
    return adaptive


def variance_record(fit: Rollouts, judged: Rollouts, budgets: list[int], prior: str) -> dict[str, Any]:
    """Var[R - V] / Var[R] and Corr[V, R] by segment, with 95 % intervals of what `adaptive` gains on the others."""
    segments = segment_returns(judged.rewards, budgets, prior)
    adaptive = fitted_adaptive(fit, budgets, prior)
    predictions = baselines(segments, budgets, adaptive.predict(judged.rewards, segments))
    live = nonempty_segments(judged.cuts, budgets)

    def diagnostics(prompts: Any) -> dict[str, dict[str, torch.Tensor]]:
        chosen = Returns(*(x[prompts] for x in vars(segments).values()))
        return baseline_diagnostics(chosen, live[prompts], {name: V[prompts] for name, V in predictions.items()})

    exact = diagnostics(slice(None))
    generator = torch.Generator().manual_seed(0)
    num_prompts = len(live)
    resampled = [
        diagnostics(torch.randint(num_prompts, (num_prompts,), generator=generator))["variance_ratio"]
        for _ in range(_RESAMPLES)
    ]
    gains = {
        name: torch.stack([ratio["adaptive"] - ratio[name] for ratio in resampled]).nanquantile(
            torch.tensor([0.025, 0.975]), dim=0
        )
        for name in ("v1", "v2_others", "brpo_others")
    }
    starts = torch.tensor([0, *budgets[:-1]])
    lengths = (judged.cuts - starts).clamp(min=0)
    R = segments.returns
    mean_M = torch.where(live, R, 0.0).sum(dim=(0, 1)) / live.sum(dim=(0, 1)).clamp(min=1)

    def token_mean(x_PGM: torch.Tensor) -> torch.Tensor:
        return (x_PGM * lengths).sum() / lengths.sum()

    return {
        "tokens": lengths.sum(dim=(0, 1)).tolist(),
        **{name: {k: _plain(v) for k, v in by_name.items()} for name, by_name in exact.items()},
        # Mean square advantage of a token, in units of the mean variance of its return
        "token_weighted": {
            name: _plain(token_mean((R - V) ** 2) / token_mean((R - mean_M) ** 2)) for name, V in predictions.items()
        },
        "adaptive_minus": {name: _plain(bounds.T) for name, bounds in gains.items()},
    }


def gradient_record(
    trainer: BRPOTrainer, fit: Rollouts, judged: Rollouts, budgets: list[int], prior: str, num_prompts: int
) -> dict[str, Any]:
    """
    Noise of the thinking's gradient: the trace of its covariance over prompts, by baseline, in units of that without
    a baseline; and the squared norm of its mean in the same units, corrected for the noise in it. The same for the
    gradient of the summaries, all as in BRPO (`summaries`), and only the last one as in GRPO (`last_summary`).
    """
    batch, (_, group, rolled_out, _) = judged.batch, judged.rewards.shape
    fit, chosen = (select(rollouts, len(budgets), group, rolled_out) for rollouts in (fit, judged))
    segments = segment_returns(chosen.rewards, budgets, prior)
    adaptive = fitted_adaptive(fit, budgets, prior).predict(chosen.rewards, segments)
    packed = PackedRollouts(batch["completion_ids"], batch["cuts"], batch["spans"])
    no_summaries, no_thinking = torch.zeros_like(judged.rewards), torch.zeros_like(segments.returns)
    parts = {name: (segments.returns - V, no_summaries) for name, V in baselines(segments, budgets, adaptive).items()}
    of_all, of_last = no_summaries.clone(), no_summaries.clone()
    step = rolled_out // len(budgets)
    of_all[:, :, step - 1 :: step] = summary_advantages(chosen.rewards, chosen.cuts)
    of_last[..., -1, :1] = summary_advantages(chosen.rewards[..., :1], chosen.cuts, "final")[..., -1, :]
    parts |= {"summaries": (no_thinking, of_all), "last_summary": (no_thinking, of_last)}

    trace, signal = {}, {}
    for name, (thinking, summary) in parts.items():
        advantages = packed.token_advantages(thinking.flatten(0, 1), summary.flatten(0, 1), budgets)
        total = squares = 0.0
        for prompt in range(num_prompts):
            gradient = _gradient(trainer, {**batch, "advantages": advantages}, prompt * group, group)
            total = total + gradient
            squares += float(gradient.square().sum())
        mean = total / num_prompts
        trace[name] = (squares - num_prompts * float(mean.square().sum())) / (num_prompts - 1)
        signal[name] = float(mean.square().sum()) - trace[name] / num_prompts
    unit = torch.tensor(trace["none"])
    return {
        "noise": {name: _plain(value / unit) for name, value in trace.items()},
        "signal": {name: _plain(value / unit) for name, value in signal.items()},
    }


def _gradient(trainer: BRPOTrainer, batch: dict[str, Any], start: int, count: int) -> torch.Tensor:
    """The gradient of the loss over the rows of one prompt."""
    rows = {
        name: value[start : start + count] if isinstance(value, torch.Tensor) and value.dim() > 0 else value
        for name, value in batch.items()
    }
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`
    trainer.compute_loss(trainer.model, rows).backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()
    return torch.cat(gradients)


def _plain(x: torch.Tensor) -> Any:
    """Nested lists of four digits, `None` where undefined."""
    if x.dim() == 0:
        return float(f"{x.item():.4g}") if x.isfinite() else None
    return [_plain(row) for row in x]
