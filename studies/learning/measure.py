"""
How well each baseline predicts the returns, and how noisy the gradient is with it, on one checkpoint.

The baselines are those of training, which compare a trace with a group that contains it (`v2`, `brpo`), and the
same with the mean of the *other* traces (`v2_others`, `brpo_others`): a mean that contains the sample shrinks the
advantage by 1 - 1/G, and with it every variance, without making the gradient any less noisy. `adaptive` is fitted on
one half of the prompts; everything is judged on the other half.

Where a study asks for it, the gradient is also measured with rewards by likelihood, on the same traces and beside that
with sampled summaries.

Dimensions: P prompts, G traces per prompt (the group), M budgets, A summaries per trace and budget.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from examples import toy_task
from trl_anytime import BRPOTrainer
from trl_anytime.method.adaptive_baseline import AdaptiveBaseline, leave_one_out_mean
from trl_anytime.method.advantages import (
    OBJECTIVE,
    Returns,
    baseline_diagnostics,
    segment_returns,
    summary_advantages,
    summary_weights,
)
from trl_anytime.method.budgets import nonempty_segments, prior_weights
from trl_anytime.method.likelihood import likelihood_advantages
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.rollout.backend import Generation, RolloutSettings
from trl_anytime.rollout.types import Rollout, Thinking

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
    """Rewards (P, G, M, A), cuts (P, G, M), the batch that the trainer would train on, and its traces (P * G)."""

    rewards: torch.Tensor
    cuts: torch.Tensor
    batch: dict[str, Any]
    traces: list[Thinking] = field(repr=False)

    @property
    def packed(self) -> PackedRollouts:
        return PackedRollouts(self.batch["completion_ids"], self.batch["cuts"], self.batch["spans"])


class Recorder(BRPOTrainer):
    """Keeps the traces, rewards and cuts of its last generation batch."""

    def _log_batch(self, mode, batch, advantages, rewards_PGMA, cuts_PGM):
        self.recorded = [rollout.thinking for rollout in batch.rollouts], rewards_PGMA, cuts_PGM
        super()._log_batch(mode, batch, advantages, rewards_PGMA, cuts_PGM)


class Replay(Generation):
    """Cuts given traces in place of new ones, and samples nothing."""

    def __init__(self, traces: Sequence[Thinking]):
        super().__init__()
        self.traces = traces

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        assert settings.num_summaries == 0
        return [
            Rollout.from_budgets(ids, trace, settings.budgets, settings.markers, [[] for _ in settings.budgets])
            for ids, trace in zip(prompt_ids, self.traces, strict=True)
        ]


def measure(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Variances for all priors, numbers of budgets and group sizes, and the gradient's at the setting of the arms."""
    assert job.requires is not None
    checkpoint = output_dir.parent / job.requires.name
    set_seed(job.seed)
    settings = study.training["measure"]
    group, full = study.training["num_generations"], study.tasks[job.task]["full_budget"]

    def recorder(**brpo_settings: Any) -> Recorder:
        trainer = make_trainer(
            study,
            job,
            AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32"),
            PreTrainedTokenizerFast.from_pretrained(checkpoint),
            output_dir,
            Recorder,
            prune=False,  # what one baseline does not need, another one does
            max_completion_length=full,  # the loss divides by it, and would by the longest packed row of each reward
            **brpo_settings,
        )
        assert isinstance(trainer, Recorder)
        return trainer

    rolled_out = max(NUM_BUDGETS) if settings["group_sizes"] else NUM_BUDGETS[0]
    trainer = recorder(budgets=even_budgets(full, rolled_out), num_summaries=NUM_SUMMARIES)
    rng = random.Random(f"{job.task} {job.seed} measure")
    held_out = {problem.question for problem in make_held_out(study, job)}
    problems = toy_task.make_problems(TASKS[job.task], 2 * settings["prompts"], rng, held_out)
    halves = problems[: settings["prompts"]], problems[settings["prompts"] :]
    fit, judged = (roll_out(trainer, half, group) for half in halves)
    record: dict[str, Any] = {"variance": []}
    for num_budgets in NUM_BUDGETS:
        for group_size in settings["group_sizes"]:
            for prior in PRIORS:
                of_setting = (select(rollouts, num_budgets, group_size, rolled_out) for rollouts in (fit, judged))
                budgets = even_budgets(full, num_budgets)
                name = {"num_budgets": num_budgets, "group_size": group_size, "prior": prior}
                record["variance"].append({**name, **variance_record(*of_setting, budgets, prior)})
    record["gradient"] = {
        prior: gradient_record(trainer, fit, judged, even_budgets(full, 4), prior, settings["gradient_prompts"])
        for prior in settings["gradient_priors"]
    }
    if "likelihood_budgets" in settings:
        sampled = [select(rollouts, NUM_BUDGETS[0], group, rolled_out) for rollouts in (fit, judged)]
        by_budgets: dict[int, tuple[Recorder, Rollouts, Rollouts]] = {}
        for num_budgets in settings["likelihood_budgets"]:
            scorer = recorder(
                budgets=even_budgets(full, num_budgets),
                num_summaries=1,
                summary_reward="likelihood",
                reference_template="{answer}",
            )
            rescored = [
                roll_out(scorer, half, group, rollouts.traces) for half, rollouts in zip(halves, sampled, strict=True)
            ]
            by_budgets[num_budgets] = scorer, rescored[0], rescored[1]
        record["likelihood"] = {
            prior: likelihood_record(trainer, judged, sampled, by_budgets, full, prior, settings["gradient_prompts"])
            for prior in settings["likelihood_priors"]
        }
    return record


def roll_out(trainer: Recorder, problems: list[Any], group: int, traces: Sequence[Thinking] | None = None) -> Rollouts:
    """One generation batch of the trainer, as it would train on it; `traces` stand in for new ones."""
    rows = [row for row in toy_task.make_rl_dataset(problems) for _ in range(group)]
    if traces is not None:
        trainer.generation = Replay(traces)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(rows)
    traces, rewards, cuts = trainer.recorded
    return Rollouts(rewards.float(), cuts, batch, traces)


def select(rollouts: Rollouts, num_budgets: int, group_size: int, rolled_out: int) -> Rollouts:
    """The same rollouts, looked at with fewer budgets, in smaller groups."""
    step = rolled_out // num_budgets
    parts = (x[:, :group_size, step - 1 :: step] for x in (rollouts.rewards, rollouts.cuts))
    return Rollouts(*parts, rollouts.batch, rollouts.traces)


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
    group, rolled_out = judged.rewards.shape[1:3]
    fit, chosen = (select(rollouts, len(budgets), group, rolled_out) for rollouts in (fit, judged))
    segments = segment_returns(chosen.rewards, budgets, prior)
    adaptive = fitted_adaptive(fit, budgets, prior).predict(chosen.rewards, segments)
    no_summaries, no_thinking = torch.zeros_like(judged.rewards), torch.zeros_like(segments.returns)
    parts = {name: (segments.returns - V, no_summaries) for name, V in baselines(segments, budgets, adaptive).items()}
    of_all, of_last = no_summaries.clone(), no_summaries.clone()
    step = rolled_out // len(budgets)
    of_all[:, :, step - 1 :: step] = summary_advantages(chosen.rewards, chosen.cuts)
    of_last[..., -1, :1] = summary_advantages(chosen.rewards[..., :1], chosen.cuts, "final")[..., -1, :]
    parts |= {"summaries": (no_thinking, of_all), "last_summary": (no_thinking, of_last)}
    trace, signal = _noise(trainer, judged, budgets, parts, num_prompts)
    return {"noise": _in_units(trace, trace["none"]), "signal": _in_units(signal, trace["none"])}


def likelihood_record(
    trainer: BRPOTrainer,
    judged: Rollouts,
    sampled: Sequence[Rollouts],
    by_budgets: Mapping[int, tuple[BRPOTrainer, Rollouts, Rollouts]],
    full: int,
    prior: str,
    num_prompts: int,
) -> list[dict[str, Any]]:
    """
    Noise and signal of the gradient with sampled summaries and with rewards by likelihood, on the same traces.

    All are in units of the noise of the thinking's gradient with sampled summaries and no baseline. `answers` is the
    gradient of summaries or reference answers with the objective's weight, `all` that of the thinking with the
    baseline `brpo_others` and of the answers together. `tokens` are the packed tokens of a rollout.

    Args:
        trainer ([`BRPOTrainer`]):
            Trainer of the sampled batch.
        judged ([`Rollouts`]):
            The batch with sampled summaries, with all budgets that were rolled out.
        sampled (`Sequence[Rollouts]`):
            The batches that fit and judge, with the budgets that count.
        by_budgets (`Mapping`):
            For each number of budgets a trainer with rewards by likelihood, and the batches that fit and judge.
        full (`int`):
            The full budget in tokens.
        prior (`str`):
            Prior over budgets.
        num_prompts (`int`):
            Prompts to take gradients of.
    """
    num_budgets, num_summaries = sampled[1].rewards.shape[2:]
    budgets, step = even_budgets(full, num_budgets), judged.rewards.size(2) // num_budgets
    weights = summary_weights(OBJECTIVE, budgets, prior, num_summaries)
    summaries = torch.zeros_like(judged.rewards)
    summaries[:, :, step - 1 :: step] = summary_advantages(sampled[1].rewards, sampled[1].cuts, weights=weights)
    parts = _thinking_and_answers(*sampled, budgets, prior, summaries)
    trace, signal = _noise(trainer, judged, budgets, parts, num_prompts)
    unit = trace["none"]
    packed = judged.packed
    branches = (packed.spans[..., 2] - packed.spans[..., 0])[:, step - 1 :: step].sum(dim=(1, 2))
    tokens = float((packed.thinking_lengths + branches).float().mean())
    rows = [("sampled", num_budgets, tokens, trace, signal)]
    for number, (scorer, fit, chosen) in by_budgets.items():
        budgets, packed = even_budgets(full, number), chosen.packed
        lengths = packed.summary_lengths().view(chosen.rewards.shape)[..., 0]
        answers = likelihood_advantages("likelihood", chosen.rewards[..., 0], lengths, prior_weights(prior, budgets))
        parts = _thinking_and_answers(fit, chosen, budgets, prior, answers.unsqueeze(-1))
        trace, signal = _noise(scorer, chosen, budgets, parts, num_prompts)
        rows.append(("likelihood", number, float(packed.lengths.float().mean()), trace, signal))
    return [
        {
            "reward": reward,
            "num_budgets": number,
            "tokens": round(tokens, 2),
            "noise": _in_units(trace, unit),
            "signal": _in_units(signal, unit),
        }
        for reward, number, tokens, trace, signal in rows
    ]


def _thinking_and_answers(
    fit: Rollouts, judged: Rollouts, budgets: list[int], prior: str, answers: torch.Tensor
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Advantages of thinking and of answers by the name of the gradient's part."""
    segments = segment_returns(judged.rewards, budgets, prior)
    adaptive = fitted_adaptive(fit, budgets, prior).predict(judged.rewards, segments)
    thinking = {name: segments.returns - V for name, V in baselines(segments, budgets, adaptive).items()}
    nothing = torch.zeros_like(answers)
    parts = {name: (thinking[name], nothing) for name in ("none", "v2_others", "brpo_others", "adaptive")}
    return parts | {
        "answers": (torch.zeros_like(segments.returns), answers),
        "all": (thinking["brpo_others"], answers),
    }


def _noise(
    trainer: BRPOTrainer,
    rollouts: Rollouts,
    budgets: list[int],
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    num_prompts: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """
    Trace of the gradient's covariance over prompts, and squared norm of its mean, by the name of the part.

    `parts` has advantages of the segments between `budgets`, shape (P, G, M), and of all branches of the batch.
    """
    trace, signal, group = {}, {}, rollouts.rewards.size(1)
    for name, (thinking, answers) in parts.items():
        advantages = rollouts.packed.token_advantages(thinking.flatten(0, 1), answers.flatten(0, 1), budgets)
        total, squares = torch.zeros(()), 0.0
        for prompt in range(num_prompts):
            gradient = _gradient(trainer, {**rollouts.batch, "advantages": advantages}, prompt * group, group)
            total = total + gradient
            squares += float(gradient.square().sum())
        mean = float((total / num_prompts).square().sum())
        trace[name] = (squares - num_prompts * mean) / (num_prompts - 1)
        signal[name] = mean - trace[name] / num_prompts
    return trace, signal


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


def _in_units(values: Mapping[str, float], unit: float) -> dict[str, Any]:
    return {name: _plain(torch.tensor(value) / unit) for name, value in values.items()}


def _plain(x: torch.Tensor) -> Any:
    """Nested lists of four digits, `None` where undefined."""
    if x.dim() == 0:
        return float(f"{x.item():.4g}") if x.isfinite() else None
    return [_plain(row) for row in x]
