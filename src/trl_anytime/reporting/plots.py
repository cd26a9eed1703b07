"""Plots of curves. They need matplotlib, which the extra `plot` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure

from ..evaluation.statistics import Estimate
from ..outside.display import for_plot
from .learning_curves import LENGTH, Curve, evaluations, rewards_in_training

# Overrides the user's own settings, because TeX would run commands in a name
WITHOUT_TEX = rc_context({"text.usetex": False})


@WITHOUT_TEX
def plot_results(results: Sequence[dict[str, Any]], path: Path, labels: Sequence[str] | None = None) -> None:
    """
    Plot accuracy against budget with confidence bands.

    There is a panel for each data set, and a curve for each result. The frontier of the last result that has one is a
    dashed line.

    Args:
        results (`Sequence[dict]`):
            Results of `trl-anytime eval`.
        path (`Path`):
            Path of the picture.
        labels (`Sequence[str]`, *optional*):
            Names of the curves. Defaults to the names of the models.

    Raises:
        `ValueError`: If there is not one label for each result.
    """
    labels = [result["protocol"]["model"] for result in results] if labels is None else labels
    if len(labels) != len(results):
        raise ValueError(f"There are {len(results)} results and {len(labels)} labels. Give one label for each.")
    groups = list(dict.fromkeys(group for result in results for group in result["curves"]))
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        for result, label in zip(results, labels, strict=True):
            if group not in result["curves"]:
                continue
            budgets = result["protocol"]["budgets"]
            curve = [Estimate(e["mean"], e["low"], e["high"]) for e in result["curves"][group]["accuracy"]]
            (line,) = axes.plot(budgets, [e.mean for e in curve], "o-", ms=3, label=for_plot(label))
            axes.fill_between(
                budgets, [e.low for e in curve], [e.high for e in curve], color=line.get_color(), alpha=0.15
            )
        frontiers = [result["frontier"][group] for result in results if group in result.get("frontier", {})]
        if frontiers:
            axes.plot(*zip(*frontiers[-1], strict=True), "k--", lw=1, label="frontier")
        drawn = [e for result in results for e in result["curves"].get(group, {"accuracy": ()})["accuracy"]]
        if all(e["low"] >= 0 and e["high"] <= 1 for e in drawn):  # a user's reward may have other bounds
            axes.set_ylim(0, 1)
        axes.set(title=for_plot(group), xlabel="thinking budget (tokens)", ylabel="accuracy")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150)


@WITHOUT_TEX
def plot_change(panels: Mapping[str, Mapping[str, Curve]], metric: str, path: Path) -> None:
    """
    Plot rewards against budget before and after training, with a panel per set of problems.

    Args:
        panels (`Mapping[str, Mapping[str, Curve]]`):
            Curves by label for each title of a panel, in the order of their steps.
        metric (`str`):
            Name of the rewards.
        path (`Path`):
            Path of the picture.
    """
    figure, all_axes = _row_of_panels(len(panels))
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=True):
        # All but the last curve are gray
        styles = [("o--", "tab:gray")] * (len(curves) - 1) + [("o-", "tab:blue")]
        for (label, curve), (line, color) in zip(curves.items(), styles, strict=True):
            axes.plot(
                list(curve.rewards), list(curve.rewards.values()), line, color=color, ms=4, label=for_plot(label)
            )
        axes.set_title(for_plot(title))
        axes.set(xlabel="thinking budget (tokens)", ylabel=for_plot(metric))
        if metric == "accuracy":
            axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_training(log_history: Sequence[dict[str, Any]], path: Path) -> None:
    """
    Save [`training_figure`] as a file.

    Args:
        log_history (`Sequence[dict]`):
            `log_history` of a `trainer_state.json`.
        path (`Path`):
            Path of the picture.

    Raises:
        `ValueError`: If no rewards at budgets were logged.
    """
    training_figure(log_history).savefig(path, dpi=120)


@WITHOUT_TEX
def training_figure(log_history: Sequence[dict[str, Any]]) -> Figure:
    """
    Plot a training run over its steps.

    It shows the mean reward at each budget, on training prompts and in the evaluations of each set. It also shows the
    length of the traces.

    Args:
        log_history (`Sequence[dict]`):
            `log_history` of a [`~transformers.TrainerState`].

    Raises:
        `ValueError`: If no rewards at budgets were logged.
    """
    panels = {"training samples": rewards_in_training(log_history)}
    panels |= {f"evaluation {name}".strip(): curves for name, curves in evaluations(log_history).items()}
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        raise ValueError("The training run logged no `anytime/reward@…`. Give the log of a run of `BRPOTrainer`.")
    lengths = [(log["step"], log[LENGTH]) for log in log_history if log.get(LENGTH) is not None]
    figure, all_axes = _row_of_panels(len(panels) + bool(lengths))
    for axes, (title, curves) in zip(all_axes, panels.items(), strict=False):
        for budget in sorted({budget for curve in curves for budget in curve.rewards}):
            points = [(curve.step, curve.rewards[budget]) for curve in curves if budget in curve.rewards]
            axes.plot(*zip(*points, strict=True), ".-", ms=4, label=f"{budget} tokens")
        axes.set_title(for_plot(title))
        axes.set(xlabel="step", ylabel="mean reward")
        axes.legend(fontsize="small")
    if lengths:
        all_axes[-1].plot(*zip(*lengths, strict=True), ".-", ms=4)
        all_axes[-1].set(title="training samples", xlabel="step", ylabel="thinking length (tokens)")
    for axes in all_axes:
        axes.grid(alpha=0.3)
    return figure


@WITHOUT_TEX
def evaluations_figure(curves: Sequence[Curve], title: str) -> Figure:
    """
    Plot mean reward against budget, with a line per evaluation of a set, from light to dark.

    Args:
        curves (`Sequence[Curve]`):
            Evaluations of the set. Of several at one step, the last is drawn.
        title (`str`):
            Title of the figure.
    """
    figure, (axes,) = _row_of_panels(1)
    by_step = sorted({curve.step: curve for curve in curves}.items())
    for i, (step, curve) in enumerate(by_step):
        named = i in (0, len(by_step) - 1)  # the shade tells the others apart
        axes.plot(
            list(curve.rewards),
            list(curve.rewards.values()),
            "o-",
            ms=3,
            color=colormaps["viridis_r"](0.15 + 0.85 * (i + 1) / len(by_step)),
            label=f"step {step}" if named else None,
        )
    axes.set_title(for_plot(title))
    axes.set(xlabel="thinking budget (tokens)", ylabel="mean reward")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _row_of_panels(count: int) -> tuple[Figure, Sequence[Any]]:
    """
    Return a figure and its axes.

    The layout is fixed, because a figure is drawn at every checkpoint and a computed layout takes twice the time.
    """
    width = 5 if count == 1 else 3.8 * count  # a page shrinks a wide picture together with its letters
    figure = Figure(figsize=(width, 4))
    figure.subplots_adjust(left=0.65 / width, right=1 - 0.15 / width, bottom=0.12, top=0.91, wspace=0.27)
    return figure, figure.subplots(1, count, squeeze=False)[0]
