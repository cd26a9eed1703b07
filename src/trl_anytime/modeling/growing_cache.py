"""A cache of keys and values that grows in place. The one of transformers is copied for every token."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

# Tokens by which a full buffer grows. Copies are this many times rarer, and little memory is unused.
_BLOCK = 64


class _GrowingLayer(DynamicLayer):
    """A [`~transformers.cache_utils.DynamicLayer`] whose keys and values are views of larger buffers."""

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(2)
        if self._buffers is None or end > self._buffers[0].size(2):
            capacity = -(-end // _BLOCK) * _BLOCK
            grown = [new.new_empty(*new.shape[:2], capacity, new.size(3)) for new in (key_states, value_states)]
            if start:
                assert self.keys is not None and self.values is not None
                grown[0][:, :, :start], grown[1][:, :, :start] = self.keys, self.values
            self._buffers = grown[0], grown[1]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = None


def growing_cache() -> Cache:
    """
    Make an empty cache for `generate()` and for forward passes without gradients.

    Every layer keeps all tokens, even one with a sliding window. A branch that leaves a trace early sees the tokens
    before its cut.
    """
    return Cache(layer_class_to_replicate=_GrowingLayer)
