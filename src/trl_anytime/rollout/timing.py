"""Seconds by phase, measured in one way everywhere."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimes:
    """
    Sums of the seconds spent in each phase. A phase inside another one counts only for itself.

    Attributes:
        seconds (`dict[str, float]`):
            Seconds by phase.
        on_start (`Callable[[str], None]`, *optional*):
            Called with the name of each phase that begins.
        clock (`Callable[[], float]`):
            The clock, in seconds. Benchmarks put that of the process or of a device in its place.

    Example:

    ```python
    >>> times = PhaseTimes()
    >>> with times("updating"), times("rollouts"):
    ...     pass
    >>> times.take("rollouts") >= 0
    True
    ```
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.on_start: Callable[[str], None] | None = None
        self.clock: Callable[[], float] = time.perf_counter
        self._nested = [0.0]  # seconds of the phases inside each open one

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the code inside as `phase`."""
        if self.on_start is not None:
            self.on_start(phase)
        start = self.clock()
        self._nested.append(0.0)
        try:
            yield
        finally:
            elapsed = self.clock() - start
            self.seconds[phase] += elapsed - self._nested.pop()
            self._nested[-1] += elapsed

    def take(self, phase: str) -> float:
        """Return the seconds of `phase` since the last call."""
        return self.seconds.pop(phase, 0.0)
