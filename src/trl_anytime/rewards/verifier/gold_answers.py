"""Gold answers: what is accepted, how it is read, and the check of a dataset before training."""

import json
import math
import numbers
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from .extraction import last_boxed

# Texts that pandas, and so a csv file read by `datasets`, takes for a missing value. From other files they come as
# text.
_MISSING = frozenset(
    ["nan", "NaN", "-nan", "-NaN", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NULL", "null", "None", "NaT"]
)
_MOST_WORDS = 12  # of an answer; the longest one in MATH has two, units included
_MOST_DIGITS = 1000  # of an integer in a dataset; answers have far fewer
_LOST_DIGITS = 2**53  # from here on a float cannot hold every integer

_LATEX_WORDS = re.compile(r"\\(?:begin|end)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_ARGUMENT = re.compile(r"\b(?:because|since|therefore|thus|hence|we)\b", re.IGNORECASE)
_NO_CONTENT = re.compile(r"[\s.?*_#/$'\"\-\u2012-\u2015\\]*")
_ANSWER_IS = re.compile(r"\banswers?\b\s*(?:\*\*)?\s*(?:(?:is|are)\s*:?|:|=)\s*", re.IGNORECASE)
_NEXT_SENTENCE = re.compile(r"(?:\.\**\s+|\s*\n\s*)(?=[A-Z]\w*(?:\s+\w+){2})")  # "… is 8. I hope it is correct."
_ANSWER_TAG = re.compile(r"<answer>([^<]*)</answer>", re.IGNORECASE)
_THOUSANDS = re.compile(r"([-+]?)(\d{1,3}(?:,\d{3})+(?:\.\d+)?)")
_NUMBER = r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?"
_ITEM = rf"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|{_NUMBER}"
_LIST = re.compile(rf"[\[(]\s*(?:{_ITEM})(?:\s*,\s*(?:{_ITEM}))*\s*,?\s*[\])]")
_QUOTED = re.compile(r"[\[({]+\s*['\"]")
# Where Python or JSON quotes a text, a backslash before a letter is doubled. A single one is LaTeX that was not
# quoted.
_UNQUOTED_LATEX = re.compile(r"(?<!\\)(?:\\\\)*\\[A-Za-z]")


class _NotAnAnswer(ValueError):
    """A value is not a gold answer. The message says what is wrong, then what to do."""


def gold_alternatives(value: Any, *, any_text: bool = False) -> list[str] | None:
    r"""Return the alternatives of a gold answer as texts, or `None` if the value is not a gold answer.

    Any of the alternatives is right. A list holds alternatives, each read by these rules. An int is itself. A float is
    read with 15 significant digits, which is what a float holds. So `142.0` is 142, and `1 / 3` is one third. A float
    that is a whole number of 2^53 or more has lost digits and is refused. In a string, the answer is the first of
    these that applies:

    - the content of the last `\boxed{}`;
    - the text after the last `####`, as in GSM8K, up to the end of its line and without separators of thousands;
    - the content of the last `<answer>` tags;
    - the items of a list written by Python or JSON, if they are quoted (`"['12', '13']"`) or a single number
      (`"[12]"`, which is also accepted as it is). Two and more bare numbers are not split: `[1,2]` is an interval;
    - the content of quotation marks, if they hold all of it;
    - the text after the last "answer is" or "answer:", up to the next sentence;
    - the string.

    A string is refused if it is empty or only punctuation, or an unfinished `\boxed{`. A missing value spelled out is
    refused too (`N/A`, `nan`, `null`: what pandas takes for one). Unless `any_text`, a dictionary or list that cannot
    be read is refused, and so is an argument. An argument has more than 12 words, or "because", "since", "therefore",
    "thus", "hence" or "we".

    Args:
        value (`str`, `int`, `float` or a list of these):
            Value from a dataset.
        any_text (`bool`, *optional*, defaults to `False`):
            Whether sentences are accepted as answers.
    """
    try:
        return _alternatives(value, any_text)
    except _NotAnAnswer:
        return None


def _alternatives(value: Any, any_text: bool) -> list[str]:
    if isinstance(value, list | tuple):
        if not value or any(isinstance(item, list | tuple) for item in value):
            raise _NotAnAnswer("It is an empty or a nested list. Give a list of alternatives")
        return [text for item in value for text in _alternatives(item, any_text)]
    if isinstance(value, str):
        return _texts(value, any_text)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 10**_MOST_DIGITS:
        return [str(int(value))]
    if isinstance(value, Decimal) and value.is_finite() and abs(value.adjusted()) < _MOST_DIGITS:
        return [format(value, "f")]
    if isinstance(value, numbers.Rational) and not isinstance(value, numbers.Integral):
        return [f"{value.numerator}/{value.denominator}"]
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral) and math.isfinite(value):
        if abs(float(value)) >= _LOST_DIGITS and float(value).is_integer():
            raise _NotAnAnswer(
                "It is a whole number of 2^53 or more that was stored as a float and lost its last digits. Write it "
                "as a string in the dataset"
            )
        if not isinstance(value, float):  # a narrower float of numpy: digits beyond its shortest text are arbitrary
            return [str(value)]
        return [str(int(value)) if value.is_integer() else format(value, ".15g")]
    raise _NotAnAnswer(
        "Its type or value is not supported. Give a non-empty string, an int, a finite float, or a non-empty list of "
        "these (alternatives)"
    )


def _texts(text: str, any_text: bool) -> list[str]:
    """Return the alternatives that a string holds."""
    text = text.strip()
    if (boxed := last_boxed(text)) is not None:
        return [_checked(boxed, any_text)]
    if "\\boxed" in text:
        raise _NotAnAnswer(r"Its last \boxed{} is unfinished. Give the answer alone")
    if "####" in text:
        answer = (text.rpartition("####")[2].strip().splitlines() or [""])[0].strip()
        number = _THOUSANDS.fullmatch(answer)
        return [_checked(answer.replace(",", "") if number else answer, any_text)]
    if tags := _ANSWER_TAG.findall(text):
        return _texts(tags[-1], any_text)
    if _LIST.fullmatch(text):
        items = re.findall(_ITEM, text)
        if any(item[0] in "'\"" for item in items):
            return [found for item in items for found in _texts(_unquoted(item), any_text)]
        if len(items) == 1 and text[0] == "[":
            return [items[0], text]  # a list from a file, or a vector of one entry
    elif _QUOTED.match(text) and not any_text:
        raise _NotAnAnswer("It looks like a list or dictionary but cannot be read. Give the answer alone")
    elif re.fullmatch(r"'[^']*'|\"[^\"]*\"", text):
        return _texts(_unquoted(text), any_text)
    *_, last = (None, *_ANSWER_IS.finditer(text))
    if last is not None:
        said = _NEXT_SENTENCE.split(text[last.end() :].strip(" \n*"), maxsplit=1)[0]
        text = said.removesuffix(".").strip(" \n*") or text
    return [_checked(text, any_text)]


def _unquoted(item: str) -> str:
    """Remove the quotes from an item of a list written by Python or JSON."""
    if item[0] not in "'\"":
        return item
    inside = item[1:-1]
    if _UNQUOTED_LATEX.search(inside):
        return inside
    return re.sub(r"\\(['\"\\])", r"\1", inside)


def _checked(text: str, any_text: bool) -> str:
    if _NO_CONTENT.fullmatch(text):
        raise _NotAnAnswer("It is empty. Give the answer")
    if text.strip() in _MISSING:
        raise _NotAnAnswer("It stands for a missing value. Give the answer")
    if not any_text and (count_words(text) > _MOST_WORDS or _ARGUMENT.search(_LATEX_WORDS.sub(" ", text))):
        raise _NotAnAnswer(r"It is a text, not an answer. Give the answer alone, or put it into \boxed{} in the text")
    return text


def count_words(text: str) -> int:
    """Count the words of two letters or more, without LaTeX's own."""
    return len(_WORD.findall(_LATEX_WORDS.sub(" ", text)))


_SKIP = "set `on_bad_gold` to 'skip'"


def check_on_bad_gold(value: str, name: str = "`on_bad_gold`") -> None:
    """
    Refuse an unknown value of the setting for bad gold answers.

    Args:
        value (`str`):
            The setting.
        name (`str`, *optional*):
            Spelling of the setting, for the error. Defaults to its name in Python.

    Raises:
        `ValueError`: If the value is neither `"raise"` nor `"skip"`.
    """
    if value not in ("raise", "skip"):
        raise ValueError(f"{name} must be 'raise' or 'skip', got {value!r}.")


def bad_gold_message(row: int, column: str, value: Any, skip: str = _SKIP) -> str:
    """
    Say why a value is not a gold answer, and what to do.

    Args:
        row (`int`):
            Row of the value.
        column (`str`):
            Column of the value.
        value (`Any`):
            The value.
        skip (`str`, *optional*):
            How to leave out such rows. Defaults to the setting `on_bad_gold`.
    """
    try:
        _alternatives(value, any_text=False)
        why = "This reward cannot compare it with anything. Give another one"
    except _NotAnAnswer as error:
        why = str(error)
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:100]} … {shown[-100:]}"
    where = f"Row {row}: column {column!r}"
    return f"{where} holds {shown}, which is not a gold answer. {why}. Or leave such rows out: {skip}."


# Columns


def find_column(columns: Sequence[str], answer_columns: Sequence[str]) -> str:
    """
    Return the first of `answer_columns` that is among `columns`.

    Args:
        columns (`Sequence[str]`):
            Columns of a dataset.
        answer_columns (`Sequence[str]`):
            Candidates. `a.b` is the key `b` of column `a`.

    Raises:
        `ValueError`: If there is none.
    """
    for column in answer_columns:
        if has_column(columns, column):
            return column
    raise ValueError(
        f"No gold answers: none of the columns {list(answer_columns)} is in the dataset, which has {sorted(columns)}. "
        "Rename the column, or set `answer_columns`."
    )


def has_column(columns: Collection[str], column: str) -> bool:
    """Return whether a column exists, or for `a.b` the column `a`."""
    return column in columns or (column.partition(".")[1] == "." and column.partition(".")[0] in columns)


def column_values(rows: Any, column: str, columns: Sequence[str]) -> Sequence[Any]:
    """Return the values of a column, see [`find_column`], with `None` in rows without the key.

    Args:
        rows (`Dataset` or `dict`):
            Object that returns a column by its name.
        column (`str`):
            A column, or `a.b` for the key `b` in column `a`. Column `a` then holds dictionaries, or JSON of
            dictionaries.
        columns (`Sequence[str]`):
            Columns of `rows`.
    """
    if column in columns:
        return rows[column]
    name, *keys = column.split(".")
    return [_inside(value, keys) for value in rows[name]]


def _inside(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def check_gold_answers(
    dataset: Any, answer_columns: Sequence[str], read_gold: Callable[[Any], list[str] | None], *, skip: bool
) -> Any:
    """
    Check every gold answer of a dataset, see [`AnswerReward.check_dataset`].

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The dataset.
        answer_columns (`Sequence[str]`):
            Columns that may hold the gold answers.
        read_gold (`Callable`):
            Function that returns the alternatives of a gold answer, or `None` for a bad one.
        skip (`bool`):
            Whether to leave out the rows of bad gold answers.

    Returns:
        The dataset, without such rows if `skip`. An iterable dataset is returned unchanged.

    Raises:
        `ValueError`: If a gold answer is bad and not `skip`, or if no column has gold answers.
    """
    from datasets import IterableDataset  # slow to import, and a worker process imports this module as well

    if isinstance(dataset, IterableDataset):
        return dataset
    column = find_column(dataset.column_names, answer_columns)
    good = []
    for row, value in enumerate(column_values(dataset, column, dataset.column_names)):
        if read_gold(value) is not None:
            good.append(row)
        elif not skip:
            raise ValueError(bad_gold_message(row, column, value))
    skipped = len(dataset) - len(good)
    if not skipped:
        return dataset
    warnings.warn(
        f"Left out {skipped} of {len(dataset)} rows, because column {column!r} has no gold answer there.",
        stacklevel=3,
    )
    return dataset.select(good)
