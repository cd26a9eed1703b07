"""Verifiable rewards with TRL's signature. Importing this package imports neither torch nor sympy."""

import sys

if sys.platform != "linux":  # before anything that fails there in its own words
    raise ImportError(
        "The rewards of trl_anytime need Linux, which limits the time and the memory of a verifier's workers. This is "
        f"{sys.platform}. Use a Linux machine, a container or WSL."
    )

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
