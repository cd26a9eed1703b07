"""`trl-anytime eval --checkpoints`: the curves of a run's checkpoints, one model at a time."""

import argparse
import copy
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..outside.display import for_terminal
from ..outside.files import weight_files
from .common import say
from .measurement import FILES, Measurement, print_notes, say_not_drawn

TABLE, PICTURE = "checkpoints.csv", "checkpoints.png"


def find(run: Path, steps: Sequence[int] | None) -> list[tuple[int, Path]]:
    """
    Return the steps and folders of a run's checkpoints, the lowest step first.

    Args:
        run (`Path`):
            Folder of the run.
        steps (`Sequence[int]`, *optional*):
            Steps to take. Defaults to all.

    Raises:
        `ValueError`: If there is no checkpoint, not one of each step, or one without whole weights.
    """
    from ..training.checkpoint import checkpoints_of, is_unfinished

    found = checkpoints_of(run)
    if not found:
        raise ValueError(
            f"{run} has no checkpoint-STEP, which --checkpoints evaluates. Give the `output_dir` of a run, or "
            "leave out --checkpoints."
        )
    missing = sorted(set(steps or ()) - {step for step, _ in found})
    if missing:
        there = ", ".join(str(step) for step, _ in found)
        raise ValueError(f"{run} has no checkpoint of step {missing[0]}. Set --steps to some of {there}.")
    found = [(step, folder) for step, folder in found if steps is None or step in steps]
    for step, folder in found:
        if is_unfinished(folder) or not weight_files(folder):
            raise ValueError(
                f"{folder} has no whole weights. It is being saved, or has only the shards of a training. Wait or "
                f"merge them, or leave out {step} by --steps."
            )
    return found


def run(options: argparse.Namespace, measurement: Measurement, found: Sequence[tuple[int, Path]], output: Path) -> int:
    """
    Evaluate checkpoints, and print and draw their curves over the steps.

    Args:
        options (`Namespace`):
            Options of `trl-anytime eval`.
        measurement ([`Measurement`]):
            What all evaluations have in common.
        found (`Sequence[tuple[int, Path]]`):
            Steps and folders.
        output (`Path`):
            Folder with a folder for each checkpoint.
    """
    from ..evaluation.over_steps import save_curves, table_over_steps
    from ..evaluation.protocol import differences

    planned = []
    for step, folder in found:
        own = copy.copy(options)
        own.model = str(folder)
        planned.append((step, own, measurement.evaluation(own, Path(options.model))))
    # Before sampling, which may take hours
    _, first, reference = planned[0]
    for _, own, evaluation in planned[1:]:
        protocols = (evaluation.protocol.as_dict(), reference.protocol.as_dict())
        different = differences(*protocols, ignore=("model",))
        if different:
            raise ValueError(
                f"{own.model} would be measured by another protocol than {first.model}: {'; '.join(different)}. Set "
                "the same by options, or choose checkpoints by --steps."
            )
    by_step: dict[int, dict[str, Any]] = {}
    for i, (step, own, evaluation) in enumerate(planned, 1):
        say(f"checkpoint-{step} ({i} of {len(planned)})", sys.stderr)
        by_step[step] = measurement.measure(evaluation, own, output / f"checkpoint-{step}")
        print_notes(by_step[step])
        _release()
    save_curves(by_step, output / TABLE)
    draw(by_step, output, measurement.baseline)
    if options.json:
        say(json.dumps([{"step": step, "results": results} for step, results in by_step.items()], indent=1))
    else:
        say(table_over_steps(by_step))
    name = for_terminal(str(output), one_line=True)
    say(f"\nIn {name}: {TABLE}, {PICTURE}\nIn each checkpoint-STEP of it: {FILES}", sys.stderr)
    return 0


def _release() -> None:
    """Free the memory of a model that is no longer used, before the next one is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def draw(by_step: dict[int, dict[str, Any]], output: Path, baseline: dict[str, Any] | None) -> None:
    try:
        from ..reporting.evaluation_plots import plot_checkpoints
    except ModuleNotFoundError as error:
        say_not_drawn(error, output)
        return
    plot_checkpoints(by_step, output / PICTURE, baseline)


def load_evaluated(folder: Path) -> dict[int, dict[str, Any]]:
    """
    Load the results of a run's checkpoints, by step.

    Args:
        folder (`Path`):
            Output folder of `trl-anytime eval --checkpoints`. Checkpoints without results are left out.

    Raises:
        `ValueError`: If results are damaged, or not of the same budgets and data sets.
    """
    from ..evaluation.results import load_results
    from ..training.checkpoint import checkpoints_of

    by_step: dict[int, dict[str, Any]] = {}
    for step, path in checkpoints_of(folder):
        if not (file := path / "results.json").is_file():
            continue
        by_step[step] = load_results(file)
        first, own = next(iter(by_step.values()))["protocol"], by_step[step]["protocol"]
        for name in ("budgets", "problems"):
            if own[name] != first[name]:
                raise ValueError(f"{file} has other {name} than the checkpoints before it. Plot it by itself.")
    return by_step
