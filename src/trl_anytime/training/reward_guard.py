"""Check what reward functions return, so that a mistake on one rank becomes the same clear error on all ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from trl.trainer.utils import is_async_callable

from ..rewards.returned import FAILURES, checked_rewards, failure_text


class RewardGuard:
    """
    Guard one call of all reward functions.

    A guarded function never raises, so every rank reaches the point where TRL gathers the rewards.
    [`raise_on_all_ranks`] reports failures afterwards.

    Args:
        step (`int`):
            The optimiser step, for messages.
    """

    def __init__(self, step: int) -> None:
        self._step = step
        self._errors: list[str] = []
        self._exception: BaseException | None = None

    def guard(self, reward_func: Any, name: str) -> Any:
        """Return `reward_func` with a check of its result. Reward models are returned unchanged."""
        if isinstance(reward_func, nn.Module):
            return reward_func
        if is_async_callable(reward_func):

            async def guarded_async(prompts: list, **kwargs: Any) -> list[float | None]:
                try:
                    return checked_rewards(await reward_func(prompts=prompts, **kwargs), prompts)
                except FAILURES as error:  # whatever it is, it must reach all ranks
                    return self._failed(error, prompts, name)

            return guarded_async

        def guarded(prompts: list, **kwargs: Any) -> list[float | None]:
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
        Raise on every rank if a guarded function failed on any rank. This is a collective call.

        Raises:
            `ValueError`: If a function failed. Names the function, and the row if there is one.
        """
        errors = gather_object(self._errors)
        if errors:
            raise ValueError("\n".join(dict.fromkeys(errors))) from self._exception

    def check_models(
        self, reward_funcs: Sequence[Any], names: Sequence[str], rewards: torch.Tensor, prompts: Sequence[Any]
    ) -> None:
        """
        Check what reward models returned. This is a collective call.

        Unlike a reward function, a reward model cannot leave a completion unscored.

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
            `FloatingPointError`: On all ranks, if a reward is not finite. Names the model and the prompt.
        """
        for func, name, column in zip(reward_funcs, names, rewards.unbind(dim=1), strict=True):
            rows = (~torch.isfinite(column)).nonzero().flatten().tolist()
            if isinstance(func, nn.Module) and rows:
                prompt = gather_object(list(prompts))[rows[0]]
                raise FloatingPointError(
                    f"Step {self._step}: reward model `{name}` returned a value that is not finite for {len(rows)} of "
                    f"{len(column)} completions. The first is {column[rows[0]].item()}, for the prompt "
                    f"{str(prompt)[:200]!r}."
                )
