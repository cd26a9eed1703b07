"""
Figures and tables for trackers.

Accuracy-versus-budget curves go to trackio, wandb and TensorBoard as figures. The table of completions goes to
TensorBoard, because TRL sends it only to the other two.

A tracker is imported only if `report_to` names it.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from transformers import TrainerCallback, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from ..outside.display import for_markdown
from .learning_curves import evaluated_set, evaluations

logger = logging.getLogger(__name__)

_TRACKERS = ("trackio", "wandb", "tensorboard")
_TABLE_ROWS = 64  # TensorBoard renders text as a whole. TRL's parquet files have all rows.


class Trackers(TrainerCallback):
    """
    Callback that sends figures and tables to the trackers in use, from the main process.

    If a tracker refuses a figure or table, it is lost with a warning and training continues. Training does not need
    them, and their numbers are also logged as metrics.

    Args:
        report_to (`Sequence[str]`):
            Names of the trackers in use. Unknown ones get nothing.
        callback_handler ([`~transformers.trainer_callback.CallbackHandler`]):
            Callback handler of the trainer. Its callback for TensorBoard has the writer.
        completions (`Mapping[str, Any]`, *optional*):
            TRL's columns of completions, which the trainer keeps refilling. `None` if they are not logged.
    """

    def __init__(
        self,
        report_to: Sequence[str],
        callback_handler: CallbackHandler,
        completions: Mapping[str, Any] | None = None,
    ) -> None:
        self._completions = completions
        self._names = [name for name in _TRACKERS if name in report_to]
        self._callback_handler = callback_handler
        self._can_plot = True

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Send the figures and tables that belong to this log."""
        if state.is_world_process_zero and logs is not None:
            self.update(logs, state, self._completions)

    def update(self, logs: Mapping[str, Any], state: TrainerState, table: Mapping[str, Any] | None) -> None:
        """
        Send the curve of an evaluation, the curves of training when it ends, or the completions.

        Args:
            logs (`Mapping[str, Any]`):
                Logged metrics.
            state ([`~transformers.TrainerState`]):
                State of the trainer. Its history has the earlier evaluations.
            table (`Mapping[str, Any]`, *optional*):
                TRL's columns of completions. `None` if they are not logged.
        """
        if not self._names:
            return
        if (evaluated := evaluated_set({**logs, "step": state.global_step})) is not None:
            self._send_figure("_".join(filter(None, ["curves/eval", evaluated])), state, evaluated)
        if "train_runtime" in logs:
            self._send_figure("curves/training", state)
        elif table is not None and "tensorboard" in self._names:
            self._attempt("tensorboard", "completions", _markdown(table), state.global_step)

    def _send_figure(self, name: str, state: TrainerState, evaluated: str | None = None) -> None:
        """Send a figure of training, or of the evaluations of a set if `evaluated` names one."""
        if not self._can_plot:
            return
        try:
            from PIL import Image

            from .plots import evaluations_figure, training_figure
        except ModuleNotFoundError as error:
            self._can_plot = False
            logger.warning(
                f"Trackers get no figures, because {error.name} is missing. Run `pip install 'trl-anytime[plot]'`."
            )
            return
        if evaluated is None:
            figure = training_figure(state.log_history)
        else:
            figure = evaluations_figure(evaluations(state.log_history)[evaluated], f"evaluation {evaluated}".strip())
        file = BytesIO()
        figure.savefig(file, format="png", dpi=150)
        image = Image.open(file)
        for tracker in self._names:
            self._attempt(tracker, name, image, state.global_step)

    def _attempt(self, tracker: str, name: str, content: Any, step: int) -> None:
        try:
            self._send(tracker, name, content, step)
        except Exception as error:  # trackers raise anything, and must not end the training
            logger.warning(f"Step {step}: {tracker} refused `{name}`: {type(error).__name__}: {error}")

    def _send(self, tracker: str, name: str, content: Any, step: int) -> None:
        if tracker == "tensorboard":
            callbacks = self._callback_handler.callbacks
            writer = next(callback.tb_writer for callback in callbacks if isinstance(callback, TensorBoardCallback))
            if isinstance(content, str):
                writer.add_text(name, content, step)
            else:
                writer.add_image(name, np.asarray(content.convert("RGB")), step, dataformats="HWC")
        elif tracker == "wandb":
            import wandb

            wandb.log({name: wandb.Image(content), "train/global_step": step})
        else:
            import trackio

            trackio.log({name: trackio.Image(content), "train/global_step": step})


def _markdown(table: Mapping[str, Any]) -> str:
    """Return the first rows of TRL's columns as a table, with the columns that depend on the budget first."""
    extra = dict(table["extra"])
    columns = {name: extra.pop(name) for name in ("budget", "thinking")}
    columns |= {"completion": table["completion"], **table["rewards"], "advantage": table["advantages"], **extra}
    columns["prompt"] = table["prompt"]
    rows = list(zip(*columns.values(), strict=True))
    lines = [
        f"{min(len(rows), _TABLE_ROWS)} of {len(rows)} rows",
        "",
        _row(map(for_markdown, columns)),
        _row("---" for _ in columns),
        *(_row(map(_cell, row)) for row in rows[:_TABLE_ROWS]),
    ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):  # a conversation
        value = "\n".join(str(message.get("content", "")) for message in value)
    return for_markdown(str(value))
