"""Check what reward functions return, in one way wherever one is called."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

# Exceptions of user code that must not end the process silently. Python does not report `sys.exit(0)` as an error.
FAILURES = (Exception, SystemExit)
# Rewards become float32
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def checked_rewards(rewards: Any, prompts: Sequence[Any]) -> list[float | None]:
    """
    Check what a reward function returned, and return it as floats.

    Args:
        rewards (`Any`):
            Return value of the function: an iterable of numbers and `None`, in the order of the prompts.
        prompts (`Sequence`):
            Prompts that the function was called with.

    Raises:
        `ValueError`: If there is not one finite number or `None` for each prompt. The message names the row.
    """
    if isinstance(rewards, Mapping | Set | str | bytes) or not isinstance(rewards, Iterable):
        raise ValueError(f"it returned a {type(rewards).__name__}. Return a list with one reward for each completion")
    rewards = list(rewards)
    if len(rewards) != len(prompts):
        raise ValueError(f"it returned {len(rewards)} rewards for {len(prompts)} completions. Return one for each")
    return [_checked_reward(reward, row, prompts[row]) for row, reward in enumerate(rewards)]


def _checked_reward(reward: Any, row: int, prompt: Any) -> float | None:
    if reward is None:
        return None
    where = f"in row {row}, for the prompt {str(prompt)[:200]!r}"
    try:
        if isinstance(reward, str | bytes):
            raise TypeError
        value = float(reward)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last from torch, for a tensor of several numbers
        raise ValueError(
            f"it returned {str(reward)[:100]!r}, a {type(reward).__name__}, {where}. Return a number, or None where "
            "it does not apply to a completion"
        ) from None
    if not math.isfinite(value):
        raise ValueError(f"it returned {value} {where}. Return None where it does not apply to a completion")
    if abs(value) > _LARGEST_FLOAT32:
        raise ValueError(f"it returned {value} {where}, beyond float32. Scale the rewards")
    return value


def failure_text(error: BaseException) -> str:
    """Describe an exception of a reward function."""
    if isinstance(error, SystemExit):
        return f"it called `sys.exit({'' if error.code is None else repr(error.code)})`. Raise an error instead"
    return f"{type(error).__name__}: {error}"
