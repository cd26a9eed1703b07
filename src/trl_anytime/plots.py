"""Curves as pictures. Needs matplotlib, the extra `plot`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .curves import Estimate


def plot_results(results: Sequence[dict[str, Any]], path: Path) -> None:
    """
    Accuracy against budget with confidence bands: a panel for each data set, a curve for each result.

    Args:
        results (`Sequence[dict]`):
            Results of `trl-anytime eval`.
        path (`Path`):
            The picture.
    """
    groups = list(dict.fromkeys(group for result in results for group in result["curves"]))
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for result in results:
            if group not in result["curves"]:
                continue
            budgets = result["protocol"]["budgets"]
            curve = [Estimate(**estimate) for estimate in result["curves"][group]["accuracy"]]
            (line,) = axes.plot(budgets, [e.mean for e in curve], "o-", ms=3, label=result["protocol"]["model"])
            axes.fill_between(
                budgets, [e.low for e in curve], [e.high for e in curve], color=line.get_color(), alpha=0.15
            )
        axes.set(title=group, xlabel="thinking budget (tokens)", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


def plot_training(log_history: Sequence[dict[str, Any]], path: Path) -> None:
    """
    [`training_figure`] as a file.

    Args:
        log_history (`Sequence[dict]`):
            `log_history` of a `trainer_state.json`.
        path (`Path`):
            The picture.

    Raises:
        `ValueError`: If there is no such metric in it.
    """
    training_figure(log_history).savefig(path, dpi=150)


def training_figure(log_history: Sequence[dict[str, Any]]) -> Figure:
    """
    A training run's mean reward at each budget over its steps, on training prompts and in its evaluations.

    Args:
        log_history (`Sequence[dict]`):
            `log_history` of a [`~transformers.TrainerState`].

    Raises:
        `ValueError`: If there is no such metric in it.
    """
    panels = {}
    for title, prefix in (("training", "anytime/reward@"), ("evaluation", "eval_anytime/reward@")):
        budgets = sorted(
            {int(key.removeprefix(prefix)) for log in log_history for key in log if key.startswith(prefix)}
        )
        if budgets:
            panels[title] = (prefix, budgets)
    if not panels:
        raise ValueError("The training run logged no `anytime/reward@…`: it was not one of BRPOTrainer.")
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (title, (prefix, budgets)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for budget in budgets:
            points = [(log["step"], log[f"{prefix}{budget}"]) for log in log_history if f"{prefix}{budget}" in log]
            axes.plot(*zip(*points, strict=True), label=f"{budget} tokens")
        axes.set(title=title, xlabel="step", ylabel="mean reward")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def evaluations_figure(curves: Mapping[int, Mapping[int, float]], title: str) -> Figure:
    """
    Mean reward against budget, a line for each evaluation, from light to dark.

    Args:
        curves (`Mapping[int, Mapping[int, float]]`):
            Mean reward by step and budget.
        title (`str`):
            Title.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (step, curve) in enumerate(sorted(curves.items())):
        named = i in (0, len(curves) - 1)  # those between can be told by their shade
        axes.plot(
            *zip(*sorted(curve.items()), strict=True),
            "o-",
            ms=3,
            color=colormaps["viridis_r"](0.15 + 0.85 * (i + 1) / len(curves)),
            label=f"step {step}" if named else None,
        )
    axes.set(title=title, xlabel="thinking budget (tokens)", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure
