"""SIGTERM, as sent before a machine is taken away: all ranks end the optimiser step, save, and exit with code 0."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl

logger = get_logger(__name__)


class Preemption(TrainerCallback):
    """
    Stops training after the optimiser step, or the evaluation, in which any rank has received SIGTERM.

    A callback for the decision, which all ranks take together, and a context manager around training for the signal.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
        enabled (`bool`):
            Whether checkpoints are wanted. If not, SIGTERM ends the process as ever.

    Attributes:
        stopped (`bool`):
            Whether training was stopped by it.
    """

    def __init__(self, accelerator: Accelerator, enabled: bool) -> None:
        self.stopped = False
        self._enabled = enabled
        self._accelerator = accelerator
        self._received = False
        self._active = False

    def __enter__(self) -> "Preemption":
        self.stopped = self._received = False
        self._active, self._pid = self._enabled, os.getpid()
        # Python allows handlers in the main thread alone; elsewhere another rank may still be told
        self._handles = self._enabled and threading.current_thread() is threading.main_thread()
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._active = False
        if self._handles:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a forked child, such as a worker of a data loader, ends as ever
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._received = True  # more of them change nothing: launchers and schedulers both send one

    def _decide(self, control: TrainerControl) -> None:
        if not self._active:
            return
        flag = torch.tensor(float(self._received), device=self._accelerator.device)
        if self._accelerator.reduce(flag, reduction="sum").item() > 0:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._decide(control)
        if self.stopped:
            control.should_evaluate = False  # it may last longer than the machine
            logger.warning(f"SIGTERM: saving at step {state.global_step} and stopping.")

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._decide(control)
