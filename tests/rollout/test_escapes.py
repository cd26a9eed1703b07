r"""Summaries that resume the reasoning behind a forced cut, found by hand."""

from dataclasses import replace

import pytest

from tests.support.anytime import make_anytime_config
from tests.support.tiny import byte_tokenizer, make_tokenizer
from trl_anytime.rollout.escapes import CONTRADICTED, ESCAPES, REOPENED, UNANSWERED, EscapeSearch
from trl_anytime.rollout.markers import find_markers
from trl_anytime.rollout.types import Rollout, Thinking

BOXES = tuple(rf"\boxed{{{digit}}}" for digit in range(10))
TOKENIZER = make_tokenizer(extra_words=BOXES)
CONFIG = make_anytime_config()
SEARCH = EscapeSearch(CONFIG.markers, TOKENIZER)
# The words of a summary, whether it is cut off, and the sign
CASES = [
    (r"\boxed{3} <|im_end|>", False, None),
    (r"\boxed{3} \boxed{3} <|im_end|>", False, None),
    (r"so \boxed{3} so so", True, None),  # cut off behind its answer
    ("3 <|im_end|>", False, None),
    ("so so so so", True, UNANSWERED),
    (r"\boxed{3} so \boxed{4} <|im_end|>", False, CONTRADICTED),
    (r"<think> so </think> \boxed{3}", False, REOPENED),
    (r"\boxed{3} </think> <|im_end|>", False, REOPENED),
    (r"\boxed{3} \boxed{4} <think> so", True, REOPENED),
]


def ids(words):
    return TOKENIZER.convert_tokens_to_ids(words.split())


def kind(words, clipped):
    return SEARCH.kind(ids(words), TOKENIZER.decode(ids(words), skip_special_tokens=True), clipped)


@pytest.mark.parametrize(("words", "clipped", "expected"), CASES)
def test_signs(words, clipped, expected):
    assert kind(words, clipped) == expected


def test_every_sign_has_a_case():
    assert {expected for *_, expected in CASES} == {None, *ESCAPES}


def test_only_forced_cuts_count():
    """The trace ends by itself after 4 tokens, so the budget 8 does not cut it."""
    thinking = Thinking(ids("1 2 3 </think>"), finished=True, ended_with_eos=False)
    summaries = [[ids("so so"), ids(r"\boxed{3} <|im_end|>")], [ids("so so"), ids("so so")]]
    rollout = Rollout.from_budgets(ids("user 1"), thinking, [2, 8], CONFIG.markers, summaries)
    texts = [TOKENIZER.batch_decode(at_budget, skip_special_tokens=True) for at_budget in summaries]
    assert SEARCH.kinds(rollout, texts, rollout.clipped(2, [2])) == [[UNANSWERED, None], None]
    # One that ended with EOS is closed by force
    broken_off = replace(thinking, token_ids=ids("1 2 3 <|im_end|>"), finished=False, ended_with_eos=True)
    rollout = Rollout.from_budgets(ids("user 1"), broken_off, [2, 8], CONFIG.markers, summaries)
    assert SEARCH.kinds(rollout, texts, rollout.clipped(2, [2])) == [[UNANSWERED, None], [UNANSWERED] * 2]


@pytest.mark.parametrize("special", [("<|end|>", "<think>", "</think>"), ("<|end|>",)], ids=["tokens", "text"])
def test_markers_of_byte_level_tokenizers(special):
    """Special tokens are not in the text of a summary. Markers that are no tokens are."""
    tokenizer = byte_tokenizer(special_tokens=special, chat_template="<think>")
    markers = find_markers(tokenizer, "<think>", truncation_bridge="</think>")
    search = EscapeSearch(markers, tokenizer)

    def found(text):
        token_ids = tokenizer(text)["input_ids"]
        return search.kind(token_ids, tokenizer.decode(token_ids, skip_special_tokens=True), clipped=False)

    assert [found(text) for text in ("3", "3 <think> so", "3</think> 4", "so>3")] == [None, REOPENED, REOPENED, None]
