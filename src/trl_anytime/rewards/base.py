"""Base of the rewards with gold answers: find the answer in a completion, read the gold answer, count what fails."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .verifier.extraction import answer_part, last_boxed
from .verifier.gold_answers import (
    bad_gold_message,
    check_gold_answers,
    check_on_bad_gold,
    column_values,
    find_column,
    gold_alternatives,
)

ANSWER_COLUMNS = ("answer", "solution", "reward_model.ground_truth")
"""Columns where gold answers usually are. The last one is verl's."""


@dataclass(frozen=True, kw_only=True)
class AnswerReward:
    r"""Base of the rewards that compare an answer in a `\boxed{}` with a gold answer.

    With [`BRPOTrainer`] the completion is a summary. The answer is the last `\boxed{}` in the first paragraph of
    `answer_bridge + summary` that starts with the final-answer text. In a plain `GRPOTrainer` the completion is
    everything the model wrote. The answer is then the last `\boxed{}` after the thinking.

    Every call logs each counter in `COUNTERS` as `rewards/<class name>/<counter>`. The values are numbers of
    completions. Zeros are logged too, so the keys are the same on every rank and at every step.

    Args:
        answer_columns (`tuple[str, ...]`, *optional*):
            Columns that may hold the gold answers. The first one present is used. `a.b` is the key `b` of column `a`.
            Defaults to `answer`, `solution` and verl's `reward_model.ground_truth`. A gold answer is a string, an int,
            a float, or a list of these, of which any is right.
        answer_bridge (`str`, *optional*, defaults to `"\n\n**Final Answer**\n"`):
            Final-answer text that precedes each summary. The trainer sets its own.
        end_of_thinking (`str` or `None`, *optional*, defaults to `"</think>"`):
            Marker that a whole completion must contain exactly once. `None` for models that do not think. It is not
            used with [`BRPOTrainer`], which counts the marker on token ids.
        on_bad_gold (`str`, *optional*, defaults to `"raise"`):
            What to do with an unusable gold answer. `"raise"` raises an error. `"skip"` leaves out its rows when a
            dataset is checked, and gives them the reward `None` when a batch is graded.
        max_answer_length (`int`, *optional*, defaults to `2000`):
            Most characters in the box. A longer answer is wrong without being looked at.
    """

    answer_columns: tuple[str, ...] = ANSWER_COLUMNS
    answer_bridge: str = "\n\n**Final Answer**\n"
    end_of_thinking: str | None = "</think>"
    on_bad_gold: str = "raise"
    max_answer_length: int = 2000

    COUNTERS: ClassVar[tuple[str, ...]] = ("graded", "no_box", "too_long", "bad_format", "skipped_gold_answers")

    def __post_init__(self) -> None:
        check_on_bad_gold(self.on_bad_gold)
        if isinstance(self.answer_columns, str) or not self.answer_columns:
            raise ValueError(f"`answer_columns` must be a tuple of column names, got {self.answer_columns!r}.")
        if self.max_answer_length < 1:
            raise ValueError(f"`max_answer_length` must be positive, got {self.max_answer_length!r}.")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        *,
        well_formed: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Grade completions.

        Args:
            prompts (`Sequence`):
                Not used, but part of TRL's signature.
            completions (`Sequence[str]` or `Sequence[list[dict]]`):
                Texts or conversations. With `well_formed` they are summaries, without it whole completions.
            completion_ids (`Sequence[Sequence[int]]`, *optional*):
                Not used, but part of TRL's signature.
            well_formed (`Sequence[bool]`, *optional*):
                Given by [`BRPOTrainer`]. False for a summary that is wrong whatever it says, because its thinking did
                not end as it should.
            log_metric (`Callable`, *optional*):
                TRL's `log_metric`.
            columns (`dict`):
                Columns of the dataset. One of them must be in `answer_columns`.

        Returns:
            `list[float | None]`: 1.0 or 0.0 for each completion. `None` for a bad gold answer with
            `on_bad_gold="skip"`, and for an answer that could not be graded, see [`MathReward`].

        Raises:
            `ValueError`: If a gold answer is bad, with row, column and value, or if no column has gold answers.
        """
        counts = Counter(dict.fromkeys(self.COUNTERS, 0))
        column = find_column(list(columns), self.answer_columns)
        rewards: list[float | None] = [0.0] * len(completions)
        rows, pairs = [], []
        values = column_values(columns, column, list(columns))
        for row, (completion, value) in enumerate(zip(completions, values, strict=True)):
            gold_answers = self._gold(value)
            if gold_answers is None:
                if self.on_bad_gold == "raise":
                    raise ValueError(bad_gold_message(row, column, value))
                counts["skipped_gold_answers"] += 1
                rewards[row] = None
                continue
            answer = self.find_answer(completion, None if well_formed is None else well_formed[row])
            if answer is None:
                counts["bad_format"] += 1
            elif not answer:
                counts["no_box"] += 1
            elif len(answer) > self.max_answer_length and answer not in gold_answers:
                counts["too_long"] += 1
            else:
                rows.append(row)
                pairs.append((gold_answers, answer))
        for row, score in zip(rows, self._grade(pairs, counts), strict=True):
            rewards[row] = score
            counts["graded"] += score is not None
        if log_metric is not None:
            for name in self.COUNTERS:
                log_metric(f"rewards/{type(self).__name__}/{name}", float(counts[name]))
        return rewards

    def find_answer(self, completion: Any, well_formed: bool | None = None) -> str | None:
        """Return what stands in the box of a completion.

        Args:
            completion (`str` or `list[dict]`):
                A text or a conversation: a summary with `well_formed`, and else a whole completion.
            well_formed (`bool`, *optional*):
                Whether the thinking before the summary ended as it should.

        Returns:
            `str` or `None`: `""` if there is no box, `None` if the thinking did not end as it should.
        """
        part = answer_part(completion, well_formed, self.answer_bridge, self.end_of_thinking)
        return None if part is None else (last_boxed(part) or "").strip()

    def check_dataset(self, dataset: Any) -> Any:
        """Check every gold answer of a dataset before training.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                Dataset with one of `answer_columns`. An iterable dataset is returned unchanged. Its rows are checked
                when they are graded.

        Returns:
            The dataset. With `on_bad_gold="skip"` it lacks the rows whose gold answer is bad, and a warning gives
            their number.

        Raises:
            `ValueError`: If a gold answer is bad, with row, column and value of the first one, or if no column has
            gold answers.
        """
        return check_gold_answers(dataset, self.answer_columns, self._gold, skip=self.on_bad_gold == "skip")

    def _gold(self, value: Any) -> list[str] | None:
        """Return the alternatives of a gold answer, or `None` if the value is not a gold answer."""
        return gold_alternatives(value)

    def _grade(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> Sequence[float | None]:
        """Score answers against the alternatives of their gold answers, and add to `counts`."""
        raise NotImplementedError
