"""The curves of several checkpoints of a run, as a table and as a file."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..outside.display import for_terminal
from ..outside.files import write_whole
from ..outside.tables import aligned
from .statistics import Estimate

_MOST_BUDGETS = 10  # of a printed table, or the labels of an axis
_COLUMNS = ("step", "dataset", "budget", "accuracy", "low", "high")


def save_curves(by_step: Mapping[int, dict[str, Any]], path: Path) -> None:
    """
    Write the curves to a CSV file, with a row for each step, data set and budget.

    Args:
        by_step (`Mapping[int, dict]`):
            Results of the checkpoints by their steps.
        path (`Path`):
            Path of the file. It is written completely or not at all.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for step, results in by_step.items():
        for name, curve in results["curves"].items():
            for budget, estimate in zip(results["protocol"]["budgets"], curve["accuracy"], strict=True):
                writer.writerow([step, name, budget, estimate["mean"], estimate["low"], estimate["high"]])
    write_whole(path, text.getvalue())


def shown_budgets(budgets: list[int], most: int = _MOST_BUDGETS) -> list[int]:
    """Return places of at most `most` budgets, evenly among all, with the first and the last."""
    if len(budgets) <= most:
        return list(range(len(budgets)))
    return [round(i * (len(budgets) - 1) / (most - 1)) for i in range(most)]


def table_over_steps(by_step: Mapping[int, dict[str, Any]]) -> str:
    """
    Return the curves of checkpoints as text.

    Rows are steps. Cells are accuracies in percent: at some budgets, of all data sets together, and the anytime
    average of each data set with the ends of its confidence interval.
    """
    first = next(iter(by_step.values()))
    budgets, names = first["protocol"]["budgets"], list(first["curves"])
    places = shown_budgets(budgets)
    rows = [
        [
            "step",
            *(f"at {budgets[j]}" for j in places),
            *(f"anytime {for_terminal(name, one_line=True)}" for name in names),
            "area",
            "index",
            "flipped",
        ]
    ]
    for step, results in by_step.items():
        curve = results["curves"][names[-1]]  # of all data sets
        index = curve["anytime_index"]
        rows.append(
            [
                str(step),
                *(f"{100 * curve['accuracy'][j]['mean']:.1f}" for j in places),
                *(Estimate(**results["curves"][name]["anytime_average"]).in_percent() for name in names),
                f"{100 * curve['area']['mean']:.1f}",
                "–" if index is None else f"{100 * index['mean']:.1f}",
                str(curve["stability"]["flipped"]),
            ]
        )
    return aligned(rows, left=())
