"""
Stopping when it has settled: thinking ends once the answers of several checks agree.

A check is an answer from the trace as it is so far. It disturbs nothing: the thinking goes on with the tokens that it
would have without checks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from ..rewards.agreement import majority, read_answer, same_answer
from .markers import ThinkingMarkers
from .sampling import is_clipped

# The default spacing makes this many checks of the largest budget
_CHECKS_OF_BUDGET = 16


@dataclass(frozen=True)
class Settling:
    r"""
    Settings of the rule that ends thinking when the answers have settled.

    After every `every` tokens the trace is cut, and `answers` summaries are sampled. If at least the share `agreement`
    of them give the same answer, that is the answer of the check. Thinking ends when the last `checks` checks have the
    same answer.

    The answer of a summary is what stands in the `\boxed{}` that a reward grades. Without one it is the whole text,
    without spaces around it. A summary without an answer agrees with none. Nor does one that is cut off before its
    box.

    Args:
        checks (`int`, *optional*, defaults to `3`):
            Number k of checks in a row that must have the same answer.
        every (`int`, *optional*):
            Thinking tokens between two checks. Defaults to a sixteenth of the largest budget.
        answers (`int`, *optional*, defaults to `1`):
            Summaries of a check.
        agreement (`float`, *optional*, defaults to `1.0`):
            Share of a check's summaries that must give the same answer.

    Raises:
        `ValueError`: If a setting is out of range, or thinking would always end at the first check.
    """

    checks: int = 3
    every: int | None = None
    answers: int = 1
    agreement: float = 1.0

    def __post_init__(self) -> None:
        for name in ("checks", "every", "answers"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` of `Settling` must be a whole number of at least 1, got {value!r}.")
        if not 0 < self.agreement <= 1:
            raise ValueError(f"`agreement` of `Settling` must be above 0 and at most 1, got {self.agreement!r}.")
        if self.checks == self.answers == 1:
            raise ValueError("A single answer always agrees with itself. Raise `checks` or `answers` of `Settling`.")

    def resolved(self, last_budget: int, temperature: float) -> "Settling":
        """
        Return the settings for a budget, with their spacing.

        Args:
            last_budget (`int`):
                The largest budget in thinking tokens.
            temperature (`float`):
                Temperature of the summaries.

        Raises:
            `ValueError`: If thinking could never settle before the budget, or all summaries of a check are the same.
        """
        if temperature == 0 and self.answers > 1:
            raise ValueError(
                f"At temperature 0 all {self.answers} answers of a check are the same. Set `answers` of `Settling` to "
                "1, or raise `temperature`."
            )
        every = max(1, last_budget // _CHECKS_OF_BUDGET) if self.every is None else self.every
        if self.checks * every >= last_budget:
            raise ValueError(
                f"Thinking cannot settle before its budget of {last_budget} tokens: {self.checks} checks, one every "
                f"{every} tokens, need more. Lower `checks` or `every` of `Settling`, or raise the budget."
            )
        return replace(self, every=every)


@dataclass(frozen=True)
class Check:
    """
    Summaries of a trace while it was thinking.

    Args:
        cut (`int`):
            Thinking tokens that the summaries saw.
        summaries (`list[list[int]]`):
            Token ids of the summaries, up to and including EOS if it came.
        bridge_length (`int`):
            Tokens between the trace and a summary.
    """

    cut: int
    summaries: list[list[int]]
    bridge_length: int

    @property
    def num_tokens(self) -> int:
        """Return the tokens that the check cost."""
        return sum(self.bridge_length + len(summary) for summary in self.summaries)


@dataclass
class Streak:
    """
    Number of checks in a row with the same answer.

    Args:
        length (`int`):
            Number of checks up to the last one.
        answer (`str`, *optional*):
            Their answer.
    """

    length: int = 0
    answer: str | None = None

    def add(self, answer: str | None) -> int:
        """Add the answer of a check, `None` for one without, and return the number."""
        if answer is None:
            self.length, self.answer = 0, None
        elif self.answer is not None and same_answer(self.answer, answer):
            self.length += 1
        else:
            self.length, self.answer = 1, answer
        return self.length


@dataclass
class Watch:
    """
    State of the rule for one trace.

    Args:
        settling ([`Settling`]):
            The settings.
        read (`Callable`):
            Returns the answer of a summary's token ids, or `None`.
        bridge_length (`int`):
            Tokens between the trace and a summary.
        checks (`list[Check]`):
            The checks so far, in order.
        settled_at (`int`, *optional*):
            Thinking tokens at which the answers had settled.
    """

    settling: Settling
    read: Callable[[list[int]], str | None]
    bridge_length: int
    checks: list[Check] = field(default_factory=list)
    settled_at: int | None = None
    streak: Streak = field(default_factory=Streak)

    @property
    def next_cut(self) -> int:
        """Return the thinking tokens of the next check."""
        assert self.settling.every is not None
        return self.settling.every * (len(self.checks) + 1)

    def add(self, cut: int, summaries: Sequence[list[int]]) -> bool:
        """Add the next check, and return whether the answers have settled."""
        self.checks.append(Check(cut, list(summaries), self.bridge_length))
        answer = majority([self.read(summary) for summary in summaries], self.settling.agreement)
        if self.streak.add(answer) >= self.settling.checks and self.settled_at is None:
            self.settled_at = cut
        return self.settled_at is not None


@dataclass(frozen=True)
class StopWhenSettled:
    """
    Rule that ends the thinking of a model's traces.

    Args:
        settling ([`Settling`]):
            The settings, with their spacing.
        markers ([`ThinkingMarkers`]):
            Markers of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        max_summary_length (`int`):
            Most tokens of a summary.
        eos_token_ids (`list[int]`):
            Tokens that end a summary.
    """

    settling: Settling
    markers: ThinkingMarkers
    tokenizer: PreTrainedTokenizerBase
    max_summary_length: int
    eos_token_ids: list[int]

    @property
    def every(self) -> int:
        """Return the thinking tokens between two checks."""
        assert self.settling.every is not None
        return self.settling.every

    @property
    def answers(self) -> int:
        """Return the number of summaries of a check."""
        return self.settling.answers

    def watch(self) -> Watch:
        """Return the state of the rule for a trace that begins."""
        return Watch(self.settling, self._read, self.markers.max_bridge_length)

    def _read(self, summary: list[int]) -> str | None:
        if self.markers.count_think_end(summary):  # training gives no reward to such a summary
            return None
        clipped = is_clipped(summary, self.max_summary_length, self.eos_token_ids)
        text = str(self.tokenizer.decode(summary, skip_special_tokens=True))
        return read_answer(text, self.markers.answer_bridge, clipped)
