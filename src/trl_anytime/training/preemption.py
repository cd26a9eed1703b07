"""
Preemption: on SIGTERM all ranks finish the optimiser step, save a checkpoint, and exit with code 0.

Schedulers send SIGTERM before they take a machine away. transformers can save on a signal too, but from a thread on
each rank alone. Here all ranks decide together. While checkpoints are on, the handler only sets a flag. This also
holds for the SIGTERM by which torchrun ends the siblings of a failed rank. A rank that waits in a collective would
then wait until SIGKILL. [`~.faults.FaultWatch`] ends it sooner.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerControl
from transformers.trainer_utils import IntervalStrategy

logger = get_logger(__name__)


class EpochEnd(TrainerCallback):
    """
    Log and evaluate in the last step of an epoch, before the checkpoint of that step is saved.

    transformers does both after that checkpoint. A run that is resumed from the checkpoint would never do them.
    """

    def __init__(self) -> None:
        self._done_at: int | None = None

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if not (float(state.epoch).is_integer() or state.global_step >= state.max_steps):
            return
        if args.logging_strategy == IntervalStrategy.EPOCH:
            control.should_log = True  # transformers logs a step once
        if args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch:
            control.should_evaluate = True
            self._done_at = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self._done_at == state.global_step:
            control.should_evaluate = False


class Preemption(TrainerCallback):
    """
    Stop training after the optimiser step, or the evaluation, in which any rank has received SIGTERM.

    The context manager around training catches the signal. The callback lets all ranks decide together.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.
        enabled (`bool`):
            Whether checkpoints are saved. If not, SIGTERM ends the process as usual.

    Attributes:
        stopped (`bool`):
            Whether SIGTERM has stopped training.
        evaluation_due (`bool`):
            Whether an evaluation was skipped, which the resumed run has to do first.
    """

    def __init__(self, accelerator: Accelerator, enabled: bool) -> None:
        self.stopped = self.evaluation_due = False
        self._enabled = enabled
        self._accelerator = accelerator
        self._received = False
        self._active = False

    def __enter__(self) -> "Preemption":
        self.stopped = self.evaluation_due = self._received = False
        self._active, self._pid = self._enabled, os.getpid()
        # Python allows handlers in the main thread only. In another thread, the signal may still reach another rank.
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
        if os.getpid() != self._pid:  # a forked child, such as a worker of a data loader, ends as usual
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._received = True  # a second one changes nothing; launchers and schedulers both send one

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
            # An evaluation may take longer than the machine is left to us
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            logger.warning(f"Received SIGTERM. Saving a checkpoint at step {state.global_step}, then stopping.")

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        if self.stopped:  # in the middle of the epoch, or at its end, with a whole checkpoint either way
            control.should_log = control.should_evaluate = control.should_save = False

    def on_evaluate(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        self._decide(control)
