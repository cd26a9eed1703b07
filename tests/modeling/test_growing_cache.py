"""The buffers of the cache grow rarely, hold what was put in, and stay within a known length."""

import pytest
import torch

from trl_anytime.modeling.growing_cache import growing_cache, refill_cache


def filled(tokens, max_length=None):
    """A cache after one token at a time, and the sizes of its buffers in order."""
    cache, sizes = growing_cache(max_length), []
    for token in range(tokens):
        new = torch.full((1, 1, 1, 2), float(token))
        keys, values = cache.update(new, -new, 0)
        sizes.append(cache.layers[0]._buffers[0].size(2))
    assert keys[0, 0, :, 0].tolist() == list(range(tokens)) and torch.equal(values, -keys)
    return cache, list(dict.fromkeys(sizes))


def test_few_copies():
    # 1 + 64 tokens; 66 + 64; 131 + 65; then half as much again each time, with the token that did not fit
    sizes = filled(1000)[1]
    assert sizes[:5] == [65, 130, 196, 295, 444] and len(sizes) == 7


@pytest.mark.parametrize("max_length", [40, 200])
def test_a_known_length_is_not_exceeded(max_length):
    assert filled(max_length, max_length)[1][-1] == max_length
    # What is known may be wrong: it still holds all
    assert filled(max_length + 3, max_length)[1][-1] == max_length + 3


def test_rows_that_are_selected_go_on():
    cache = growing_cache(100)
    cache.update(torch.arange(6.0).view(3, 1, 2, 1), torch.zeros(3, 1, 2, 1), 0)
    cache.batch_select_indices(torch.tensor([2, 0]))
    keys, _ = cache.update(torch.tensor([8.0, 9.0]).view(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), 0)
    assert keys[:, 0, :, 0].tolist() == [[4, 5, 8], [0, 1, 9]]


@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize("first", [1, 10, 190])
def test_a_refilled_cache_has_the_buffers_of_the_first(first, max_length):
    """Its results then have the same last bits, and it goes on growing as the first did."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 200, 8).unbind()
    grown, refilled = growing_cache(max_length), growing_cache(max_length)
    for start, end in [(0, first), *((i, i + 1) for i in range(first, 195))]:
        for layer in range(2):
            grown.update(keys[:, :, start:end], values[:, :, start:end], layer)
    refill_cache(refilled, [(keys[:, :, :195], values[:, :, :195])] * 2, first)
    for i in range(195, 200):
        for one, other in zip(grown.layers, refilled.layers, strict=True):
            assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
            assert one.keys.stride() == other.keys.stride()
        for cache in (grown, refilled):
            for layer in range(2):
                cache.update(keys[:, :, i : i + 1], values[:, :, i : i + 1], layer)
