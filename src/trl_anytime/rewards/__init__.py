"""Verifiable rewards with TRL's signature. Importing this package imports neither torch nor sympy."""

from .answer_reward import AnswerReward
from .math_reward import MathReward, grade_answers
from .simple_rewards import ExactMatch, FormatReward, MultipleChoice, NumericClose

__all__ = [
    "AnswerReward",
    "ExactMatch",
    "FormatReward",
    "MathReward",
    "MultipleChoice",
    "NumericClose",
    "grade_answers",
]
