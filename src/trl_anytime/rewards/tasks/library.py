"""
The tasks of reasoning-gym, opened where the library may be imported.

Five tasks depend on the order of sets, and so on the hash seed of their process. Problems are therefore made, and made
again to score answers, in processes of their own with the same hash seed (`python_module`). As a program, this prints
the problems of a source as JSON.
"""

import hashlib
import json
import math
import numbers
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from datetime import date
from functools import lru_cache
from typing import Any

from ...outside.display import did_you_mean
from .boxes import read_box, write_box
from .plain import EXECUTING, is_plain
from .source import PREFIX, REFUSED, TaskSource, entry_id, library_version

# Where a task has its answer, if several are right and none is `answer`
_ANSWERS = {
    "graph_color": "possible_answer",
    "propositional_logic": "example_answer",
    "rubiks_cube": "example_correct_answer",
}
_SCORED = 16  # own answers that are scored before a task is used: some kinds of problems differ by chance
_MOST_SOURCES, _MOST_ENTRIES = 8, 512  # in the memory of a worker


def open_task(source: str | TaskSource) -> Any:
    """
    Return the data set of reasoning-gym for a source; it makes a problem each time it is asked for one.

    Args:
        source (`str` or [`TaskSource`]):
            A task with its settings.

    Raises:
        `ValueError`: If there is no such task or setting, a value is refused, or the task cannot be used.
    """
    source = source if isinstance(source, TaskSource) else TaskSource.parse(source)
    library_version()
    import yaml
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if source.task in REFUSED:
        raise ValueError(f"The task {source.task!r} cannot be used: {REFUSED[source.task]}. Choose another.")
    if source.task not in DATASETS:
        raise ValueError(
            f"There is no task {source.task!r} in reasoning-gym {library_version()}."
            f"{did_you_mean(source.task, DATASETS)} Give the name of one of its {len(DATASETS)} tasks."
        )
    known = {f.name: f for f in fields(DATASETS[source.task][1]) if f.name not in ("size", "seed")}
    settings = {}
    for name, text in source.settings.items():
        if name not in known:
            raise ValueError(
                f"The task {source.task!r} has no setting {name!r}.{did_you_mean(name, known)} It has "
                f"{', '.join([*known, 'size', 'seed'])}."
            )
        f = known[name]
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        try:
            value = text if isinstance(default, str) else yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        settings[name] = _fitting(source, name, value, default)
    try:
        return create_dataset(source.task, size=source.size, seed=source.library_seed, **settings)
    except Exception as error:  # what a task refuses is an assertion or any other error of its own
        raise ValueError(
            f"The task {source.task!r} refuses its settings: {_in_short(error)}. Change `{source}`."
        ) from error


def _fitting(source: TaskSource, name: str, value: Any, default: Any) -> Any:
    """A value of the kind that the default has, as far as there is one."""
    if isinstance(value, list) and isinstance(default, tuple):
        return tuple(value)
    kinds: dict[type, tuple[type, ...]] = {
        bool: (bool,),
        int: (int,),
        float: (int, float),
        str: (str,),
        list: (list,),
        tuple: (tuple,),
        date: (date,),
    }
    allowed = kinds.get(type(default), (bool, int, float, str, list) if default is None or default is MISSING else ())
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = f"a value as {default!r}" if allowed else "nothing that can be written here"
        raise ValueError(f"The task {source.task!r} takes {wanted[:100]} for `{name}`, not {value!r}. Change it.")
    return value


def _in_short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")


def own_answer(task: str, entry: dict[str, Any]) -> str:
    """Return an answer that a task has for one of its problems."""
    answer = entry["metadata"][_ANSWERS[task]] if task in _ANSWERS else entry["answer"]
    return answer if isinstance(answer, str) else json.dumps(answer)


def make_problems(source: TaskSource) -> list[dict[str, str]]:
    """
    Return the problems of a source, after the task's own answers to some of them have been scored.

    Raises:
        `ValueError`: If the task cannot be opened, makes no problem, or its scorer fails on an answer of its own.
    """
    dataset = open_task(source)
    problems = []
    step = max(source.size // _SCORED, 1)
    for index in range(source.size):
        try:
            entry = dataset[index]
        except Exception as error:
            raise ValueError(
                f"The task {source.task!r} fails to make problem {index}: {_in_short(error)}. Change `{source}`."
            ) from error
        answer = own_answer(source.task, entry)
        box = write_box(answer)
        if index % step == 0:
            _check_scorer(source, dataset, entry, box)
        problems.append(
            {
                "question": entry["question"],
                "answer": answer,
                "entry": entry_id(source, index, _digest(entry["question"], answer)),
            }
        )
    return problems


def _digest(question: str, answer: str) -> str:
    return hashlib.sha256(f"{question}\0{answer}".encode(errors="surrogatepass")).hexdigest()[:12]


def _check_scorer(source: TaskSource, dataset: Any, entry: dict[str, Any], box: str) -> None:
    scored = score_readings(source.task, dataset.score_answer, entry, read_box(box))
    if scored != 1.0:
        found = scored if isinstance(scored, float) else scored["failed"]
        raise ValueError(
            f"The scorer of the task {source.task!r} does not give 1 to its own answer {box[:100]!r}: {found}. "
            f"Change `{source}`, or choose another task."
        )


def score_readings(
    task: str, score: Callable[..., Any], entry: dict[str, Any], texts: Sequence[str]
) -> float | dict[str, str]:
    """
    Score the readings of one answer; the best counts.

    Args:
        task (`str`):
            Name of the task.
        score (`Callable`):
            Its `score_answer`.
        entry (`dict`):
            The problem.
        texts (`Sequence[str]`):
            Readings, see [`read_box`].

    Returns:
        `float` or `dict`: the score from 0 to 1; or, under `"failed"`, why there is none, and under `"by"` the counter
        of such failures.
    """
    scores: list[float] = []
    failure: dict[str, str] | None = None
    for text in texts:
        if task in EXECUTING and not is_plain(text):
            failure = failure or {"by": "unsafe_answers", "failed": "it would execute the answer, which is code"}
            continue
        try:
            found = score(text, entry)
        except (MemoryError, RecursionError):  # limits of the process, as time is
            raise
        except Exception as error:
            failure = failure or {"by": "scorer_errors", "failed": _in_short(error)}
            continue
        value = float(found) if isinstance(found, numbers.Real) else math.nan
        if 0 <= value <= 1:  # NaN is not
            scores.append(value)
        else:
            failure = failure or {"by": "bad_scores", "failed": f"it returned {str(found)[:50]}"}
    return failure if failure is not None and not any(scores) else max(scores)


@lru_cache(_MOST_SOURCES)
def _opened(source: str) -> Any:
    return open_task(source)


@lru_cache(_MOST_ENTRIES)
def find_entry(source: str, index: int, digest: str) -> tuple[Any, dict[str, Any]]:
    """
    Make a problem again.

    Args:
        source (`str`):
            A task with its settings.
        index (`int`):
            Number of the problem.
        digest (`str`):
            Digest of its question and answer.

    Returns:
        `tuple`: the data set of the library, and the problem as it has it.

    Raises:
        `ValueError`: If it is another problem than the one with this digest.
    """
    dataset = _opened(source)
    task = TaskSource.parse(source).task
    entry = dataset[index] if index < len(dataset) else None
    if entry is None or _digest(entry["question"], own_answer(task, entry)) != digest:
        raise ValueError(
            f"reasoning-gym {library_version()} makes another problem {index} of `{source}` than the one in the data, "
            f"which another version may have made. Read the data again from {PREFIX}{task}."
        )
    return dataset, entry


def main() -> None:
    """Print the problems of the source in the first argument, or why there are none, as one line of JSON."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the library prints is not a reply
    try:
        reply: dict[str, Any] = {"problems": make_problems(TaskSource.parse(sys.argv[1]))}
    except ValueError as error:
        reply = {"error": str(error)}
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
