"""Plots of an evaluation's questions, and of the checkpoints of a run. They need matplotlib."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from ..evaluation.over_steps import shown_budgets
from ..evaluation.stability import RIGHT_AT, first_stable, flips
from ..outside.display import for_plot
from .plots import WITHOUT_TEX

_BOUNDARY = "tab:orange"


@WITHOUT_TEX
def plot_questions(results: dict[str, Any], path: Path) -> None:
    """
    Plot which questions are right at which budgets, with a panel for each data set.

    Questions are sorted by the first budget from which they stay right. A line marks that budget. What is dark below
    the line was right too early, and was lost again.

    Args:
        results (`dict`):
            Results of `trl-anytime eval`.
        path (`Path`):
            Path of the picture.
    """
    budgets, right_at = results["protocol"]["budgets"], results.get("right_at", RIGHT_AT)
    sets = {name: np.array(values) for name, values in results["questions"].items()}
    # A user's reward may have other bounds than 0 and 1
    low = min(0, *(values_QM.min() for values_QM in sets.values()))
    high = max(1, *(values_QM.max() for values_QM in sets.values()))
    figure = Figure(figsize=(1.2 + 4 * len(sets), 5), layout="constrained")
    all_axes = figure.subplots(1, len(sets), squeeze=False)[0]
    for axes, (name, values_QM) in zip(all_axes, sets.items(), strict=True):
        right_QM = values_QM >= right_at
        first = [len(budgets) if b is None else budgets.index(b) for b in first_stable(right_QM, budgets)]
        order = sorted(range(len(first)), key=lambda q: (first[q], -values_QM[q].mean()))
        image = axes.imshow(
            values_QM[order], aspect="auto", interpolation="nearest", cmap="Blues", vmin=low, vmax=high
        )
        # The edge of row q is at q - 0.5, that of column j at j - 0.5
        edges = np.array([first[q] for q in order]) - 0.5
        axes.step([edges[0], *edges], np.arange(len(order) + 1) - 0.5, where="pre", color=_BOUNDARY)
        ticks = shown_budgets(budgets)
        axes.set_xticks(ticks, [str(budgets[j]) for j in ticks])
        axes.set_xlim(-0.5, len(budgets) - 0.5 + 0.15)  # the line of what never stays right
        axes.set_yticks([])
        flipped = int((flips(right_QM) > 0).sum())
        axes.set_title(f"{for_plot(name)}: {flipped} of {len(order)} flip")
        axes.set(xlabel="thinking budget (tokens)", ylabel=f"{len(order)} questions")
    figure.colorbar(image, ax=all_axes, label="mean reward")
    figure.savefig(path, dpi=150)


@WITHOUT_TEX
def plot_checkpoints(
    by_step: Mapping[int, dict[str, Any]], path: Path, baseline: dict[str, Any] | None = None
) -> None:
    """
    Plot curves over training, with a column of panels for each data set.

    Above are the curves against budgets, coloured by step, and the frontier as a dashed line if there is one. Below is
    the accuracy at each budget against steps.

    Args:
        by_step (`Mapping[int, dict]`):
            Results of a run's checkpoints by their steps.
        path (`Path`):
            Path of the picture.
        baseline (`dict`, *optional*):
            Results that are drawn in gray.
    """
    first = next(iter(by_step.values()))
    steps, budgets, names = list(by_step), first["protocol"]["budgets"], list(first["curves"])
    of_steps = _shades(steps, "viridis_r", Normalize)
    of_budgets = _shades(budgets, "plasma_r", LogNorm)  # most budgets may be small ones
    figure = Figure(figsize=(1.2 + 4.3 * len(names), 7), layout="constrained")
    upper, lower = figure.subplots(2, len(names), squeeze=False)
    for above, below, name in zip(upper, lower, names, strict=True):
        curves = {step: [e["mean"] for e in results["curves"][name]["accuracy"]] for step, results in by_step.items()}
        if baseline is not None and name in baseline["curves"]:
            before = [e["mean"] for e in baseline["curves"][name]["accuracy"]]
            label = for_plot(baseline["protocol"]["model"])
            above.plot(baseline["protocol"]["budgets"], before, "o--", ms=3, color="gray", label=label)
        for curve, color in zip(curves.values(), of_steps.to_rgba(np.array(steps)), strict=True):
            above.plot(budgets, curve, "o-", ms=3, color=color)
        frontiers = [results["frontier"][name] for results in by_step.values() if name in results.get("frontier", {})]
        if frontiers:
            above.plot(*zip(*frontiers[-1], strict=True), "k--", lw=1, label="frontier")
        if above.get_legend_handles_labels()[0]:
            above.legend(loc="lower right", fontsize="small")
        at_budgets = zip(*curves.values(), strict=True)
        for means, color in zip(at_budgets, of_budgets.to_rgba(np.array(budgets)), strict=True):
            below.plot(steps, means, "o-", ms=3, color=color)
        above.set(title=for_plot(name), xlabel="thinking budget (tokens)", ylabel="accuracy")
        below.set(xlabel="step", ylabel="accuracy")
        for axes in (above, below):
            if all(0 <= mean <= 1 for curve in curves.values() for mean in curve):
                axes.set_ylim(0, 1)
            axes.grid(alpha=0.3)
    figure.colorbar(of_steps, ax=upper, label="step")
    bar = figure.colorbar(of_budgets, ax=lower, label="thinking budget (tokens)")
    shown = [budgets[j] for j in shown_budgets(budgets)]
    bar.set_ticks(shown, labels=list(map(str, shown)))
    bar.ax.minorticks_off()
    figure.savefig(path, dpi=150)


def _shades(numbers: list[int], name: str, norm: type[Normalize]) -> ScalarMappable:
    """Return colours of numbers, the larger the darker, from those of matplotlib that have a name."""
    low, high = min(numbers), max(numbers)
    # The lightest shades cannot be seen on white
    shades = ListedColormap(colormaps[name](np.linspace(0.15, 1, 256)))
    return ScalarMappable(norm(low if low < high else low / 2, high if high > 0 else 1), shades)
