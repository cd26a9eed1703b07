"""Accuracy-versus-budget curves from a training run's `log_history`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..outside.validation import MEBIBYTE, Unfit, fields, integer, list_of, mapping_of, number, or_null, read_json

LENGTH = "thinking/mean_length"
_TRAINING, _EVALUATION = "anytime/reward@", "eval_anytime/reward@"
_MOST_BYTES = 1024 * MEBIBYTE  # of a trainer's state. A log of a hundred metrics takes about 4 KiB.


@dataclass(frozen=True)
class Curve:
    """
    Mean rewards at thinking budgets.

    Args:
        step (`int`):
            Optimiser steps that the model was trained for. For an average over logs, those of the last log.
        rewards (`dict[int, float]`):
            Mean reward for each budget in tokens. Budgets at which nothing could be scored are left out.
        unscored (`float`, *optional*, defaults to `0.0`):
            Share of the summaries that no reward function scored. The means leave them out.
        first_step (`int`, *optional*):
            For an average over logs, the step of the first log.
        escapes (`dict[int, float]`, *optional*):
            Share of the summaries behind a forced cut that resume the reasoning, for each budget that has any.
    """

    step: int
    rewards: dict[int, float]
    unscored: float = 0.0
    first_step: int | None = None
    escapes: dict[int, float] = field(default_factory=dict)


def load_log_history(path: Path) -> list[dict[str, Any]]:
    """
    Load the `log_history` of a `trainer_state.json`.

    Args:
        path (`Path`):
            Path of the file.

    Raises:
        `ValueError`: If it is not a trainer's state, or a value that is drawn is not a number. The message names the
            file and the field.
        `OSError`: If the file does not exist, or cannot be read.
    """
    logs = mapping_of(lambda value, name: value)  # other callbacks may log anything
    state = read_json(path, fields(log_history=list_of(logs)), _MOST_BYTES)
    try:
        for i, log in enumerate(state["log_history"]):
            _check_log(log, f"log_history[{i}]")
    except Unfit as error:
        raise Unfit(f"{path}: {error}") from error
    return state["log_history"]


def _check_log(log: dict[str, Any], name: str) -> None:
    read = ("anytime/", "summary/escape_ratio@")
    drawn = [key for key in log if key == LENGTH or key.removeprefix("eval_").startswith(read)]
    fields(step=integer(0))(log, name)
    for key in drawn:
        value = log[key]
        if not (isinstance(value, float) and math.isnan(value)):  # logged where nothing was scored
            or_null(number(-1e30, 1e30))(value, f"{name}.{key}")


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """
    Return the evaluations of a run.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`.

    Returns:
        `dict[str, list[Curve]]`: evaluations by evaluation set, each in order. A single set has the name `""`.
            Evaluations in which nothing was scored are left out.
    """
    sets: dict[str, list[Curve]] = {}
    for log in log_history:
        curve = _curve(log, _EVALUATION)
        if curve is not None:
            sets.setdefault(_set_name(log), []).append(curve)
    return sets


def evaluated_set(log: Mapping[str, Any]) -> str | None:
    """
    Return the name of the set that a log evaluates, see [`evaluations`].

    `None` if it is not an evaluation, or if nothing was scored.
    """
    return None if _curve(log, _EVALUATION) is None else _set_name(log)


def _set_name(log: Mapping[str, Any]) -> str:
    """
    Return the name of the set that a log evaluates.

    TRL's metrics have the same names for all sets. The run time, which transformers logs beside them, names the set.
    """
    timed = [key.removesuffix("_runtime") for key in log if key.endswith("_runtime")]
    return timed[0].removeprefix("eval").removeprefix("_") if timed else ""


def before_and_after(curves: Sequence[Curve], step: int) -> tuple[Curve | None, Curve | None]:
    """
    Return the first of several evaluations, and the last one at a step or before.

    Args:
        curves (`Sequence[Curve]`):
            Evaluations of one set, in order.
        step (`int`):
            Step of the weights that are described.

    Returns:
        `tuple`: both evaluations. The second is `None` unless it has more steps of training than the first.
    """
    before = min(curves, key=lambda curve: curve.step, default=None)
    if before is None or before.step > step:
        return None, None
    later = [curve for curve in curves if before.step < curve.step <= step]
    return before, max(reversed(later), key=lambda curve: curve.step, default=None)


def rewards_in_training(log_history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Return the rewards of the training samples in each log, in order."""
    return [curve for log in log_history if (curve := _curve(log, _TRAINING)) is not None]


def training_curves(
    log_history: Sequence[Mapping[str, Any]], most_logs: int = 10
) -> tuple[Curve | None, Curve | None]:
    """
    Return the rewards of the training samples at the beginning and at the end of a run.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        most_logs (`int`, *optional*, defaults to `10`):
            Logs to average at each end, at most half of all.

    Returns:
        `tuple`: both averages. With one log the second is `None`, and without logs both are.
    """
    curves = rewards_in_training(log_history)
    if len(curves) < 2:
        return (curves[0] if curves else None), None
    num_logs = min(most_logs, len(curves) // 2)
    return _average(curves[:num_logs]), _average(curves[-num_logs:])


def _average(curves: Sequence[Curve]) -> Curve:
    budgets = sorted({budget for curve in curves for budget in curve.rewards})
    means = {}
    for budget in budgets:
        rewards = [curve.rewards[budget] for curve in curves if budget in curve.rewards]
        means[budget] = sum(rewards) / len(rewards)
    escapes = {}
    for budget in sorted({budget for curve in curves for budget in curve.escapes}):
        ratios = [curve.escapes[budget] for curve in curves if budget in curve.escapes]
        escapes[budget] = sum(ratios) / len(ratios)
    return Curve(curves[-1].step, means, first_step=curves[0].step, escapes=escapes)


def _curve(log: Mapping[str, Any], prefix: str) -> Curve | None:
    rewards = _at_budgets(log, prefix)
    if not rewards:
        return None
    unscored = log.get(prefix.replace("reward@", "unscored_ratio"))
    escapes = _at_budgets(log, prefix.replace("anytime/reward@", "summary/escape_ratio@"))
    return Curve(log["step"], rewards, unscored or 0.0, escapes=escapes)


def _at_budgets(log: Mapping[str, Any], prefix: str) -> dict[int, float]:
    """Return the logged values of a metric at budgets, in their order."""
    values = {
        int(match[1]): float(value)
        for key, value in log.items()
        # TRL logs None where it has found nothing but NaN
        if (match := re.fullmatch(re.escape(prefix) + r"([0-9]{1,9})", key))
        and value is not None
        and math.isfinite(value)
    }
    return dict(sorted(values.items()))
