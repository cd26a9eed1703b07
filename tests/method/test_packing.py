import torch

from tests.support.packed import drawing
from trl_anytime.method import packing as tree
from trl_anytime.method.packing import PackedRollouts


def test_the_drawing_shows_the_layout():
    packed = drawing()
    lines = {line[:12].strip(): line[12:] for line in tree.__doc__.split("```")[1].splitlines()}
    numbers = {name: [int(x) for x in line.replace("|", " ").split("after")[0].split()] for name, line in lines.items()
               if name in ("index", "position", "trained")}  # fmt: skip
    assert packed.indices()[0].tolist() == numbers["index"]
    assert packed.positions()[0].tolist() == numbers["position"]
    assert packed.trained()[0].int().tolist() == numbers["trained"]
    visible = packed.visible()[0]
    for name, column in (("sees z1 z2", 0), ("sees z3 z4", 2)):
        sees = [mark == "x" for mark in lines[name].replace("|", " ").split("as well")[0].split()]
        # The drawing leaves out what a thinking token sees of its own past, so only branches are compared
        assert visible[4:, column].tolist() == sees[4:]
        assert visible[4:, column + 1].tolist() == sees[4:]


def test_visible_by_hand():
    x = drawing().visible()[0].int().tolist()
    assert x[3] == [1, 1, 1, 1] + [0] * 9  # the last thinking token: all thinking, no branch
    assert x[5] == [1, 1, 0, 0, 1, 1] + [0] * 7  # first summary: two thinking tokens, its bridge, itself
    assert x[8] == [1, 1, 0, 0, 0, 0, 1, 1, 1] + [0] * 4  # second summary of the first cut: not the first summary
    assert x[12] == [1, 1, 1, 1] + [0] * 7 + [1, 1]  # the last branch


def test_unequal_rollouts_and_empty_parts():
    # The second rollout: no thinking at all, an empty summary
    packed = PackedRollouts.pack(
        [[1, 2], []],
        [[1, 2], [0, 0]],
        [[[9], [9, 9]], [[9], [9]]],
        [[[[3]], [[4, 5]]], [[[]], [[6]]]],
        pad_token_id=-1,
    )
    assert packed.token_ids.tolist() == [[1, 2, 9, 3, 9, 9, 4, 5], [9, 9, 6, -1, -1, -1, -1, -1]]
    assert packed.thinking_lengths.tolist() == [2, 0]
    assert packed.lengths.tolist() == [8, 3]
    assert packed.trained().int().tolist() == [[1, 1, 0, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0]]
    assert packed.positions()[1, :3].tolist() == [0, 0, 1]
    assert packed.visible()[1, 2].tolist() == [False, True, True] + [False] * 5


def pruned(*trained, packed=None):
    """What is left of the drawing if the tokens at these places have an advantage."""
    packed = packed or drawing()
    advantages = torch.zeros(packed.token_ids.shape)
    advantages[0, list(trained)] = -0.5
    left, source = packed.prune(advantages)
    assert left.thinking_lengths[0] + (left.spans[0, ..., 2] - left.spans[0, ..., 0]).sum() == left.lengths[0]
    return left, source


def test_pruning_by_hand():
    # The first summary sees z1 z2; the last one all four
    left, source = pruned(5)
    assert source.tolist() == [[0, 1, 4, 5]] and left.token_ids.tolist() == [[1, 2, 9, 5]]
    assert left.cuts.tolist() == [[2, 2]]  # there is no more thinking
    assert left.spans.tolist() == [[[[2, 3, 4], [4, 4, 4]], [[4, 4, 4], [4, 4, 4]]]]
    assert left.positions().tolist() == [[0, 1, 2, 3]] and left.trained().tolist() == [[True, True, False, True]]
    left, source = pruned(12)
    assert source.tolist() == [[0, 1, 2, 3, 11, 12]] and left.positions().tolist() == [[0, 1, 2, 3, 4, 5]]
    # A token of a summary keeps all of it; two branches are not neighbours any more
    left, source = pruned(7, 10)
    assert source.tolist() == [[0, 1, 2, 3, 6, 7, 8, 9, 10]]
    assert torch.equal(left.visible()[0], drawing().visible()[0][source[0]][:, source[0]])
    # Thinking alone, up to what has an advantage; with nothing to train a single token
    assert pruned(1)[1].tolist() == [[0, 1]]
    assert pruned()[1].tolist() == [[0]]
    assert pruned(*range(13))[1].tolist() == [list(range(13))]


def test_pruning_rows_of_several_lengths():
    packed = PackedRollouts.pack(
        [[1, 2], []], [[1, 2], [0, 0]], [[[9], [9, 9]], [[9], [9]]], [[[[3]], [[4, 5]]], [[[7]], [[6]]]]
    )
    # No thinking and nothing to train: the first branch stays
    left, source = pruned(3, packed=packed)
    assert source.tolist() == [[0, 2, 3], [0, 1, -1]]
    assert left.token_ids.tolist() == [[1, 9, 3], [9, 7, 0]] and left.lengths.tolist() == [3, 2]
    assert left.thinking_lengths.tolist() == [1, 0]


def test_token_advantages_by_hand():
    # Budgets 2 and 4: tokens 1-2 and 3-4 are the segments; bridges and padding get none
    advantages = drawing().token_advantages(
        torch.tensor([[0.5, -1.0]]), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), budgets=[2, 4]
    )
    assert advantages.tolist() == [[0.5, 0.5, -1.0, -1.0, 0, 1.0, 0, 2.0, 2.0, 0, 3.0, 0, 4.0]]


def test_the_first_token_belongs_to_the_second_segment_behind_a_budget_of_0():
    packed = PackedRollouts.pack([[1, 2, 3]], [[0, 2, 3]], [[[9]] * 3], [[[[4]]] * 3])
    advantages = packed.token_advantages(torch.tensor([[5.0, 1.0, 2.0]]), torch.zeros(1, 3, 1), budgets=[0, 2, 3])
    assert advantages[0, :3].tolist() == [1.0, 1.0, 2.0]
    # The summary at 0 tokens goes on from the prompt
    assert packed.positions()[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4]


def test_more_budgets_than_segments():
    # A trace that ended at token 3 of budgets 2, 4, 6: its third token belongs to the second segment
    packed = PackedRollouts.pack([[1, 2, 3]], [[2, 3, 3]], [[[9]] * 3], [[[[4]]] * 3])
    advantages = packed.token_advantages(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3, 1), budgets=[2, 4, 6])
    assert advantages[0, :3].tolist() == [1.0, 1.0, 2.0]
