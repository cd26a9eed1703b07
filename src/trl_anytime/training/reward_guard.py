"""What reward functions return, checked: a mistake on one rank becomes the same clear error on all ranks."""

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import is_async_callable

# What a call of user code may raise that must not end the process without a word: `sys.exit(0)` is no error to Python
FAILURES = (Exception, SystemExit)


def checked_rewards(rewards: Any, prompts: Sequence[Any]) -> list[float | None]:
    """
    Return what a reward function returned, as floats.

    Args:
        rewards (`Any`):
            What it returned: an iterable of numbers and `None`, in the order of the prompts.
        prompts (`Sequence`):
            What it was asked about.

    Raises:
        `ValueError`: If these are not rewards, one finite number or `None` for each prompt; names the row.
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
    except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor of several numbers
        raise ValueError(
            f"it returned {str(reward)[:100]!r}, a {type(reward).__name__}, {where}. Return a number, or None where "
            "it does not apply to a completion"
        ) from None
    if not math.isfinite(value):
        raise ValueError(f"it returned {value} {where}. Return None where it does not apply to a completion")
    if abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"it returned {value} {where}, beyond float32. Scale the rewards")
    return value


def failure_text(error: BaseException) -> str:
    """Say what an exception of a reward function is."""
    if isinstance(error, SystemExit):
        return f"it called `sys.exit({'' if error.code is None else repr(error.code)})`. Raise an error instead"
    return f"{type(error).__name__}: {error}"


class RewardGuard:
    """
    Guards one call of all reward functions.

    A guarded function never raises, so that every rank reaches TRL's gathering of the rewards; [`raise_on_all_ranks`]
    reports afterwards.

    Args:
        step (`int`):
            The optimiser step, for messages.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._errors: list[str] = []
        self._exception: BaseException | None = None

    def guard(self, reward_func: Any, name: str) -> Any:
        """`reward_func` with its result checked; reward models are returned as they are."""
        if isinstance(reward_func, nn.Module):
            return reward_func
        if is_async_callable(reward_func):

            async def guarded_async(prompts, **kwargs):
                try:
                    return checked_rewards(await reward_func(prompts=prompts, **kwargs), prompts)
                except FAILURES as error:  # whatever it is, it must reach all ranks
                    return self._failed(error, prompts, name)

            return guarded_async

        def guarded(prompts, **kwargs):
            try:
                return checked_rewards(reward_func(prompts=prompts, **kwargs), prompts)
            except FAILURES as error:
                return self._failed(error, prompts, name)

        return guarded

    def _failed(self, error: BaseException, prompts: list, name: str) -> list[float | None]:
        self._errors.append(f"Step {self._step}: reward function `{name}` failed: {failure_text(error)}.")
        self._exception = error
        return [0.0] * len(prompts)

    def raise_on_all_ranks(self) -> None:
        """
        Collective: if a guarded function failed on any rank, raise on every rank.

        Raises:
            `ValueError`: Names the function, and the row where there is one.
        """
        errors = gather_object(self._errors)
        if errors:
            raise ValueError("\n".join(dict.fromkeys(errors))) from self._exception

    def check_models(
        self, reward_funcs: Sequence[Any], names: Sequence[str], rewards: torch.Tensor, prompts: Sequence[Any]
    ) -> None:
        """
        Collective: check what reward models returned, which have no way to leave a completion out.

        Args:
            reward_funcs (`Sequence`):
                F reward functions.
            names (`Sequence[str]`):
                Their names.
            rewards (`torch.Tensor`):
                Shape (W·N, F), the rewards of the N completions of each of W ranks.
            prompts (`Sequence`):
                N prompts of this rank.

        Raises:
            `FloatingPointError`: On all ranks. Names model and prompt.
        """
        for func, name, column in zip(reward_funcs, names, rewards.unbind(dim=1), strict=True):
            rows = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if isinstance(func, nn.Module) and rows:
                prompt = gather_object(list(prompts))[rows[0]]
                raise FloatingPointError(
                    f"Step {self._step}: reward model `{name}` returned {column[rows[0]].item()} for "
                    f"{len(rows)} of {len(column)} completions, first for the prompt {str(prompt)[:200]!r}."
                )
