"""Rewards that need no sympy: equal strings, a choice, a number within a tolerance, the format alone."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .base import AnswerReward
from .verifier.extraction import answer_part, last_boxed
from .verifier.forms import Formula, Named, as_fraction, read
from .verifier.gold_answers import gold_alternatives
from .verifier.latex import normalize


@dataclass(frozen=True, kw_only=True)
class ExactMatch(AnswerReward):
    """Reward 1 for an answer that equals the gold answer apart from white space.

    Args:
        ignore_case (`bool`, *optional*, defaults to `False`):
            Whether `Paris` equals `paris`.
        kwargs (`dict`):
            Settings of [`AnswerReward`].
    """

    ignore_case: bool = False

    def _gold(self, value: Any) -> list[str] | None:
        return gold_alternatives(value, any_text=True)

    def _grade(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float]:
        return [float(self._key(answer) in map(self._key, gold_answers)) for gold_answers, answer in pairs]

    def _key(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(AnswerReward):
    r"""Reward 1 for the right choice, written as `B`, `b`, `(B)`, `\text{B}`, `B.`, or with its text: `(B) 42`.

    Args:
        choices (`str`, *optional*, defaults to `"ABCDEFGHIJ"`):
            Letters of the choices. A gold answer is a letter in any of the forms above, or an int that counts from 0,
            as in MMLU.
        kwargs (`dict`):
            Settings of [`AnswerReward`].
    """

    choices: str = "ABCDEFGHIJ"

    def _gold(self, value: Any) -> list[str] | None:
        if isinstance(value, int) and not isinstance(value, bool):
            return [self.choices[value]] if 0 <= value < len(self.choices) else None
        letters = [self._letter(text) for text in gold_alternatives(value, any_text=True) or []]
        known = [letter for letter in letters if letter is not None]
        return known if known and len(known) == len(letters) else None

    def _grade(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float]:
        return [float(self._letter(answer) in gold_answers) for gold_answers, answer in pairs]

    def _letter(self, text: str) -> str | None:
        """Return the one choice that a text names, or `None` if it names none or several."""
        text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", normalize(text)).strip(" .,:")
        letter = f"[{re.escape(self.choices)}]"
        if match := re.fullmatch(rf"\(?\s*({letter})\s*\)?", text, re.IGNORECASE):
            return match[1].upper()
        # Accept the text of the choice after the letter, but not two letters, which would be two claims.
        if (match := re.match(rf"\(\s*({letter})\s*\)|({letter})\s*[.:)]\s", text)) and not re.search(
            rf"\(\s*{letter}\s*\)", text[match.end() :]
        ):
            return match[1] or match[2]
        return None


@dataclass(frozen=True, kw_only=True)
class NumericClose(AnswerReward):
    """Reward 1 for a number within a tolerance of the gold number.

    Numbers are integers, decimals, fractions, mixed numbers and scientific notation, with or without a unit. Formulas
    such as a square root are not.

    Args:
        relative_tolerance (`float`, *optional*, defaults to `1e-6`):
            Tolerance as a fraction of the gold number.
        absolute_tolerance (`float`, *optional*, defaults to `0.0`):
            Tolerance in the gold number's unit. The larger of the two tolerances is used.
        kwargs (`dict`):
            Settings of [`AnswerReward`].
    """

    relative_tolerance: float = 1e-6
    absolute_tolerance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("relative_tolerance", "absolute_tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number, at least 0, got {value!r}.")

    def _gold(self, value: Any) -> list[str] | None:
        # The last digits of a large float do not matter within a tolerance
        is_float = isinstance(value, float) and math.isfinite(value)
        gold_answers = [repr(value)] if is_float else gold_alternatives(value)
        return gold_answers if gold_answers and all(_number(gold) is not None for gold in gold_answers) else None

    def _grade(self, pairs: Sequence[tuple[list[str], str]], counts: Counter[str]) -> list[float]:
        return [float(any(self._close(gold, answer) for gold in gold_answers)) for gold_answers, answer in pairs]

    def _close(self, gold: str, answer: str) -> bool:
        target, value = _number(gold), _number(answer)
        if target is None or value is None:
            return False
        tolerance = max(Fraction(self.absolute_tolerance), Fraction(self.relative_tolerance) * abs(target))
        return abs(value - target) <= tolerance


def _number(text: str) -> Fraction | None:
    form = read(normalize(text))
    if isinstance(form, Named):
        form = form.value
    if not isinstance(form, Formula):
        return None
    value = as_fraction(form.text)
    return value / 100 if value is not None and form.percent else value


@dataclass(frozen=True, kw_only=True)
class FormatReward:
    r"""Reward 1 for a completion in which an answer can be found, right or wrong: thinking ended once, then a box.

    Args:
        answer_bridge (`str`, *optional*, defaults to `"\n\n**Final Answer**\n"`):
            Final-answer text that precedes each summary. The trainer sets its own.
        end_of_thinking (`str` or `None`, *optional*, defaults to `"</think>"`):
            Marker that a whole completion must contain exactly once. `None` for models that do not think.
    """

    answer_bridge: str = "\n\n**Final Answer**\n"
    end_of_thinking: str | None = "</think>"

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
        """Check the format. Gold answers are ignored. See [`AnswerReward.__call__`] for the arguments."""
        rewards: list[float | None] = []
        for row, completion in enumerate(completions):
            formed = None if well_formed is None else well_formed[row]
            part = answer_part(completion, formed, self.answer_bridge, self.end_of_thinking)
            rewards.append(float(bool((last_boxed(part or "") or "").strip())))
        return rewards
