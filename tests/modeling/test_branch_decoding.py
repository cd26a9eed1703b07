"""What decoding branches asks of the host: a GPU would wait for it in every layer, for every trunk and token."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny import make_model
from trl_anytime.modeling.branch_decoding import BranchContext, BranchRows, Trunk, decode_branches
from trl_anytime.modeling.growing_cache import growing_cache
from trl_anytime.modeling.tree_attention import enable_tree_attention


class HostWaits(TorchDispatchMode):
    """Counts operators whose result or size the host has to know, by name."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_are_counted():
    """A mask as an index, the number that a tensor holds, and its truth are waits; row numbers are not."""
    x = torch.arange(4)
    with HostWaits() as host:
        x[x > 1], x[torch.tensor([0, 1])], x.sum().item(), bool(x[0] == 0)
    assert len(host.waits) == 3


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


@pytest.mark.parametrize("num_trunks", [1, 4])
def test_a_forward_pass_waits_for_nothing(num_trunks):
    model = make_model().eval()
    enable_tree_attention(model)
    rows = BranchRows(model, *contexts_of(model, num_trunks))
    with torch.no_grad(), HostWaits() as host:
        rows.forward(rows.first_tokens)
        rows.forward(torch.full((2 * num_trunks, 1), 9))
    assert host.waits == []


def test_a_token_waits_once():
    """Whether all branches have ended is one number a token. Nothing ends here, so that no rows are dropped."""
    model = make_model().eval()
    enable_tree_attention(model)
    trunk, contexts = contexts_of(model, 3)

    def waits(max_new_tokens):
        with torch.no_grad(), HostWaits() as host:
            decode_branches(
                model,
                trunk,
                contexts,
                lambda so_far, logits: logits.argmax(-1) * 0 + 9,
                needs_history=False,
                eos_token_ids=[2],
                max_new_tokens=max_new_tokens,
            )
        return len(host.waits)

    assert waits(9) - waits(4) == 5
