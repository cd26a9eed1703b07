"""
Faults: when one rank fails, end all ranks and show its exception.

A rank that fails cannot tell the others through a collective, because they may be waiting in another one, such as that
of a backward pass. It leaves its exception in the store of the process group. Every rank looks there once a second.

This also makes up for a cost of [`~.preemption.Preemption`]. While checkpoints are on, the SIGTERM by which torchrun
ends the siblings of a failed rank only sets a flag. Without this module they would run until its SIGKILL, 30 s later.
"""

import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size

_POLL_SECONDS = 1.0
# Time for a rank to raise the same error itself, or to catch it. It is longer than a poll of the others.
_GRACE_SECONDS = 3.0
# Without torchrun the store is in rank 0, which may have finished normally a little earlier
_LOST_STORE_SECONDS = 30.0

# Each use has a key of its own in the store. Ranks enter the same ones in the same order.
_uses = itertools.count()


class FaultWatch:
    """
    End all ranks within seconds if an exception leaves this context manager on one of them.

    All ranks show that exception, wherever they are waiting. An exit with code 0 from inside, such as a `sys.exit()`
    in a reward function, is an error too, also without a process group. Otherwise the run would look finished.
    """

    def __init__(self) -> None:
        self._left = threading.Event()
        self._store: dist.Store | None = None
        self._fault: str | None = None  # of another rank, once it is known

    def __enter__(self) -> "FaultWatch":
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._rank, self._key = dist.get_rank(), f"trl_anytime/fault/{next(_uses)}"
            # Use a separate connection. The main thread may hold the other one while it waits for a rank that failed.
            self._store = cast(Any, dist.distributed_c10d._get_default_store()).clone()
            threading.Thread(target=self._watch, name="fault-watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        if isinstance(error, SystemExit) and not error.code:
            exited = RuntimeError(
                f"Training is not finished: the code shown above exited with code {error.code or 0}. Raise an "
                "exception there, or set `control.should_training_stop` in a callback."
            )
            self._report(exited, "".join(traceback.format_exception(error)))
            raise exited from error
        if error is not None:
            self._report(error, "".join(traceback.format_exception(error)))

    def _report(self, error: BaseException, shown: str) -> None:
        """
        Leave the exception for the other ranks.

        If another rank has failed before, add its exception to `error` instead.
        """
        if self._store is None:
            return
        if self._fault is None:
            report = f"Rank {self._rank} failed:\n{shown}"
            try:  # the first exception is the cause; later ones come from ranks that miss this one
                first = self._store.compare_set(self._key, "", report).decode()
            except RuntimeError:  # the store went away with the rank or the launcher that held it
                return
            self._fault = None if first == report else first
        if self._fault is not None:
            error.add_note(self._fault)
        time.sleep(1.5 * _POLL_SECONDS)  # without torchrun the store ends with rank 0, so let the others read it first

    def _watch(self) -> None:
        assert self._store is not None
        while not self._left.wait(_POLL_SECONDS):
            grace = _GRACE_SECONDS
            try:
                if not self._store.check([self._key]):
                    continue
                self._fault = self._store.get(self._key).decode()
            except RuntimeError as error:
                self._fault = f"The store of the process group is gone: {error}"
                grace = _LOST_STORE_SECONDS
            if not self._left.wait(grace):
                print(f"Rank {self._rank} ends because another failed. {self._fault}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may be in a collective that never returns
            return


_MEMORY_ADVICE = {
    "rollouts": """\
Out of memory while sampling, scoring or grading rollouts. To use less:
1. Halve `per_device_train_batch_size` and double `gradient_accumulation_steps`. The results do not change.
2. With vLLM, change `vllm_gpu_memory_utilization` (lower if training needs the memory, higher if the engine does), or
   set `vllm_enable_sleep_mode=True`.
3. Make rollouts shorter: `max_completion_length` with GRPO; with BRPO `budgets[-1]`, `num_summaries` or
   `max_summary_length`.""",
    "update": """\
Out of memory in the forward or backward pass. To use less:
1. Halve `per_device_train_batch_size` and double `gradient_accumulation_steps`. The results do not change.
2. Set `gradient_checkpointing=True` or `bf16=True`.
3. Train with LoRA, or shard the model (`examples/accelerate_configs`).
4. With vLLM in this process, lower `vllm_gpu_memory_utilization`, or set `vllm_enable_sleep_mode=True`.
5. Make rollouts shorter: `max_completion_length` with GRPO; with BRPO `budgets[-1]`, `num_summaries` or
   `max_summary_length`.""",
}


@contextmanager
def memory_advice(phase: str) -> Iterator[None]:
    """
    Add advice on settings to an out-of-memory error.

    Args:
        phase (`str`):
            Phase of the code inside, `"rollouts"` or `"update"`.
    """
    try:
        yield
    except Exception as error:
        if should_reduce_batch_size(error) and not getattr(error, "__notes__", ()):  # the innermost phase knows best
            error.add_note(_MEMORY_ADVICE[phase])
        raise
