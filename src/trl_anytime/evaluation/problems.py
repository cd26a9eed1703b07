"""The problems of an evaluation."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers.utils import logging

from ..data.problems import as_setting, problem_text, read_rows, set_name, split_name
from ..rewards.task import ENTRY_COLUMN
from ..rewards.verifier.gold_answers import bad_gold_message, check_on_bad_gold, gold_alternatives

logger = logging.get_logger(__name__)


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
        entries (`list[str]`, *optional*):
            Q names of problems of a task, as [`~trl_anytime.rewards.TaskReward`] takes them.
    """

    name: str
    questions: list[str]
    answers: list[Any]
    entries: list[str] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Differs for other questions or answers."""
        values = [self.questions, self.answers, *([] if self.entries is None else [self.entries])]
        text = json.dumps(values, ensure_ascii=False, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_problems(
    source: str,
    problem_column: str | None = None,
    answer_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    on_bad_gold: str = "raise",
    any_text: bool = False,
    spell: Callable[[str], str] = as_setting,
) -> ProblemSet:
    """
    Load problems.

    Args:
        source (`str`):
            As in [`read_rows`]; `name=source` gives the set another name.
        problem_column, answer_column, split (`str`, *optional*):
            See [`read_rows`].
        limit (`int`, *optional*):
            Only the first so many problems.
        on_bad_gold (`str`, *optional*, defaults to `"raise"`):
            `"raise"` an error for a row without a usable gold answer, or `"skip"` such rows, with a notice.
        any_text (`bool`, *optional*, defaults to `False`):
            Whether a sentence is an answer too, for other rewards than the maths verifier.
        spell (`Callable`, *optional*):
            See [`read_rows`].

    Raises:
        `ValueError`: If there is no such set, file, split or column, or a gold answer cannot be used; the message says
            what there is instead.
        `ConnectionError`: If the Hub does not answer.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"{spell('limit')} must be at least 1, got {limit}.")
    check_on_bad_gold(on_bad_gold, spell("on_bad_gold"))
    name, where = split_name(source)
    found = read_rows(where, None, split, problem_column, answer_column, spell)
    if limit is not None:
        found = replace(found, rows=found.rows.select(range(min(limit, len(found.rows)))))
    found.check_problems()
    if found.has_entries:
        columns = ([*found.rows[column]] for column in (found.problem_column, found.answer_column, ENTRY_COLUMN))
        return ProblemSet(name or set_name(where), *columns)
    questions, answers = [], []
    values = zip(found.values(found.problem_column), found.values(found.answer_column), strict=True)
    for row, (value, answer) in enumerate(values):
        if gold_alternatives(answer, any_text=any_text) is not None:
            questions.append(str(problem_text(value)))
            answers.append(answer)
        elif on_bad_gold == "raise":
            message = bad_gold_message(row, found.answer_column, answer, f"set {spell('on_bad_gold')} to 'skip'")
            raise ValueError(f"{where}: {message}")
    if skipped := len(found.rows) - len(questions):
        logger.warning(f"Left out {skipped} of {len(found.rows)} rows of {where}, which have no answer.")
    if not questions:
        raise ValueError(f"{where} has no problems.")
    return ProblemSet(name or set_name(where), questions, answers)
