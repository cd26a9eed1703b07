"""Verifiable rewards with TRL's signature. Importing this package imports neither torch nor sympy."""

from .base import AnswerReward
from .math import MathReward, grade_answers
from .simple import ExactMatch, FormatReward, MultipleChoice, NumericClose

__all__ = [
    "AnswerReward",
    "ExactMatch",
    "FormatReward",
    "MathReward",
    "MultipleChoice",
    "NumericClose",
    "grade_answers",
]
