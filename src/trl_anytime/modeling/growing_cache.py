"""A cache of keys and values that grows in place. The one of transformers is copied for every token."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from transformers.cache_utils import Cache, DynamicLayer

# A full buffer grows by this share, but by at least so many tokens. A trace of 8,000 tokens has 13 buffers. Growth by
# 64 tokens would make 125, each a little too large for the memory of the one before.
_GROWTH = 0.5
_BLOCK = 64


class _GrowingLayer(DynamicLayer):
    """A [`~transformers.cache_utils.DynamicLayer`] whose keys and values are views of larger buffers."""

    _buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def __init__(self, *args: Any, max_length: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_length = max_length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.size(2)
        if self._buffers is None or end > self._buffers[0].size(2):
            capacity = end + max(_BLOCK, int(_GROWTH * end))
            if self._max_length is not None:
                capacity = max(end, min(capacity, self._max_length))
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


def growing_cache(max_length: int | None = None) -> Cache:
    """
    Make an empty cache for `generate()` and for forward passes without gradients.

    Every layer keeps all tokens, even one with a sliding window. A branch that leaves a trace early sees the tokens
    before its cut.

    Args:
        max_length (`int`, *optional*):
            Most tokens that it will hold, as far as is known. Buffers do not grow beyond.
    """
    layer = partial(_GrowingLayer, max_length=max_length)
    return Cache(layer_class_to_replicate=cast(Any, layer))


def refill_cache(cache: Cache, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int) -> None:
    """
    Fill an empty cache as if `first` tokens had come together, and the others one by one.

    The buffers then have the sizes that they had before. The result of a matrix product may depend on them in its
    last bits.

    Args:
        cache (`Cache`):
            Cache of [`growing_cache`].
        layers (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of each layer, shape (1, heads, tokens, head size).
        first (`int`):
            Tokens that came first, together.
    """
    for index, (keys, values) in enumerate(layers):
        start, end, length = 0, min(first, keys.size(2)), keys.size(2)
        while start < length:
            cache.update(keys[:, :, start:end], values[:, :, start:end], index)
            buffers = cast(_GrowingLayer, cache.layers[index])._buffers
            assert buffers is not None
            # Up to the end of the buffer, then the one token that makes it grow
            start, end = end, min(length, buffers[0].size(2) if end < buffers[0].size(2) else end + 1)
