import pytest

from tests.support.tiny import make_tokenizer
from trl_anytime.rollout.markers import find_markers
from trl_anytime.rollout.types import Rollout, Thinking

TOKENIZER = make_tokenizer()
MARKERS = find_markers(TOKENIZER, "<think>", truncation_bridge="so </think>", answer_bridge="answer")
EOS = [TOKENIZER.eos_token_id]


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def think(text):
    return Thinking.from_tokens(ids(text), MARKERS, EOS)


def test_a_thinking_ends_at_the_first_end_of_thinking():
    thinking = think("1 2 </think> 3 </think>")
    assert thinking == Thinking(ids("1 2 </think>"), finished=True, ended_with_eos=False)
    assert think("1 2") == Thinking(ids("1 2"), finished=False, ended_with_eos=False)
    assert think("1 <|im_end|>") == Thinking(ids("1 <|im_end|>"), finished=False, ended_with_eos=True)
    assert think("") == Thinking([], finished=False, ended_with_eos=False)


@pytest.mark.parametrize(
    ("text", "budget", "cut", "bridge"),
    [
        ("1 2 3 4", 2, 2, "so </think> answer"),  # cut
        ("1 2 3 4", 4, 4, "so </think> answer"),  # reached the budget without an end
        ("1 2 3 4", 9, 4, "so </think> answer"),  # b_m was smaller, as in evaluation
        ("1 2 </think>", 2, 2, "so </think> answer"),  # finished later
        ("1 2 </think>", 3, 3, "answer"),  # finished exactly at the budget
        ("1 2 </think>", 9, 3, "answer"),
        ("1 <|im_end|>", 9, 2, "so </think> answer"),  # EOS does not end a trace
        ("</think>", 9, 1, "answer"),
        ("", 9, 0, "so </think> answer"),
    ],
)
def test_cuts_and_bridges(text, budget, cut, bridge):
    assert think(text).cut(budget, MARKERS) == (cut, tuple(ids(bridge)))


def rollout(thinking, summary, budget=9):
    thinking = think(thinking)
    cut, bridge = thinking.cut(budget, MARKERS)
    return Rollout([], thinking, [cut], [bridge], [[ids(summary)]])


@pytest.mark.parametrize(
    ("thinking", "summary", "formed"),
    [
        ("1 2", "3 <|im_end|>", True),
        ("1 2 </think>", "3 <|im_end|>", True),
        ("1 2 </think>", "3 </think>", False),  # twice
        ("1 2", "3 </think>", False),
        ("1 <|im_end|>", "3", False),  # ended with EOS
        ("1 2", "", True),
    ],
)
def test_well_formed(thinking, summary, formed):
    assert rollout(thinking, summary).well_formed(MARKERS) == [[formed]]


def test_an_abandoned_thinking_earns_nothing_at_any_budget():
    assert rollout("1 2 3 <|im_end|>", "3", budget=2).well_formed(MARKERS) == [[False]]
