"""The worker processes that grade what needs sympy: started as `python -m`, one task at a time each, killed when late.

One pool per process and settings, made when first needed, closed at exit. There is no thread: the caller waits for the
workers itself, so an exception or Ctrl-C leaves nothing behind but idle workers, which end with this process.
"""

import atexit
import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# Terminals and schedulers send these to all processes of a run. They are for the parent, which may still want the last
# grades. A worker starts with them blocked, because it cannot ignore them before it runs, and then ignores them.
SIGNALS_FOR_THE_PARENT = frozenset(
    [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]
)
_WORKER_MODULE = f"{__package__}.worker"
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[3])
_START_SECONDS = 60.0  # to import sympy from a slow file system; a second or two otherwise
_MAX_FAILED_STARTS = 3
_CLOSE_SECONDS = 1.0
_SIGXCPU_EXIT = -24  # how Popen reports a child that the kernel ended at its CPU limit


@dataclass(frozen=True)
class PoolSettings:
    """Number of workers, their limits, see [`MathReward`], and the module that they run, by default the verifier's.

    `cpu_limit` is CPU time, so that a reward does not depend on the machine's load.
    """

    workers: int
    cpu_limit: float
    hard_limit: float
    batch_limit: float
    memory_limit: int
    tasks_per_worker: int
    worker_module: str | None = None


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    deadline: float  # of the start or of the task; unused while idle
    ready: bool = False
    task: int | None = None
    tasks_done: int = 0
    received: bytearray = field(default_factory=bytearray)


def default_workers() -> int:
    """Half the cores of this rank, at least 1, at most 4."""
    cores = len(os.sched_getaffinity(0))
    if cores == os.cpu_count():  # not pinned by the launcher: the ranks of this machine share them
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, cores // 2))


class WorkerPool:
    """Grades pairs in child processes."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
        """Grade pairs of gold answer and answer. Threads that call this at the same time wait for each other.

        Returns:
            `list`: What the worker says of each pair, for the verifier `"equal"` or `"different"`; else `"timeout"`,
            `"dead"` (the worker died) or `"late"` (the call's time was over before this pair's).

        Raises:
            `RuntimeError`: If workers do not start, or fail their self-test.
        """
        with self._lock, selectors.DefaultSelector() as selector:
            try:
                for worker in self._workers:
                    selector.register(_output(worker), selectors.EVENT_READ, worker)
                return self._grade(pairs, selector)
            finally:
                for worker in [worker for worker in self._workers if worker.task is not None]:
                    self._drop(worker, selector)  # late, or interrupted: its answer would be taken for another's

    def close(self) -> None:
        """End all workers. The pool may be used again; it then starts new ones."""
        if self._lock.acquire(timeout=_CLOSE_SECONDS):
            try:
                while self._workers:
                    _end(self._workers.pop())
            finally:
                self._lock.release()
        else:  # another thread is grading, and this process may be about to end: do not wait for it
            for worker in list(self._workers):
                worker.process.kill()

    def _grade(self, pairs: Sequence[tuple[str, str]], selector: selectors.BaseSelector) -> list[Any]:
        seconds = self.settings.batch_limit + len(pairs) * self.settings.cpu_limit / self.settings.workers
        batch_deadline = time.monotonic() + seconds
        queue = deque(range(len(pairs)))
        outcomes: list[Any] = [None] * len(pairs)
        was_ready = False
        while None in outcomes:
            now = time.monotonic()
            if now >= batch_deadline:
                if not was_ready:
                    raise RuntimeError(
                        f"No worker of the answer verifier started within {seconds:g} s. The machine is overloaded, "
                        "or `batch_limit` too small."
                    )
                break
            while len(self._workers) < min(self.settings.workers, len(queue) + self._busy()):
                self._start(selector)
            for worker in self._workers:
                if queue and worker.ready and worker.task is None:
                    self._send(worker, queue, pairs)
            deadline = min([batch_deadline, *(w.deadline for w in self._workers if not w.ready or w.task is not None)])
            for key, _ in selector.select(max(0.0, deadline - now)):
                self._receive(key.data, outcomes, selector)
            now = time.monotonic()
            for worker in list(self._workers):
                was_ready = was_ready or worker.ready
                if worker.task is not None and now >= worker.deadline:
                    outcomes[worker.task] = "timeout"
                    self._drop(worker, selector)
                elif not worker.ready and now >= worker.deadline:
                    self._drop(worker, selector)
                    self._count_failed_start(f"did not start within {_START_SECONDS} s")
                elif worker.task is None and worker.tasks_done >= self.settings.tasks_per_worker:
                    self._drop(worker, selector)
        return ["late" if outcome is None else outcome for outcome in outcomes]

    def _busy(self) -> int:
        return sum(worker.task is not None for worker in self._workers)

    def _start(self, selector: selectors.BaseSelector) -> None:
        settings = self.settings
        arguments = [str(settings.cpu_limit), str(settings.memory_limit), str(os.getpid())]
        command, environment = python_module(settings.worker_module or _WORKER_MODULE, *arguments)
        with _blocked(SIGNALS_FOR_THE_PARENT):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            worker = _Worker(process, time.monotonic() + _START_SECONDS)
            self._workers.append(worker)
            selector.register(_output(worker), selectors.EVENT_READ, worker)

    def _send(self, worker: _Worker, queue: deque[int], pairs: Sequence[tuple[str, str]]) -> None:
        gold, answer = pairs[queue[0]]
        assert worker.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # died while idle: seen as end of file, the task stays in the queue
            worker.process.stdin.write(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
            worker.process.stdin.flush()
            worker.task = queue.popleft()
            worker.deadline = time.monotonic() + self.settings.hard_limit

    def _receive(self, worker: _Worker, outcomes: list[Any], selector: selectors.BaseSelector) -> None:
        chunk = os.read(_output(worker), 65536)
        if not chunk:
            self._drop(worker, selector)
            if worker.task is not None:
                at_limit = worker.process.returncode == _SIGXCPU_EXIT
                outcomes[worker.task] = "timeout" if at_limit else "dead"
            elif not worker.ready:
                self._count_failed_start(f"ended with code {worker.process.returncode} while starting")
            return
        worker.received += chunk
        if not worker.received.endswith(b"\n"):
            return
        reply = json.loads(worker.received)
        worker.received.clear()
        if worker.task is not None:
            outcomes[worker.task] = reply["outcome"]
            worker.task = None
            worker.tasks_done += 1
        elif reply.get("ready"):
            worker.ready = True
            self._failed_starts = 0
        else:
            self._drop(worker, selector)
            self._count_failed_start(f"failed its self-test: {reply.get('error', reply)}")

    def _count_failed_start(self, reason: str) -> None:
        self._failed_starts += 1
        logger.warning("A worker of the answer verifier %s.", reason)
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._failed_starts = 0
            raise RuntimeError(
                f"The answer verifier's workers keep failing; the last one {reason}. Answers cannot be graded."
            )

    def _drop(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(_output(worker))
        self._workers.remove(worker)
        _end(worker)


def python_module(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a Python process that runs a module; it can import what this one can.

    Its hash seed is always the same, and libraries of linear algebra start no threads in it: those take address space.
    """
    path = os.pathsep.join([_PACKAGE_ROOT, *(entry for entry in sys.path if entry)])
    fixed = {"PYTHONPATH": path, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # -P: a file of the current directory must not stand in for a module of the standard library
    return [sys.executable, "-P", "-m", module, *arguments], os.environ | fixed


@contextlib.contextmanager
def _blocked(signals: frozenset[signal.Signals]) -> Iterator[None]:
    """Hold signals back in this thread; a process started inside holds them back from its first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _output(worker: _Worker) -> int:
    assert worker.process.stdout is not None
    return worker.process.stdout.fileno()


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    assert worker.process.stdin is not None and worker.process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # an unsent line may be left in the buffer
        worker.process.stdin.close()
    worker.process.stdout.close()


_pools: dict[PoolSettings, WorkerPool] = {}
_pools_lock = threading.Lock()


def get_pool(settings: PoolSettings) -> WorkerPool:
    """This process's pool with these settings, made when first asked for."""
    with _pools_lock:
        return _pools.setdefault(settings, WorkerPool(settings))


def close_pools() -> None:
    """End the workers of all pools of this process. Runs at exit."""
    for pool in _pools.values():
        pool.close()


def _forget_pools() -> None:
    """In a forked child: the workers are the parent's, and a lock may be held by a thread that is not here."""
    global _pools, _pools_lock
    _pools, _pools_lock = {}, threading.Lock()


atexit.register(close_pools)
os.register_at_fork(after_in_child=_forget_pools)
