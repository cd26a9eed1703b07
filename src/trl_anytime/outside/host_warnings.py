"""Warnings of the libraries below, about each other."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_host_warnings() -> Iterator[None]:
    """
    Hide each `FutureWarning` that this package, TRL, transformers and their like cause.

    TRL 1.16, for example, sets `gradient_checkpointing`, which transformers 5.23 has renamed. A user cannot act on
    that. Warnings that the user's own code causes are shown.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            category=FutureWarning,
            module=r"(accelerate|datasets|peft|torch|transformers|trl|trl_anytime)(\.|$)",
        )
        yield
