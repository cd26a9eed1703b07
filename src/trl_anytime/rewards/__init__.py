"""Verifiable rewards with TRL's signature. Importing this package imports neither torch nor sympy."""

from .base import AnswerReward
from .math import MathReward, grade_answers
from .simple import ExactMatch, FormatReward, MultipleChoice, NumericClose
from .task import TaskReward

__all__ = [
    "AnswerReward",
    "ExactMatch",
    "FormatReward",
    "MathReward",
    "MultipleChoice",
    "NumericClose",
    "TaskReward",
    "grade_answers",
]
