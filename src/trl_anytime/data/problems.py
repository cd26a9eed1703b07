"""Read problems with known answers: benchmarks, tasks of reasoning-gym, data sets of the Hub, or local files."""

import glob
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..outside.display import did_you_mean
from ..outside.validation import MEBIBYTE, check_file, free_form, list_of, mapping_of, parse_json, read_text
from ..rewards.base import ANSWER_COLUMNS
from ..rewards.task import ENTRY_COLUMN
from ..rewards.tasks.problems import task_problems
from ..rewards.tasks.source import PREFIX, TaskSource, is_task
from ..rewards.verifier.gold_answers import column_values, has_column

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_BYTES, _MOST_BYTES_OF_JSON = 64 * 1024 * MEBIBYTE, 1024 * MEBIBYTE
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_PROBLEM_COLUMNS = ("problem", "question", "prompt")
_ANSWER_COLUMNS = (*ANSWER_COLUMNS, "final_answer")


@dataclass(frozen=True)
class Benchmark:
    """
    Where a benchmark is.

    Args:
        hub_id (`str`):
            Data set of the Hub.
        split (`str`):
            Its split.
        problem (`str`):
            Column of the problems.
        answer (`str`):
            Column of the answers.
        num_problems (`int`):
            How many there are.
        config (`str`, *optional*):
            Configuration of the data set.
    """

    hub_id: str
    split: str
    problem: str
    answer: str
    num_problems: int
    config: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("yentinglin/aime_2025", "train", "problem", "answer", 30),
    "amc": Benchmark("AI-MO/aimo-validation-amc", "train", "problem", "answer", 83),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "minerva": Benchmark("math-ai/minervamath", "test", "question", "answer", 272),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "train", "question", "final_answer", 674, config="OE_TO_maths_en_COMP"
    ),
}


def as_setting(name: str) -> str:
    """Name a setting in a message as recipes and Python spell it."""
    return f"`{name}`"


def as_flag(name: str) -> str:
    """Name a setting in a message as the command line spells it."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class ProblemRows:
    """
    A data set as it is stored, and where its problems and answers are.

    Args:
        source (`str`):
            What the data set is called in messages.
        rows (`Dataset`):
            The rows.
        problem_column, answer_column (`str`):
            Columns. `a.b` is the key `b` of column `a`.
    """

    source: str
    rows: "Dataset"
    problem_column: str
    answer_column: str

    @property
    def has_entries(self) -> bool:
        """Whether these are problems of a task, which its own scorer grades."""
        return ENTRY_COLUMN in self.rows.column_names and is_task(self.source)

    def values(self, column: str) -> Sequence[Any]:
        """Return the values of one of the two columns."""
        return column_values(self.rows, column, self.rows.column_names)

    def check_problems(self) -> None:
        """
        Check that each row has a problem.

        Raises:
            `ValueError`: If a row has none; the message names the row and the value.
        """
        for row, value in enumerate(self.values(self.problem_column)):
            if problem_text(value) is None:
                raise ValueError(
                    f"{self.source}, row {row}: column {self.problem_column!r} holds {value!r} instead of a problem. "
                    "Give its text, or remove the row."
                )


def problem_text(value: Any) -> str | None:
    """Return a problem: a text, or a conversation of one message as in verl's data; `None` for anything else."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) and value.strip() else None


def is_file(source: str) -> bool:
    """Whether a data set is given as a local file."""
    return Path(source).suffix in _FILE_TYPES and not is_task(source)


def find_benchmark(source: str) -> Benchmark | None:
    """Return the benchmark of a name, in any spelling, or `None`."""
    return BENCHMARKS.get(_key(source))


def set_name(source: str) -> str:
    """Return a short name of a data set: of a benchmark its own, of a file that without folders and ending."""
    return Path(source).stem if is_file(source) else _key(source) if find_benchmark(source) else source


def split_name(source: str) -> tuple[str, str]:
    """Split `name=source` into the name that a data set is given, `""` without one, and where it is."""
    name, is_it, behind = source.partition(f"={PREFIX}")
    if is_it:
        return name, PREFIX + behind
    if is_task(source):
        return "", source
    name, _, where = source.rpartition("=")
    return name, where.strip()


def _key(source: str) -> str:
    return source.lower().replace("-", "").replace("_", "").replace(" ", "")


def read_rows(
    source: str,
    config: str | None = None,
    split: str | None = None,
    problem_column: str | None = None,
    answer_column: str | None = None,
    spell: Callable[[str], str] = as_setting,
) -> ProblemRows:
    """
    Read a data set and find its columns.

    Args:
        source (`str`):
            Name of a benchmark, a task of reasoning-gym (`reasoning_gym:TASK?setting=value&size=500&seed=0`), a file
            (json, jsonl, parquet or csv), or a Hub id, with a configuration behind a colon if it has several.
        config (`str`, *optional*):
            Configuration of a Hub data set, instead of behind a colon.
        split (`str`, *optional*):
            Split of a Hub data set. Defaults to that of the benchmark, or to `"test"`, then `"train"`.
        problem_column, answer_column (`str`, *optional*):
            Columns. Default to the usual names. `a.b` is the key `b` of column `a`.
        spell (`Callable`, *optional*):
            How a message names a setting: [`as_setting`] or [`as_flag`].

    Returns:
        [`ProblemRows`]: The rows; of a task, with the columns `question`, `answer` and `entry`.

    Raises:
        `ValueError`: If there is no such set, file, split, column or row; the message says what there is instead.
        `ConnectionError`: If the Hub does not answer.
    """
    benchmark = find_benchmark(source)
    if is_task(source):
        rows = _load_task(source, config, split, spell)
    elif is_file(source):
        rows = _load_file(Path(source))
    elif benchmark is not None:
        problem_column = problem_column or benchmark.problem
        answer_column = answer_column or benchmark.answer
        rows = _load_hub(benchmark.hub_id, config or benchmark.config, split or benchmark.split)
    elif "/" in source or Path(source).is_dir():
        hub_id, _, behind = source.partition(":")
        if behind and config and behind != config:
            raise ValueError(f"{source!r} names another configuration than {spell('dataset_config')}. Remove one.")
        rows = _load_hub(hub_id, config or behind or None, split)
    else:
        raise ValueError(_unknown(source))
    if not len(rows):
        raise ValueError(f"{source} has no rows.")
    columns = list(rows.column_names)
    problem_column = _find_column(problem_column, _PROBLEM_COLUMNS, columns, source, "problem", spell)
    answer_column = _find_column(answer_column, _ANSWER_COLUMNS, columns, source, "answer", spell)
    return ProblemRows(source, rows, problem_column, answer_column)


def _find_column(
    given: str | None, usual: Sequence[str], columns: list[str], source: str, what: str, spell: Callable[[str], str]
) -> str:
    wanted = [given] if given is not None else list(usual)
    for column in wanted:
        if has_column(columns, column):
            return column
    raise ValueError(
        f"{source} has no column {' or '.join(map(repr, wanted))} for the {what}s; its columns are "
        f"{', '.join(map(repr, columns))}.{did_you_mean(wanted[0], columns)} Set {spell(f'{what}_column')}."
    )


def _unknown(source: str) -> str:
    files = [str(path) for path in Path(".").glob("*") if path.suffix in _FILE_TYPES]
    return (
        f"There is no data set {source!r}.{did_you_mean(source.lower(), [*BENCHMARKS, *files])} Known are "
        f"{', '.join(BENCHMARKS)}; others are given by their Hub id (owner/name), as a file that ends in .json, "
        f".jsonl, .parquet or .csv, or as {PREFIX}TASK."
    )


def _load_task(source: str, config: str | None, split: str | None, spell: Callable[[str], str]) -> "Dataset":
    from datasets import Dataset

    for value, what in ((config, "configuration"), (split, "split")):
        if value is not None:
            raise ValueError(
                f"A task of reasoning-gym has no {what} {value!r}. Remove it. Settings, size and seed are written "
                f"behind the name in {spell('dataset_name')}: {PREFIX}TASK?size=500&seed=1."
            )
    return Dataset.from_list(task_problems(TaskSource.parse(source)))


def _load_file(path: Path) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        there = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ValueError(f"There is no file {path}.{did_you_mean(str(path), there)}")
    check_rows(path)
    try:
        return load_dataset(_FILE_TYPES[path.suffix], data_files=glob.escape(str(path)), split="train")
    except (DatasetGenerationError, ValueError) as error:  # by version of datasets
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error


def check_rows(path: Path) -> None:
    """
    Refuse a file that `datasets` could not read, or whose reader would end the process.

    Args:
        path (`Path`):
            A json, jsonl, parquet or csv file.

    Raises:
        `ValueError`: If it is not a regular file, empty or too large; for JSON, if a row is not an object, nested too
            deep, or holds text that cannot be written. The message names the row and the field.
    """
    check_file(path, _MOST_BYTES)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty.")
    if _FILE_TYPES[path.suffix] != "json":
        return
    # Arrow, which reads JSON for `datasets`, crashes on null and on deep nesting
    content = read_text(path, _MOST_BYTES_OF_JSON).strip()
    row = mapping_of(free_form, least=1)
    if not _is_json(content.partition("\n")[0]) or content.startswith("["):  # one document, not one in each line
        parse_json(content, path, list_of(row, least=1) if content.startswith("[") else row)
        return
    for i, line in enumerate(content.split("\n")):
        if line.strip():
            parse_json(line, f"{path}, line {i + 1}", row)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True


def _load_hub(hub_id: str, config: str | None, split: str | None) -> "Dataset":
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if split is None:
            splits = get_dataset_split_names(hub_id, config)
            split = next((name for name in ("test", "train") if name in splits), splits[0])
        return load_dataset(hub_id, config, split=split)
    except DatasetNotFoundError as error:
        raise ValueError(f"{error} {_unknown(hub_id)}") from error
