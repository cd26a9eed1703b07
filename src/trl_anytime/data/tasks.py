"""Whether a summary has room for the answers of a task."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..rewards.tasks.boxes import write_box

MOST_TOO_LONG = 0.1
"""Share of answers that may not fit. Above it, the curve ends below 0.9 whatever the model learns."""


@dataclass(frozen=True)
class AnswerLengths:
    """
    How many answers do not fit into a summary.

    Args:
        total, too_long (`int`):
            Answers, and those whose box has more tokens than a summary.
        longest (`int`):
            Tokens of the longest.
    """

    total: int
    too_long: int
    longest: int

    @classmethod
    def measure(
        cls, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_summary_length: int
    ) -> "AnswerLengths":
        """Count the tokens of each answer in its box."""
        boxes = [write_box(answer) for answer in answers]
        lengths = [len(ids) for ids in tokenizer(boxes, add_special_tokens=False)["input_ids"]]
        return cls(len(lengths), sum(length > max_summary_length for length in lengths), max(lengths))

    @property
    def are_refused(self) -> bool:
        """Whether too many do not fit."""
        return self.too_long > MOST_TOO_LONG * self.total

    def message(self, name: str, max_summary_length: int) -> str:
        """Say what share does not fit."""
        return (
            f"{name}: {self.too_long:,} of {self.total:,} answers ({self.too_long / self.total:.1%}) do not fit into "
            f"a summary of {max_summary_length} tokens in their box. The longest has {self.longest}."
        )


ADVICE = "Raise `max_summary_length`, or choose settings of the task with shorter answers."


def check_lengths(
    name: str, answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_summary_length: int
) -> None:
    """
    Refuse a task many of whose answers do not fit into a summary, and warn if a few do not.

    Raises:
        `ValueError`: If more than a tenth do not fit.
    """
    lengths = AnswerLengths.measure(answers, tokenizer, max_summary_length)
    if lengths.are_refused:
        raise ValueError(f"{lengths.message(name, max_summary_length)} {ADVICE}")
    if lengths.too_long:
        warnings.warn(f"{lengths.message(name, max_summary_length)} {ADVICE}", stacklevel=3)
