"""Which cases of a test `make test` has time for."""

from collections.abc import Collection, Iterable

import pytest


def slow_but_for(names: Iterable[str], quick: Collection[str]) -> list:
    """Parameters, of which all but the quick ones are marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
