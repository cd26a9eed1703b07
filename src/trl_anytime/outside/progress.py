"""Progress of a long command: a bar in a terminal, and a line a minute where there is none."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

from .display import for_terminal


@contextmanager
def progress(
    name: str, unit: str, total: int, done: int = 0, file: TextIO | None = None, seconds: float = 60.0
) -> Iterator[Callable[[], object]]:
    """
    Show how much of a long command is done.

    Args:
        name (`str`):
            What is being done.
        unit (`str`):
            What is counted.
        total (`int`):
            How many there are.
        done (`int`, *optional*, defaults to `0`):
            How many were done before. A line says so.
        file (`TextIO`, *optional*):
            Where it is shown. Defaults to stderr.
        seconds (`float`, *optional*, defaults to `60.0`):
            Time between two lines.

    Yields:
        `Callable`: to be called when one more is done.
    """
    file = sys.stderr if file is None else file
    name = for_terminal(name, one_line=True)
    if done:
        print(f"{name}: going on from {done} of {total} {unit}s", file=file, flush=True)
    if file.isatty():
        with tqdm(total=total, initial=done, unit=unit, desc=name, file=file) as bar:
            yield bar.update
        return
    lines = _Lines(name, unit, total, done, file)
    over = threading.Event()

    # A thread, because tqdm prints when something is done, and nothing is while one long batch is generated
    def speak() -> None:
        while not over.wait(seconds):
            lines.show()

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield lines.count
    finally:
        over.set()
        thread.join()
        lines.show()


class _Lines:
    """Counts, and says how far it is."""

    def __init__(self, name: str, unit: str, total: int, done: int, file: TextIO):
        self._name, self._unit, self._total, self._file = name, unit, total, file
        self._before = self._done = done
        self._start = time.monotonic()

    def count(self) -> None:
        """Count one more."""
        self._done += 1

    def show(self) -> None:
        """Print a line."""
        done, spent = self._done, time.monotonic() - self._start
        line = f"{self._name}: {done} of {self._total} {self._unit}s ({100 * done // max(self._total, 1)} %)"
        line += f", {tqdm.format_interval(spent)} spent"
        if self._before < done < self._total:
            left = spent / (done - self._before) * (self._total - done)
            line += f", about {tqdm.format_interval(left)} left"
        print(line, file=self._file, flush=True)


def hide_host_bars_in_pipe() -> None:
    """Hide the bars of datasets and transformers unless stderr is a terminal. Ours hide themselves."""
    if sys.stderr.isatty():
        return
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()
