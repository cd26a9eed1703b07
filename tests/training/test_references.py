"""Reference answers as tokens: how they are read, and where they would melt into the bridge."""

from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.anytime import make_markers
from tests.support.tiny import byte_tokenizer
from trl_anytime.training.references import encode_reference, reference_texts


@pytest.mark.parametrize(
    ("value", "text"),
    [(42, "42"), (" Paris ", "Paris"), (r"so \boxed{7}", "7"), ("4 + 3 = 7\n#### 7", "7"), ("['12']", "12")],
)
def test_one_answer(value, text):
    assert reference_texts({"answer": [value]}, r"\boxed{{answer}}") == [rf"\boxed{{{text}}}"]


@pytest.mark.parametrize("value", ["", None, ["1", "2"], "['1', '2']", "N/A"])
def test_no_answer_or_several(value):
    with pytest.raises(ValueError, match="Row 1: `solution`.*`summary_reward`"):
        reference_texts({"solution": ["1", value]}, "{answer}")


def test_no_column():
    with pytest.raises(ValueError, match="'answer'"):
        reference_texts({"question": ["1"]}, "{answer}")


def markers_of(tokenizer, answer_bridge):
    ids = tokenizer(answer_bridge, add_special_tokens=False)["input_ids"]
    return replace(make_markers(), answer_bridge=answer_bridge, answer_bridge_ids=tuple(ids))


def test_tokens_behind_the_bridge():
    """` 4` is one token here: an answer behind a space would melt into it, and one behind a line break does not."""
    tokenizer = byte_tokenizer(["41 42 43 45 46"] * 50)
    assert len(tokenizer(" 4")["input_ids"]) == 1
    end = tokenizer.eos_token_id
    for bridge, melts in (("Answer\n", False), ("Answer: ", True)):
        ids, found = encode_reference("42", tokenizer, markers_of(tokenizer, bridge), end)
        assert found is melts and ids[-1] == end
        assert tokenizer.decode(ids[:-1]) == "42"
    joint = tokenizer("Answer\n42")["input_ids"]
    bridge = list(markers_of(tokenizer, "Answer\n").answer_bridge_ids)
    assert bridge + encode_reference("42", tokenizer, markers_of(tokenizer, "Answer\n"), end)[0] == [*joint, end]


def test_a_tokenizer_of_words_that_knows_none_of_both_together():
    words = Tokenizer(models.WordLevel({"so": 0, "answer": 1, "7": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert encode_reference("7", tokenizer, markers_of(tokenizer, "answer"), 0) == ([2, 0], True)
    assert encode_reference(" 7", tokenizer, markers_of(tokenizer, "answer"), 0) == ([2, 0], False)
    with pytest.raises(ValueError, match="'8'"):
        encode_reference("8", tokenizer, markers_of(tokenizer, "answer"), 0)
