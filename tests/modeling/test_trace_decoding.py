"""Traces decoded by a loop of our own, against `generate()` with the same random numbers."""

import pytest
import torch
from transformers import GenerationConfig

from tests.support.families import FAMILIES
from tests.support.tiny import make_model
from trl_anytime.modeling.trace_decoding import decode_traces

NEVER = 99  # no token has this id
ALIKE = [[5, 6, 7], [5, 8, 9], [3, 3, 4]]
UNLIKE = [[5, 6, 7, 8, 9, 4], [3], [6, 7, 6]]


def sample(token_ids, logits):
    return torch.multinomial(logits.float().softmax(-1), 1)[:, 0]


def decode(
    model, prompts, most, stops=(NEVER,), find_end=lambda row, token_ids, seen: None, choose=sample, **settings
):
    torch.manual_seed(1)
    with torch.no_grad():
        return decode_traces(
            model,
            prompts,
            choose,
            find_end,
            **{
                "needs_history": False,
                "stop_token_ids": stops,
                "max_new_tokens": most,
                "pad_token_id": 0,
                **settings,
            },
        )


def generate(model, prompts, most, **settings):
    """The tokens that `generate()` samples with the same random numbers, and what it pads the prompts to."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=most, pad_token_id=0, eos_token_id=NEVER)
    torch.manual_seed(1)
    output = model.generate(tokens, attention_mask=mask, generation_config=config, **settings)
    return output[:, width:].tolist(), tokens


@pytest.mark.parametrize("prompts", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("family", ["qwen3", "mistral with a window", "gpt2"])
def test_the_tokens_are_those_of_generate(family, prompts):
    """Drawn with the same random numbers, across several looks at the tokens, and beyond the window."""
    model = make_model(family.split()[0], **FAMILIES[family]).eval()
    sampled, trunk = decode(model, prompts, 21)
    assert sampled == generate(model, prompts, 21)[0]
    assert len({tuple(ids) for ids in sampled}) == 3
    # Keys of all but the last token
    assert trunk.layers[0][0].size(2) == max(map(len, prompts)) + 20 and trunk.rollouts == [0, 1, 2]
    assert trunk.positions == [len(ids) - max(map(len, prompts)) for ids in prompts]


def test_rules_see_the_tokens_so_far():
    model = make_model().eval()
    seen = []

    def choose(token_ids, logits):
        seen.append(token_ids.tolist())
        return sample(token_ids, logits)

    sampled, _ = decode(model, UNLIKE, 9, choose=choose, needs_history=True)
    expected, padded = generate(model, UNLIKE, 9)
    assert sampled == expected
    assert seen == [torch.cat([padded, torch.tensor(expected)[:, :n]], dim=1).tolist() for n in range(9)]
    assert decode(model, UNLIKE, 9, choose=lambda ids, logits: sample(ids, logits) if ids is None else 1 / 0)


class Rows:
    """How many rows each forward pass has."""

    def __init__(self, model):
        self.counts = []
        model.register_forward_pre_hook(
            lambda model, args, kwargs: self.counts.append(len(kwargs["input_ids"])), with_kwargs=True
        )


def scripted(scripts):
    """Choose the next token of each row by its script, whichever rows are left: the last token says which it is."""
    steps = iter(range(1000))

    def choose(token_ids, logits):
        step = next(steps)
        return torch.tensor([scripts[row][step] for row in (token_ids[:, 0] - 10).tolist()])

    return choose


def test_finished_traces_leave_at_once():
    """More than a quarter has finished: after the third token two of four rows go on, after the fifth one."""
    model = make_model().eval()
    scripts = [[3, 3, 9] + [4] * 17, [3, 9] + [4] * 18, [3] * 4 + [9] + [4] * 15, [5] * 20]
    rows = Rows(model)

    def find_end(row, token_ids, seen):
        assert token_ids == scripts[row][: len(token_ids)] and len(token_ids) > seen
        return token_ids.index(9) + 1 if 9 in token_ids else None

    sampled, trunk = decode(
        model,
        [[10], [11], [12], [13]],
        20,
        stops=(9,),
        find_end=find_end,
        choose=scripted(scripts),
        needs_history=True,
    )
    assert sampled == [scripts[0][:3], scripts[1][:2], scripts[2][:5], scripts[3]]
    # One of four that has finished (after the second token) is not yet worth a copy
    assert rows.counts == [4] * 3 + [2] * 2 + [1] * 15
    # The prompt's token and those sampled before the trace left, but the last
    assert trunk.lengths == {0: 3, 1: 3, 2: 5, 3: 20}


def test_an_end_that_is_no_stop_token_is_looked_for_every_eight_tokens():
    model = make_model().eval()
    rows, looks = Rows(model), []

    def find_end(row, token_ids, seen):
        looks.append((row, seen, len(token_ids)))
        return 3 if row == 0 else None

    sampled, trunk = decode(model, [[5, 6], [7, 8]], 20, find_end=find_end)
    assert [len(ids) for ids in sampled] == [3, 20]
    assert looks == [(0, 0, 8), (1, 0, 8), (1, 8, 16), (1, 16, 20)]
    assert rows.counts == [2] * 8 + [1] * 12
    assert trunk.lengths == {0: 9, 1: 21}


def test_broken_logits_are_refused():
    """`choose` marks a row without a distribution."""
    with pytest.raises(FloatingPointError, match="1 of 3"):
        decode(make_model().eval(), ALIKE, 5, choose=lambda token_ids, logits: torch.tensor([4, -1, 5]))
