"""What decoding branches costs for every trunk, and how exact its attention is. Its waits: test_waits.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny import make_model
from trl_anytime.modeling.branch_decoding import (
    BranchContext,
    BranchLayout,
    BranchRows,
    Trunk,
    _page_length,
    _Readers,
)
from trl_anytime.modeling.growing_cache import growing_cache
from trl_anytime.modeling.tree_attention import enable_tree_attention


class Operators(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def contexts_of(model, num_trunks):
    """Each rollout's keys and values in a trunk of its own, and two contexts that leave each, of two branches."""
    generator = torch.Generator().manual_seed(0)
    trunks, contexts = [], []
    for rollout in range(num_trunks):
        tokens = torch.randint(3, 20, (1, 6 + rollout), generator=generator)
        cache = growing_cache()
        with torch.no_grad():
            model(tokens, past_key_values=cache, use_cache=True)
        trunks.append(Trunk.from_cache(cache, torch.zeros(1, dtype=torch.long), [rollout]))
        contexts += [BranchContext(rollout, seen, [7, 8], 2, []) for seen in (3, 6)]
    return Trunk.join(trunks), contexts


def test_operators_do_not_grow_with_trunks():
    """Nor with their lengths, as long as the scores fit into memory."""
    model = make_model().eval()
    enable_tree_attention(model)
    operators = []
    for num_trunks in (1, 2, 8):
        rows = BranchRows(model, *contexts_of(model, num_trunks))
        with torch.no_grad(), Operators() as counted:
            rows.forward(rows.first_tokens)
        operators.append(counted.number)
    assert operators[0] == operators[1] == operators[2]


@pytest.mark.parametrize(
    ("lengths", "size"),
    [
        ([7], 7),
        ([500, 480, 460], 500),  # 1500 for 1440, 4 % filled up
        ([1000, 100], 125),  # 2000, then 1500 for 500, then 1250 for 250, then 1125 for 125
        ([70, 1], 64),  # the smallest, though 192 tokens hold 71
    ],
)
def test_pages_are_as_long_as_little_is_filled_up(lengths, size):
    assert _page_length(lengths) == size


def test_joined_trunks_hold_the_same_tokens(monkeypatch):
    """Keys and values of three trunks, paddings left out, by rollout and position."""
    monkeypatch.setattr("trl_anytime.modeling.branch_decoding._SMALLEST_PAGE", 4)
    lengths, width = {5: 3, 0: 9, 2: 6, 7: 1}, 9
    rows = {rollout: torch.randn(2, 1, length, 4) for rollout, length in lengths.items()}  # keys and values

    def trunk_of(*rollouts):
        starts = [width - lengths[rollout] for rollout in rollouts]
        padded = [torch.nn.functional.pad(rows[r], (0, 0, s, 0)) for r, s in zip(rollouts, starts, strict=True)]
        keys, values = torch.stack(padded, dim=1)
        return Trunk([(keys, values)], list(rollouts), [-start for start in starts], {r: lengths[r] for r in rollouts})

    joined = Trunk.join([trunk_of(5, 0), trunk_of(2), trunk_of(7)])
    assert joined.lengths == lengths
    ((keys, values),) = joined.layers
    seen = dict.fromkeys(lengths, 0)
    for page, (rollout, first) in enumerate(zip(joined.rollouts, joined.positions, strict=True)):
        end = min(first + keys.size(2), lengths[rollout])
        assert torch.equal(keys[page, :, : end - first], rows[rollout][0, :, first:end])
        assert torch.equal(values[page, :, : end - first], rows[rollout][1, :, first:end])
        seen[rollout] += end - first
    assert seen == lengths


@pytest.mark.parametrize("largest", [1, 20, 200])
@pytest.mark.parametrize("page", [4000, 500])
@pytest.mark.parametrize("autocast", [False, True])
def test_large_scores_are_exact_in_half_precision(largest, page, autocast):
    """
    Against float64, on a long trunk whose scores are as large as some models' biased keys make them.

    What is left is the rounding of the weights and of the output to bfloat16, 2⁻⁹ each of values at most. Scores in
    bfloat16 would be off by up to a half at 200, and weights by two thirds.
    """
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_branches, head_dim = 4000, 6, 128

    def sample(*shape):
        return torch.randn(*shape, generator=generator)

    keys, values = sample(1, 2, num_tokens, head_dim).bfloat16(), sample(1, 2, num_tokens, head_dim).bfloat16()
    query, tail_key, tail_value = sample(num_branches, 4, 1, head_dim), *sample(2, num_branches, 2, 1, head_dim)
    tail_key, tail_value = tail_key.bfloat16(), tail_value.bfloat16()
    # Two heads share keys. The scores of the first key are the largest.
    per_head = keys[0].repeat_interleave(2, dim=0).double()
    scores = torch.einsum("bhsd,hnd->bhn", query.double(), per_head) * head_dim**-0.5
    query = (query * (largest / scores.abs().max())).bfloat16()

    layers = [(x.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)) for x in (keys, values)]
    num_pages = num_tokens // page
    trunk = Trunk([(layers[0], layers[1])], [0] * num_pages, [page * i for i in range(num_pages)], {0: num_tokens})
    seen = torch.tensor([num_tokens, 3000, 2500, 2000, 1500, 1000])
    readers = _Readers.from_rows(trunk, {0: list(range(num_branches))}, seen)
    starts = torch.zeros(num_branches, dtype=torch.long)
    layout = BranchLayout(trunk, readers, starts, seen[:, None])
    module = torch.nn.Module()
    module.layer_idx = 0
    settings = {"scaling": None, "dropout": 0.0, "sliding_window": None, "softcap": None, "sinks": None}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layout.attend(module, query, tail_key, tail_value, **settings)

    for branch in range(num_branches):
        own = [
            torch.cat([part[0, :, : seen[branch]], tail[branch]], dim=1).repeat_interleave(2, dim=0).double()
            for part, tail in ((keys, tail_key), (values, tail_value))
        ]
        weights = (query[branch].double() @ own[0].transpose(1, 2) * head_dim**-0.5).softmax(dim=-1)
        error = (found[branch].double() - weights @ own[1]).abs()
        bound = 2**-9 * (weights @ own[1].abs()) + 2**-9 * (weights @ own[1]).abs()
        # Scores in float32 are off by 2⁻²⁴ of 200 a summand, which weighs little beside 2⁻⁹
        assert (error <= 1.1 * bound).all()
