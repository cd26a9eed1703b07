"""What a run shows while it trains: one line per log, and the phase inside a step."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import has_length

# Seconds without a word, after which a run in a pipe says what it is doing. A bar says it at once.
SILENCE = 60.0
# Phases of a step that are shown, in their order
_PHASES = ("thinking", "summarising", "grading", "scoring", "updating")
_REWARD = "anytime/reward@"


class StepLines(ProgressCallback):
    """
    Show one line per log: the step, the reward, its curve, how many traces finish, and the seconds by phase.

    On a terminal the progress bar of transformers stays, and it names the phase that a step is in. Elsewhere there is
    no bar. There a line names the phase if nothing was said for a minute. All metrics stay in
    `trainer.state.log_history` and in the trackers.

    `trainer.remove_callback(StepLines)` removes the lines. Add [`~transformers.PrinterCallback`] to print all metrics
    instead.

    Args:
        show_bar (`bool`):
            Whether there is a progress bar.

    Attributes:
        is_evaluating (`bool`):
            Whether the phases are those of an evaluation. The trainer sets it.
    """

    def __init__(self, show_bar: bool) -> None:
        super().__init__()
        self._show_bar = show_bar
        self.is_evaluating = False
        self._is_main = False
        self._step, self._last_step = 0, 0
        self._phase = ""
        self._batches = 0  # of an evaluation, so far
        self._spoke = -float("inf")  # when the last line was written

    @classmethod
    def replace(cls, trainer: Trainer) -> "StepLines":
        """
        Take the place of the callback by which transformers prints all metrics.

        A notebook's table, and callbacks that the user has passed, stay.
        """
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback) in (ProgressCallback, PrinterCallback):
                trainer.remove_callback(callback)
        lines = cls(show_bar=not trainer.args.disable_tqdm and sys.stderr.isatty())
        trainer.add_callback(lines)
        return lines

    def show_phase(self, phase: str) -> None:
        """Show that a phase begins. The bar names it, and a pipe gets a line if nothing was said for a minute."""
        if not self._is_main or phase == self._phase or phase not in _PHASES:
            return
        self._phase = phase
        if self.training_bar is not None:
            self.training_bar.set_description_str(phase)
        else:
            of = "evaluation" if self.is_evaluating else f"step {self._step + 1}/{self._last_step}"
            self._break_silence(f"{of}: {phase}")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_main = state.is_world_process_zero
        self._step, self._last_step = state.global_step, state.max_steps
        if self._show_bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = state.global_step
        if self._show_bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self._show_bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        elif state.is_world_process_zero and has_length(eval_dataloader):
            self._batches += 1
            self._break_silence(f"evaluation: {self._batches} of {len(eval_dataloader)} batches")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches = 0
        super().on_evaluate(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self._write(log_line(logs, state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._show_bar:
            super().on_train_end(args, state, control, **kwargs)

    def _break_silence(self, line: str) -> None:
        if time.monotonic() - self._spoke >= SILENCE:
            self._write(line)

    def _write(self, line: str) -> None:
        self._spoke = time.monotonic()
        if self.training_bar is None:
            print(line, flush=True)
        else:
            self.training_bar.write(line)


def log_line(logs: Mapping[str, Any], step: int, last_step: int) -> str:
    """
    Describe one log in a line.

    Args:
        logs (`Mapping[str, Any]`):
            What transformers logs: metrics of updates, of an evaluation (names begin with `eval_`), of the whole run,
            or anything that a user logs.
        step (`int`):
            Optimiser steps so far.
        last_step (`int`):
            Optimiser steps of the run.

    Returns:
        `str`: the step, the reward, its curve, the share of finished traces, and seconds. A log without a reward is
        returned as it is, with its numbers shortened.
    """
    if "train_runtime" in logs:
        return f"{step} steps in {logs['train_runtime']:,.0f} s"
    prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
    curve = {name.removeprefix(prefix + _REWARD): logs[name] for name in logs if name.startswith(prefix + _REWARD)}
    if not curve and logs.get("reward") is None:
        return str({name: f"{value:.4g}" if isinstance(value, float) else value for name, value in logs.items()})
    parts = [f"step {step}/{last_step}" if last_step else f"step {step}"]
    if prefix:
        parts.append("evaluation")
    else:
        parts.append(f"reward {_number(logs.get('reward'))}")
    if curve:
        parts.append(f"{' '.join(map(_number, curve.values()))} at {' '.join(curve)}")
    finished = logs.get(f"{prefix}thinking/finished_ratio")
    if finished is not None:
        parts.append(f"finished {finished:.0%}")
    seconds = logs.get("eval_runtime" if prefix else "step_time")
    phases = {phase: logs.get(f"{prefix}time/{phase}") for phase in _PHASES}
    if seconds is not None:
        spent = ", ".join(f"{phase} {value:.3g}" for phase, value in phases.items() if value)
        # Those of an evaluation are means over its batches
        parts.append(f"{seconds:.3g} s ({spent})" if spent and not prefix else f"{seconds:.3g} s")
    return " | ".join(parts)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
