"""How the rows of a micro-batch are divided into forward passes."""

import pytest

from trl_anytime.training.micro_batches import split_by_length


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([2000, 3000, 2500], [[1, 2, 0]]),  # 2 · 500 and 1 · 1000 tokens saved are too few
        ([3000, 1900, 3000], [[0, 2], [1]]),  # 1 · 1100
        # 3 · 4000 at first, then 2 · 1500 of the rest
        ([6000, 500, 2000, 500, 6000], [[0, 4], [2], [1, 3]]),
        ([100] * 50 + [90] * 100, [[*range(150)]]),  # 100 · 10
        ([0, 0, 1200], [[2], [0, 1]]),
        ([5], [[0]]),
    ],
)
def test_rows_of_like_length_share_a_forward_pass(lengths, parts):
    assert split_by_length(lengths) == parts


def test_a_share_of_the_tokens_must_be_saved():
    """20 · 200 tokens are 4 % of 100,000, 30 · 200 are 6 %."""
    assert len(split_by_length([1000] * 80 + [800] * 20)) == 1
    assert split_by_length([1000] * 70 + [800] * 30) == [[*range(70)], [*range(70, 100)]]
