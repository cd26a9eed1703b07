"""
What thinks and answers for a session: a model of transformers, a vLLM engine, or a server.

Each gives the tokens of a trace that do not depend on where thinking paused. With transformers every token is computed
by a step of its own, on a cache that is kept, and drawn with a seed of its own. An engine and a server draw a whole
chunk of tokens by one request with one seed. Chunks begin at fixed positions, so the requests are the same wherever
thinking paused.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..rollout.markers import EndScan
from ..rollout.types import Thinking
from .anytime_config import AnytimeConfig

# Called with new tokens as they come. Returns whether thinking should pause.
Show = Callable[[list[int]], bool]


class Trace:
    """
    A trace that grows.

    Args:
        prompt_ids (`Sequence[int]`):
            The rendered prompt.
        config ([`AnytimeConfig`]):
            Settings of the session.
        token_ids (`Sequence[int]`, *optional*):
            Tokens so far.
        ahead (`Sequence[int]`, *optional*):
            Tokens that were drawn and do not belong to the trace yet.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        config: AnytimeConfig,
        token_ids: Sequence[int] = (),
        ahead: Sequence[int] = (),
    ):
        self.prompt_ids, self.config = list(prompt_ids), config
        self.token_ids: list[int] = []
        self.ahead = list(ahead)
        self.ended = False
        self._scan = EndScan(config.markers)
        for token in token_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token, and notice whether it ends the trace."""
        self.token_ids.append(token)
        self.ended = token in self.config.eos_token_ids or self._scan.end_of_thinking(self.token_ids) is not None
        if self.ended:
            self.ahead.clear()

    @property
    def all_ids(self) -> list[int]:
        """Return prompt and trace."""
        return self.prompt_ids + self.token_ids

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the tokens at which the sampling of a trace may stop."""
        return self.config.rollout_settings(1).stop_token_ids

    def thinking(self) -> Thinking:
        """Return the trace so far."""
        return Thinking.from_tokens(self.token_ids, self.config.markers, self.config.eos_token_ids)


class SessionBackend(ABC):
    """
    What thinks and answers for one session.

    Attributes:
        name (`str`):
            Name of the kind of backend.
    """

    name: str

    @abstractmethod
    def think(self, trace: Trace, tokens: int, room: int | None, show: Show | None) -> None:
        """
        Append up to `tokens` tokens to a trace that has not ended.

        Args:
            trace ([`Trace`]):
                The trace.
            tokens (`int`):
                Most tokens to append.
            room (`int`, *optional*):
                Tokens that the context has room for, `None` if that is not known.
            show (`Callable`, *optional*):
                Function of the tokens as they come.
        """

    @abstractmethod
    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        """Return `num` summaries that follow prompt, trace and bridge. The trace is not touched."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what says which model this is."""

    def numerics(self) -> dict[str, Any]:
        """Return what the last bits of a result depend on, besides the model."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the kept cache, as far as it can be saved."""
        return {}

    def restore(self, trace: Trace, tensors: dict[str, torch.Tensor]) -> None:  # noqa: B027  # others keep nothing
        """Take over the cache of [`tensors`], or compute it again if there is none."""


def derived_seed(*parts: Any) -> int:
    """Return a seed that depends on all parts, from 0 to 2⁶³ - 1."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
