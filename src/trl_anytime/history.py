"""Accuracy-versus-budget curves in a training run's `log_history`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .validation import MEBIBYTE, Unfit, fields, integer, list_of, mapping_of, number, or_null, read_json

LENGTH = "thinking/mean_length"
_TRAINING, _EVALUATION = "anytime/reward@", "eval_anytime/reward@"
_MOST_BYTES = 1024 * MEBIBYTE  # of a trainer's state: a log of a hundred metrics has about 4 KiB


@dataclass(frozen=True)
class Curve:
    """
    Mean rewards at thinking budgets.

    Args:
        step (`int`):
            Optimiser steps that the model had been trained for; of an average over logs, the last one's.
        rewards (`dict[int, float]`):
            Mean reward for each budget in tokens. A budget at which nothing could be scored is left out.
        unscored (`float`, *optional*, defaults to `0.0`):
            Share of the summaries that no reward function scored, and that the means leave out.
        first_step (`int`, *optional*):
            The first log's step, of an average over logs.
    """

    step: int
    rewards: dict[int, float]
    unscored: float = 0.0
    first_step: int | None = None


def load_log_history(path: Path) -> list[dict[str, Any]]:
    """
    The `log_history` of a `trainer_state.json`.

    Args:
        path (`Path`):
            The file.

    Raises:
        `ValueError`: If it is not a trainer's state, or a value that is drawn is not a number. The message names the
            file and the field.
        `OSError`: If it is not there, or may not be read.
    """
    logs = mapping_of(lambda value, name: value)  # other callbacks log what they like
    state = read_json(path, fields(log_history=list_of(logs)), _MOST_BYTES)
    try:
        for i, log in enumerate(state["log_history"]):
            _check_log(log, f"log_history[{i}]")
    except Unfit as error:
        raise Unfit(f"{path}: {error}") from error
    return state["log_history"]


def _check_log(log: dict[str, Any], name: str) -> None:
    drawn = [key for key in log if key == LENGTH or key.removeprefix("eval_").startswith("anytime/")]
    fields(step=integer(0))(log, name)
    for key in drawn:
        value = log[key]
        if not (isinstance(value, float) and math.isnan(value)):  # where nothing was scored
            or_null(number(-1e30, 1e30))(value, f"{name}.{key}")


def evaluations(log_history: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """
    The evaluations of a run.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`, or that of a `trainer_state.json`.

    Returns:
        `dict[str, list[Curve]]`: for each evaluation set, in the order of its evaluations. A single set has the name
        `""`. Evaluations in which nothing was scored are left out.
    """
    sets: dict[str, list[Curve]] = {}
    for log in log_history:
        curve = _curve(log, _EVALUATION)
        if curve is not None:
            sets.setdefault(_set_name(log), []).append(curve)
    return sets


def evaluated_set(log: Mapping[str, Any]) -> str | None:
    """The set of which a log is the evaluation, see [`evaluations`]; `None` if of none, or if nothing was scored."""
    return None if _curve(log, _EVALUATION) is None else _set_name(log)


def _set_name(log: Mapping[str, Any]) -> str:
    """TRL's metrics are named alike for all sets; the run time, which transformers logs beside them, is not."""
    timed = [key.removesuffix("_runtime") for key in log if key.endswith("_runtime")]
    return timed[0].removeprefix("eval").removeprefix("_") if timed else ""


def before_and_after(curves: Sequence[Curve], step: int) -> tuple[Curve | None, Curve | None]:
    """
    The first of several evaluations, and the last one of the weights at a step or before.

    Args:
        curves (`Sequence[Curve]`):
            Evaluations of one set, in their order.
        step (`int`):
            Step of the weights that are described.

    Returns:
        `tuple`: both evaluations. There is no second one unless more steps had been trained than for the first.
    """
    before = min(curves, key=lambda curve: curve.step, default=None)
    if before is None or before.step > step:
        return None, None
    later = [curve for curve in curves if before.step < curve.step <= step]
    return before, max(reversed(later), key=lambda curve: curve.step, default=None)


def rewards_in_training(log_history: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """The rewards of the training samples in each log, in order."""
    return [curve for log in log_history if (curve := _curve(log, _TRAINING)) is not None]


def training_curves(
    log_history: Sequence[Mapping[str, Any]], most_logs: int = 10
) -> tuple[Curve | None, Curve | None]:
    """
    Rewards of the training samples at the beginning and at the end of a run.

    Args:
        log_history (`Sequence[Mapping]`):
            `trainer.state.log_history`.
        most_logs (`int`, *optional*, defaults to `10`):
            Logs to average at either end, at most half of them.

    Returns:
        `tuple`: both averages; the second is `None` if there is one log, and both are if there is none.
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
    return Curve(curves[-1].step, means, first_step=curves[0].step)


def _curve(log: Mapping[str, Any], prefix: str) -> Curve | None:
    rewards = {
        int(match[1]): float(value)
        for key, value in log.items()
        # TRL logs None where it has found nothing but NaN
        if (match := re.fullmatch(re.escape(prefix) + r"([0-9]{1,9})", key))
        and value is not None
        and math.isfinite(value)
    }
    if not rewards:
        return None
    unscored = log.get(prefix.replace("reward@", "unscored_ratio"))
    return Curve(log["step"], dict(sorted(rewards.items())), unscored or 0.0)
