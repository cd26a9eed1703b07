"""The reward of reasoning-gym's tasks: what the task's own scorer says."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .pooled import PooledReward
from .tasks.source import library_version, split_entry_id
from .verifier.pool import get_pool

ENTRY_COLUMN = "entry"
"""Column with the names of problems, which the workers make again."""


@dataclass(frozen=True, kw_only=True)
class TaskReward(PooledReward):
    r"""Reward from 0 to 1 for an answer to a problem of reasoning-gym: what `score_answer` of its task gives.

    See [`AnswerReward`] for how the answer is found. What stands in the box is scored as it stands. If it is written
    as LaTeX, it is scored once more without `\text{}` around it and without the backslash of `\{`, `\}`, `\_`, `\#`,
    `\$`, `\%` and `\&`. The better score counts.

    Scorers run in worker processes, under the limits of [`MathReward`], and with its counters `timeouts`,
    `dead_workers` and `ungraded`. Three counters more are of answers that score 0. An answer that makes a scorer fail
    is one of `scorer_errors`. One whose score is not a number from 0 to 1 is one of `bad_scores`. Some scorers execute
    an answer as Python: there, what is more than numbers, short names, lists and elementary functions is not executed,
    and is one of `unsafe_answers`. A warning gives the share of all of them.

    Args:
        answer_columns (`tuple[str, ...]`, *optional*, defaults to `("entry",)`):
            Column with the names of the problems, as [`~trl_anytime.data.problems.read_rows`] makes it.
        max_answer_length (`int`, *optional*, defaults to `20000`):
            Characters in the box beyond which an answer is wrong without a look. Some tasks have long answers.
        kwargs (`dict`):
            Settings of [`MathReward`].

    Example:

    ```python
    >>> from trl_anytime.data.problems import read_rows
    >>> from trl_anytime.rewards import TaskReward

    >>> problem = read_rows("reasoning_gym:chain_sum?size=1").rows[0]
    >>> answers = [rf"\boxed{{{answer}}}" for answer in (problem["answer"], "many")]
    >>> TaskReward(end_of_thinking=None)([""] * 2, answers, entry=[problem["entry"]] * 2)
    [1.0, 0.0]
    ```
    """

    answer_columns: tuple[str, ...] = (ENTRY_COLUMN,)
    max_answer_length: int = 20_000

    COUNTERS: ClassVar[tuple[str, ...]] = (*PooledReward.COUNTERS, "scorer_errors", "bad_scores", "unsafe_answers")
    WORKER_MODULE: ClassVar[str | None] = f"{__package__}.tasks.worker"

    def check_dataset(self, dataset: Any) -> Any:
        """Check that the library is installed, and that every row names a problem, see [`AnswerReward`]."""
        library_version()
        return super().check_dataset(dataset)

    def _gold(self, value: Any) -> list[str] | None:
        return None if split_entry_id(value) is None else [value]

    def _score(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float | None]:
        asked = list(dict.fromkeys((entry, answer) for (entry,), answer in pairs))
        # Problems that stand together are made once by a worker
        outcomes = dict(zip(asked, get_pool(self._pool_settings()).grade(asked), strict=True)) if asked else {}
        scores: list[float | None] = []
        for (entry,), answer in pairs:
            outcome = outcomes[entry, answer]
            if isinstance(outcome, dict):
                if outcome["by"] == "changed":
                    raise ValueError(outcome["failed"])
                counts[outcome["by"]] += 1
            else:
                counts["timeouts"] += outcome == "timeout"
                counts["dead_workers"] += outcome == "dead"
                counts["ungraded"] += outcome == "late"
            scores.append(outcome if isinstance(outcome, float) else None if outcome == "late" else 0.0)
        return scores

    def _shortfall(self, counts: Mapping[str, float], total: int) -> str:
        said = [super()._shortfall(counts, total)]
        for name, what in (
            ("scorer_errors", "made the task's scorer fail"),
            ("bad_scores", "got a score that is not a number from 0 to 1"),
            ("unsafe_answers", "are code that the task's scorer would execute"),
        ):
            if count := int(counts[name]):
                said.append(
                    f"{count} of {total} answers ({count / total:.1%}) {what}, and score 0. Choose another task if "
                    "they are more than a few."
                )
        return " ".join(filter(None, said))
