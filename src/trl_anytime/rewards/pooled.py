"""What the rewards share that grade in worker processes: limits, counters, and a warning when a limit was hit."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from .base import AnswerReward
from .verifier.pool import PoolSettings, default_workers

_LIMITS = ("cpu_limit", "hard_limit", "batch_limit", "memory_limit", "tasks_per_worker")
_warned: set[tuple[type, PoolSettings]] = set()


@dataclass(frozen=True, kw_only=True)
class PooledReward(AnswerReward):
    """Base of the rewards that grade in worker processes, see [`MathReward`] for the settings."""

    workers: int | None = None
    cpu_limit: float = 2.0
    hard_limit: float = 10.0
    batch_limit: float = 60.0
    memory_limit: int = 1024
    tasks_per_worker: int = 2000

    COUNTERS: ClassVar[tuple[str, ...]] = (*AnswerReward.COUNTERS, "timeouts", "dead_workers", "ungraded")
    WORKER_MODULE: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _LIMITS:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)!r}.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, not {self.workers!r}; leave it out for the default.")

    def _grade(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float | None]:
        scores = self._score(pairs, counts)
        key = type(self), self._pool_settings()
        if key not in _warned and (said := self._shortfall(counts, len(pairs))):
            _warned.add(key)
            warnings.warn(f"{said} From now on they are only counted.", stacklevel=3)
        return scores

    def _score(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float | None]:
        """Score answers in the workers, adding to `counts`."""
        raise NotImplementedError

    def _shortfall(self, counts: Mapping[str, float], total: int) -> str:
        """Say what share of answers was not graded as it should, and what to do; `""` if all were."""
        return shortfall(counts, total)

    def _pool_settings(self) -> PoolSettings:
        limits = {name: getattr(self, name) for name in _LIMITS}
        return PoolSettings(workers=self.workers or default_workers(), **limits, worker_module=self.WORKER_MODULE)


def shortfall(counts: Mapping[str, float], total: int) -> str:
    """Say what share of answers was not graded to the end, and what to do; `""` if all were."""
    limited = int(counts["timeouts"] + counts["dead_workers"])
    said = []
    if limited:
        said.append(
            f"{limited} of {total} answers ({limited / total:.1%}) hit the limits on time or memory, and score 0. "
            "Raise `cpu_limit`, `hard_limit` or `memory_limit` if they are more than a few."
        )
    if ungraded := int(counts["ungraded"]):
        said.append(
            f"{ungraded} of {total} answers ({ungraded / total:.1%}) were not looked at within the time of the call, "
            "and get None. Raise `batch_limit` or `workers`, or free the machine."
        )
    return " ".join(said)
