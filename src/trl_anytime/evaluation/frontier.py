"""
How far a curve is from a frontier: the reasoning efficiency gap of REO-RL (arXiv 2506.07104).

A frontier is the best accuracy that is known for each budget. It comes from a file of the user.
"""

import contextlib
import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..outside.validation import MEBIBYTE, Check, Unfit, fields, integer, list_of, number, read_json, read_text, string
from .areas import area_weights
from .statistics import Estimate, ResampledCurve

_MOST_POINTS = 10_000
_COLUMNS = ("budget", "accuracy", "dataset")


def _accuracy(value: Any, name: str) -> Any:
    """Check for an accuracy. Of a percentage the error says what to do."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 < value <= 100:
        raise Unfit(f"`{name}` must be a number from 0 to 1, got {value:g}. Divide percentages by 100.")
    return number(0, 1)(value, name)


_POINT = fields({"dataset": string(1000, least=1)}, budget=integer(0), accuracy=_accuracy)
# Part of results.json
FRONTIER: Check = list_of(list_of(number(0, 2**31), least=2, most=2), least=1, most=_MOST_POINTS)


@dataclass(frozen=True)
class Frontier:
    """
    Best known accuracy at some budgets. Between two of them it is a straight line, and beyond them it is not known.

    Args:
        budgets (`list[int]`):
            K increasing budgets.
        accuracies (`list[float]`):
            K accuracies.
    """

    budgets: list[int]
    accuracies: list[float]

    @property
    def points(self) -> list[list[float]]:
        """Return budgets and accuracies as K pairs, for a file."""
        return [[budget, accuracy] for budget, accuracy in zip(self.budgets, self.accuracies, strict=True)]

    def overlap(self, budgets: Sequence[int]) -> tuple[int, int] | None:
        """Return the range of budgets that a curve and the frontier share, or `None` if they share none."""
        low, high = max(budgets[0], self.budgets[0]), min(budgets[-1], self.budgets[-1])
        return (low, high) if low < high or (low == high and len(budgets) == 1) else None

    def gap(self, budgets: Sequence[int], curve: ResampledCurve) -> dict[str, Any]:
        """
        Estimate the gap of a curve to the frontier, over the budgets that both have.

        Args:
            budgets (`Sequence[int]`):
                Budgets b_1 … b_M of the curve.
            curve ([`ResampledCurve`]):
                The curve.

        Returns:
            `dict`: the ends of the range, `from` and `to`, the `mean` gap in accuracy, and its `area`. The area is the
                mean times the length of the range in tokens, about the sum over all its budgets. Both are negative
                where the curve is above the frontier.
        """
        overlap = self.overlap(budgets)
        assert overlap is not None
        best = area_weights(self.budgets, *overlap) @ np.array(self.accuracies)
        ours = curve.weighted(area_weights(budgets, *overlap))
        mean = Estimate(*(float(best - value) for value in (ours.mean, ours.high, ours.low)))
        length = overlap[1] - overlap[0]
        return {
            "from": overlap[0],
            "to": overlap[1],
            "mean": asdict(mean),
            "area": {name: length * value for name, value in asdict(mean).items()},
        }


def load_frontiers(path: Path, groups: Sequence[str], budgets: Sequence[int]) -> dict[str, Frontier]:
    """
    Read the frontiers of an evaluation.

    Args:
        path (`Path`):
            CSV file with the columns `budget`, `accuracy` and perhaps `dataset`, or JSON file with a list of such
            objects.
        groups (`Sequence[str]`):
            Names of the evaluation's curves. If there are several, each point names one in `dataset`.
        budgets (`Sequence[int]`):
            Budgets of the evaluation.

    Returns:
        `dict[str, Frontier]`: frontiers by data set. Those that the file does not name have none.

    Raises:
        `ValueError`: If the file does not fit. The message names the file and the field.
    """
    try:
        points = _read_json(path) if path.suffix == ".json" else _read_csv(path)
    except FileNotFoundError:
        raise Unfit(f"There is no file {path}. Give a CSV or JSON file with budgets and accuracies.") from None
    except OSError as error:
        raise Unfit(f"{path} cannot be read: {error}.") from error
    by_group: dict[str, dict[int, float]] = {}
    for point in points:
        group = _group_of(point, groups, path)
        if by_group.setdefault(group, {}).setdefault(point["budget"], point["accuracy"]) != point["accuracy"]:
            raise Unfit(f"{path} has two accuracies at budget {point['budget']} of {group!r}. Remove one.")
    found = {group: Frontier(sorted(at), [at[budget] for budget in sorted(at)]) for group, at in by_group.items()}
    for group, frontier in found.items():
        if frontier.overlap(budgets) is None:
            raise Unfit(
                f"{path} has budgets from {frontier.budgets[0]} to {frontier.budgets[-1]} for {group!r}, and the "
                f"evaluation has budgets from {budgets[0]} to {budgets[-1]}. Add points to the frontier, or set other "
                "--budgets."
            )
    return found


def _group_of(point: dict[str, Any], groups: Sequence[str], path: Path) -> str:
    named = point.get("dataset")
    if named is None and len(groups) > 1:
        raise Unfit(f"{path} does not say which curve it is for. Add `dataset` to each point: {', '.join(groups)}.")
    if named is not None and named not in groups:
        raise Unfit(f"{path}: `dataset` is {named!r}, but the curves are {', '.join(groups)}. Name one of them.")
    return groups[0] if named is None else named


def _read_json(path: Path) -> list[dict[str, Any]]:
    return read_json(path, list_of(_POINT, least=1, most=_MOST_POINTS), MEBIBYTE)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the points of a CSV file. Its first line names the columns."""
    try:
        rows = [row for row in csv.reader(io.StringIO(read_text(path, MEBIBYTE))) if any(map(str.strip, row))]
    except csv.Error as error:
        raise Unfit(f"{path} is not CSV: {error}.") from error
    header, *rows = [[cell.strip() for cell in row] for row in rows] or [[]]
    if not {"budget", "accuracy"} <= set(header) <= set(_COLUMNS) or len(set(header)) < len(header) or not rows:
        raise Unfit(
            f"{path} must have the columns `budget`, `accuracy` and perhaps `dataset`, named in its first line, and a "
            f"row for each point. It has {len(rows)} rows, and its first line is {','.join(header)[:80]!r}."
        )
    try:
        return [_POINT(_point(header, row, f"row {i}"), f"row {i}") for i, row in enumerate(rows[:_MOST_POINTS], 1)]
    except Unfit as error:
        raise Unfit(f"{path}: {error}") from error


def _point(header: list[str], row: list[str], name: str) -> dict[str, Any]:
    """Return a row of a CSV file as the JSON file would have it."""
    if len(row) != len(header):
        raise Unfit(f"`{name}` must have a cell for each of {len(header)} columns, got {len(row)}.")
    point: dict[str, Any] = {column: cell for column, cell in zip(header, row, strict=True) if cell}
    for column, kind in (("budget", int), ("accuracy", float)):
        with contextlib.suppress(ValueError):  # what is not a number is refused as it is
            point[column] = kind(point[column]) if column in point else ""
    return point
