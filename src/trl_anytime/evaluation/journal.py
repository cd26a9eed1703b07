"""The file of an evaluation's finished samples, from which an interrupted one goes on."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..outside.validation import (
    MEBIBYTE,
    Check,
    Unfit,
    boolean,
    fields,
    free_form,
    integer,
    list_of,
    mapping_of,
    number,
    parse_json,
    read_lines,
    string,
)
from .protocol import Protocol, differences

_MOST_BYTES_OF_JOURNAL, _MOST_BYTES_OF_SAMPLE = 16 * 1024 * MEBIBYTE, 256 * MEBIBYTE
REWARD = number(-1e30, 1e30)  # so that means and differences are finite


class Journal:
    """
    File of the finished samples of an evaluation, one JSON line each after a line with the protocol.

    Args:
        path (`Path`):
            Path of the file. It is created if it does not exist.
        protocol ([`Protocol`]):
            Protocol of the evaluation.
        weights (`str`, *optional*):
            Checksum of the model's weights. Samples of others are refused. `None` if not known.

    Attributes:
        records (`list[dict]`):
            Finished samples.

    Raises:
        `ValueError`: If the file belongs to another protocol or other weights, or is damaged elsewhere than at its
            end. The message names the line and the field.
    """

    def __init__(self, path: Path, protocol: Protocol, weights: str | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        complete = 0  # bytes of whole lines. A crash may have left part of a line after them.
        if path.exists():
            # Neither journals of version 0.1.0 or older nor those of servers name the weights
            check = fields({"weights": string(100_000)}, protocol=mapping_of(free_form))
            for i, line in enumerate(read_lines(path, _MOST_BYTES_OF_JOURNAL, _MOST_BYTES_OF_SAMPLE)):
                complete += len(line)
                try:
                    values = parse_json(line, f"{path}, line {i + 1}", check)
                except Unfit as error:
                    raise Unfit(f"{error} Remove the file, or set another --output.") from error
                if i > 0:
                    self.records.append(values)
                    continue
                found = differences(protocol.as_dict(), values["protocol"])
                if found:
                    raise ValueError(
                        f"{path} belongs to another protocol: {'; '.join(found)}. Set another --output, or repeat "
                        "the command that created it."
                    )
                if weights is not None and values.get("weights", weights) != weights:
                    raise ValueError(
                        f"{path} has samples of other weights: {protocol.model} has been saved once more since. Set "
                        "another --output, or remove the file."
                    )
                check = _sample_of(protocol)
            if len({sample_key(values) for values in self.records}) != len(self.records):
                raise ValueError(f"{path} has samples twice, because two runs wrote to it. Set another --output.")
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(complete)
        self._file.seek(0, os.SEEK_END)
        if not complete:
            self._append({"protocol": protocol.as_dict(), **({} if weights is None else {"weights": weights})})

    def add(self, record: dict[str, Any]) -> None:
        """Add a finished sample. It is on the disk when this returns."""
        self._append(record)
        self.records.append(record)

    def _append(self, values: dict[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _sample_of(protocol: Protocol) -> Check:
    """Return a check for finished samples of a protocol."""
    per_summary = {"least": protocol.num_summaries, "most": protocol.num_summaries}
    sample = fields(
        dataset=string(),
        question=integer(0),
        sample=integer(0, protocol.num_samples - 1),
        thinking=string(_MOST_BYTES_OF_SAMPLE),
        thinking_tokens=integer(0),
        prompt_tokens=integer(0),
        finished=boolean,
        seconds=number(0, 1e9),
        cuts=list_of(
            fields(
                # What a sample of version 0.1.0 or older may lack, and what only rewards with boxes have
                {
                    "clipped": list_of(boolean, **per_summary),
                    "no_box": list_of(boolean, **per_summary),
                    "escapes": list_of(string(100), **per_summary),
                },
                budgets=list_of(integer(1), least=1),
                thinking_tokens=integer(0),
                bridge_tokens=integer(0),
                answer_tokens=list_of(integer(0), **per_summary),
                answers=list_of(string(_MOST_BYTES_OF_SAMPLE), **per_summary),
                well_formed=list_of(boolean, **per_summary),
                rewards=list_of(REWARD, **per_summary),
            ),
            least=1,
        ),
    )

    def check(value: Any, name: str) -> Any:
        sample(value, name)
        _, count = protocol.problems.get(value["dataset"], ("", 0))
        if value["question"] >= count:
            raise Unfit(f"`dataset` and `question` name a problem that is not evaluated: {sample_key(value)[:2]!r}.")
        if sorted(budget for cut in value["cuts"] for budget in cut["budgets"]) != protocol.config.budgets:
            raise Unfit(f"`cuts` must have each of the budgets {protocol.config.budgets} once.")
        return value

    return check


def sample_key(record: dict[str, Any]) -> tuple[str, int, int]:
    """Return data set, question and number of a sample."""
    return record["dataset"], record["question"], record["sample"]


def question_means(
    records: Sequence[dict[str, Any]], values: Callable[[dict[str, Any]], np.ndarray]
) -> dict[str, np.ndarray]:
    """
    Return the mean of something over the samples of each question.

    Args:
        records (`Sequence[dict]`):
            Samples.
        values (`Callable`):
            Function from a sample to an array of a fixed shape (…).

    Returns:
        `dict[str, np.ndarray]`: by data set, shape (Q, …), in the order of the questions.
    """
    by_set: dict[str, dict[int, list[np.ndarray]]] = {}
    for record in records:
        by_set.setdefault(record["dataset"], {}).setdefault(record["question"], []).append(values(record))
    return {
        name: np.array([np.mean(samples, axis=0) for _, samples in sorted(by_question.items())])
        for name, by_question in by_set.items()
    }


def mean_rewards(record: Mapping[str, Any], budgets: Sequence[int]) -> np.ndarray:
    """Return the mean reward of a sample's summaries at each budget, shape (M,)."""
    at = {budget: np.mean(cut["rewards"]) for cut in record["cuts"] for budget in cut["budgets"]}
    return np.array([at[budget] for budget in budgets])
