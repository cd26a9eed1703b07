"""Problems with known answers: benchmarks by name, any data set of the Hub, or local files."""

import glob
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .rewards.golds import gold_alternatives
from .validation import MEBIBYTE, check_file, free_form, list_of, mapping_of, parse_json, read_text

logger = logging.get_logger(__name__)

_MOST_BYTES, _MOST_BYTES_OF_JSON = 64 * 1024 * MEBIBYTE, 1024 * MEBIBYTE
_FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_QUESTION_COLUMNS = ("problem", "question", "prompt")
_ANSWER_COLUMNS = ("answer", "solution", "final_answer")


@dataclass(frozen=True)
class Benchmark:
    """
    Where a benchmark is.

    Args:
        hub_id (`str`):
            Data set of the Hub.
        split (`str`):
            Its split.
        question (`str`):
            Column of the questions.
        answer (`str`):
            Column of the answers.
        num_problems (`int`):
            How many there are.
        config (`str`, *optional*):
            Configuration of the data set.
    """

    hub_id: str
    split: str
    question: str
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


@dataclass(frozen=True)
class ProblemSet:
    """
    Questions with their answers.

    Args:
        name (`str`):
            Name of the set.
        questions (`list[str]`):
            Q questions.
        answers (`list`):
            Q gold answers, as [`~trl_anytime.rewards.MathReward`] takes them.
    """

    name: str
    questions: list[str]
    answers: list[Any]

    @cached_property
    def fingerprint(self) -> str:
        """Differs for other questions or answers."""
        text = json.dumps([self.questions, self.answers], ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_problems(
    source: str,
    question_column: str | None = None,
    answer_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    skip_bad_answers: bool = False,
) -> ProblemSet:
    """
    Load problems.

    Args:
        source (`str`):
            Name of a benchmark, a file (json, jsonl, parquet or csv), or a Hub id, with a configuration behind a colon
            if it has several; `name=source` gives it another name.
        question_column, answer_column (`str`, *optional*):
            Columns. Default to the usual names.
        split (`str`, *optional*):
            Split of a Hub data set. Defaults to `"test"`, then `"train"`.
        limit (`int`, *optional*):
            Only the first so many problems.
        skip_bad_answers (`bool`, *optional*, defaults to `False`):
            Leave out, with a notice, what has no usable answer.

    Raises:
        `ValueError`: If there is no such set, file, split or column, or a gold answer is none; the message says what
            there is instead.
        `ConnectionError`: If the Hub does not answer.
    """
    name, _, where = source.rpartition("=")
    where = where.strip()
    if Path(where).suffix in _FILE_TYPES:
        rows = _load_file(Path(where))
        name = name or Path(where).stem
    else:
        key = where.lower().replace("-", "").replace("_", "").replace(" ", "")
        if key in BENCHMARKS:
            known = BENCHMARKS[key]
            name = name or key
            hub_id, config, split = known.hub_id, known.config, split or known.split
            question_column = question_column or known.question
            answer_column = answer_column or known.answer
        elif "/" in where:
            hub_id, _, config = where.partition(":")
            name = name or where
        else:
            raise ValueError(_unknown(where))
        rows = _load_hub(hub_id, config or None, split)
    columns = list(rows.column_names)
    question_column = _column(question_column, _QUESTION_COLUMNS, columns, where, "question")
    answer_column = _column(answer_column, _ANSWER_COLUMNS, columns, where, "answer")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    questions, answers, skipped = [], [], 0
    for row, (question, answer) in enumerate(zip(rows[question_column], rows[answer_column], strict=True)):
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}, row {row}: column {question_column!r} holds no question but {question!r}.")
        if gold_alternatives(answer) is not None:
            questions.append(question)
            answers.append(answer)
        elif skip_bad_answers:
            skipped += 1
        else:
            raise ValueError(
                f"{where}, row {row}: column {answer_column!r} holds no answer but {answer!r}. Set --skip-bad-answers "
                "to leave such rows out."
            )
    if skipped:
        logger.warning(f"Left out {skipped} of {len(rows)} rows of {where}, which have no answer.")
    if not questions:
        raise ValueError(f"{where} has no problems.")
    return ProblemSet(name, questions, answers)


def _unknown(where: str) -> str:
    files = [str(path) for path in Path(".").glob("*") if path.suffix in _FILE_TYPES]
    return (
        f"There is no data set {where!r}.{_did_you_mean(where.lower(), [*BENCHMARKS, *files])} Known are "
        f"{', '.join(BENCHMARKS)}; others are given by their Hub id (owner/name) or as a file that ends in .json, "
        ".jsonl, .parquet or .csv."
    )


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _load_file(path: Path) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.exists():
        there = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        raise ValueError(f"There is no file {path}.{_did_you_mean(str(path), there)}")
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


def _load_hub(hub_id: str, config: str | None, split: str | None) -> Any:
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        if split is None:
            splits = get_dataset_split_names(hub_id, config)
            split = next((name for name in ("test", "train") if name in splits), splits[0])
        return load_dataset(hub_id, config, split=split)
    except DatasetNotFoundError as error:
        raise ValueError(f"{error} {_unknown(hub_id)}") from error


def _column(given: str | None, usual: Sequence[str], columns: list[str], where: str, what: str) -> str:
    wanted = [given] if given is not None else list(usual)
    for column in wanted:
        if column in columns:
            return column
    raise ValueError(
        f"{where} has no column {' or '.join(map(repr, wanted))} for the {what}s; its columns are "
        f"{', '.join(map(repr, columns))}.{_did_you_mean(wanted[0], columns)} Set --{what}-column."
    )
