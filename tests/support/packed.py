"""A packed rollout to compare with by hand."""

from trl_anytime.method.packing import PackedRollouts


def drawing():
    """The rollout drawn in `trl_anytime.method.packing`: thinking 1 … 4, bridges 9, summaries of 1, 2, 1, 1 tokens."""
    return PackedRollouts.pack(
        traces=[[1, 2, 3, 4]], cuts=[[2, 4]], bridges=[[[9], [9]]], summaries=[[[[5], [6, 6]], [[7], [8]]]]
    )
