"""Gold answers: what is accepted, and the check of a dataset before anything is trained on it."""

import math
import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from .extraction import last_boxed


def gold_alternatives(value: Any) -> list[str] | None:
    r"""Texts of a gold answer's alternatives, any of which is right; `None` if the value is no gold answer.

    Args:
        value (`str`, `int`, `float` or a list of these):
            A dataset's value. A string may hold its answer in `\boxed{}`; a float is read with 15 significant digits,
            which is what a float holds (so `142.0` is 142 and `1 / 3` is one third).
    """
    if isinstance(value, list | tuple):
        alternatives: list[str] = []
        for item in value:
            found = None if isinstance(item, list | tuple) else gold_alternatives(item)
            if found is None:
                return None
            alternatives += found
        return alternatives or None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        boxed = last_boxed(value)
        text = value if boxed is None else boxed
        return [text] if text.strip() else None
    if isinstance(value, numbers.Integral):
        return [str(int(value))]
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return [format(float(value), ".15g")]
    return None


def bad_gold_message(row: int, column: str, value: Any) -> str:
    return (
        f"Row {row}: column {column!r} holds {value!r}, which is no gold answer. Give a non-empty string, an int, a "
        "finite float, or a non-empty list of these (alternatives); or set on_bad_gold='skip' to leave such rows out."
    )


def find_column(columns: Sequence[str], answer_columns: Sequence[str]) -> str:
    """The first of `answer_columns` that is there; `ValueError` if none is."""
    for column in answer_columns:
        if column in columns:
            return column
    raise ValueError(
        f"No gold answers: none of the columns {list(answer_columns)} is in the dataset, which has {sorted(columns)}. "
        "Rename the column or pass answer_columns=."
    )


def check_golds(
    dataset: Any, answer_columns: Sequence[str], read_gold: Callable[[Any], list[str] | None], *, skip: bool
) -> Any:
    """Check every gold answer of a dataset, see [`AnswerReward.check_dataset`].

    Args:
        dataset (`Dataset` or `IterableDataset`):
            An iterable dataset is returned as it is.
        answer_columns (`Sequence[str]`):
            Columns that may hold the gold answers; the first one present counts.
        read_gold (`Callable`):
            Returns `None` for a bad value.
        skip (`bool`):
            Leave bad rows out rather than raise.
    """
    from datasets import IterableDataset  # slow to import, and a worker process imports this module too

    if isinstance(dataset, IterableDataset):
        return dataset
    column = find_column(dataset.column_names, answer_columns)
    good = []
    for row, value in enumerate(dataset[column]):
        if read_gold(value) is not None:
            good.append(row)
        elif not skip:
            raise ValueError(bad_gold_message(row, column, value))
    skipped = len(dataset) - len(good)
    if not skipped:
        return dataset
    warnings.warn(f"Left out {skipped} of {len(dataset)} rows: no gold answer in column {column!r}.", stacklevel=3)
    return dataset.select(good)
