"""An end of thinking that tokenizers write in more than one way, found in real tokenizers' tokens."""

import pickle

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.support.melting import GPT2, GPT4, NEIGHBOURS, make_melting_tokenizer, make_sentencepiece_tokenizer
from trl_anytime.rollout.end_search import TextSearch, TokenBytes
from trl_anytime.rollout.markers import EndScan, ThinkingMarkers, find_markers
from trl_anytime.rollout.types import Rollout, Thinking

TOKENIZERS = {
    "GPT-2": (lambda think_end: make_melting_tokenizer(GPT2, think_end)),
    "GPT-4": (lambda think_end: make_melting_tokenizer(GPT4, think_end)),
    "SentencePiece": make_sentencepiece_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def make(request):
    return TOKENIZERS[request.param]


def markers_of(tokenizer, think_end="</think>"):
    truncation_bridge = f"...\n\n{think_end}"
    return find_markers(tokenizer, "x", think_end=think_end, truncation_bridge=truncation_bridge)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def length_up_to(tokenizer, token_ids, text):
    """Tokens of the shortest beginning whose text has `text`, decoded as a whole."""
    return next(n for n in range(len(token_ids) + 1) if text in tokenizer.decode(token_ids[:n]))


@pytest.mark.parametrize("think_end", ["</think>", "◁/think▷", "End of thoughts."])
def test_natural_endings(make, think_end):
    tokenizer = make("</think>")  # which does not know the others
    markers = markers_of(tokenizer, think_end)
    assert markers.in_text
    ends, by_ids = [], 0
    for before, after in NEIGHBOURS:
        token_ids = encode(tokenizer, f"{before}{think_end}{after}")
        ends.append(length_up_to(tokenizer, token_ids, think_end))
        assert markers.end_of_thinking(token_ids) == ends[-1], (before, after)
        assert markers.count_think_end(token_ids) == 1
        assert markers.end_of_thinking(token_ids[: ends[-1] - 1]) is None
        assert markers.count_think_end([*token_ids, *encode(tokenizer, f"{before}{think_end}")]) == 2
        joined = "".join(f",{token}," for token in token_ids)
        by_ids += "".join(f",{token}," for token in markers.think_end_ids) in joined
    if think_end == "</think>":
        assert by_ids < len(NEIGHBOURS) / 2  # else the tokenizer does not melt it


def test_what_a_token_carries_behind_the_end_stays_in_the_thinking():
    tokenizer = make_melting_tokenizer()
    markers = markers_of(tokenizer)
    token_ids = encode(tokenizer, "so it is 4.</think>\n\nSo")
    thinking = Thinking.from_tokens(token_ids, markers, [tokenizer.eos_token_id])
    assert thinking.finished and not thinking.ended_with_eos
    assert tokenizer.decode(thinking.token_ids) == "so it is 4.</think>\n\n"
    assert tokenizer.decode(thinking.token_ids[-1]) == ">\n\n"


def test_text_that_only_begins_like_the_end(make):
    tokenizer = make("</think>")
    markers = markers_of(tokenizer)
    for text in ("a </thin k>", "</think", "<think>", "</thi</thi", "< /think>", "</thinking>"):
        assert markers.end_of_thinking(encode(tokenizer, text)) is None, text
    token_ids = encode(tokenizer, "</thi</think>")
    assert markers.end_of_thinking(token_ids) == length_up_to(tokenizer, token_ids, "</think>")


def test_a_token_at_a_time_finds_the_same(make):
    tokenizer = make("</think>")
    markers = markers_of(tokenizer)
    for before, after in NEIGHBOURS:
        token_ids = encode(tokenizer, f"{before}</think>{after}</think>")
        scan = EndScan(markers)
        found = [scan.end_of_thinking(token_ids[:n]) for n in range(len(token_ids) + 1)]
        end = markers.end_of_thinking(token_ids)
        assert found == [None] * end + [end] * (len(token_ids) + 1 - end)


def test_several_ends_in_one_token():
    search = TextSearch("ab", {0: b"abab", 1: b"xa", 2: b"b", 3: b"ba", 4: b""}.__getitem__)
    assert search.first([1, 2, 0]) == (2, 0)
    assert search.count([1, 2, 0]) == 3
    assert search.first([1, 4, 2]) == (3, 0)
    assert search.first([3]) == (None, 1)
    assert search.first([2], state=1) == (1, 0)
    assert TextSearch("aab", {0: b"a", 1: b"b"}.__getitem__).first([0, 0, 0, 1]) == (4, 0)


def test_the_bytes_of_all_tokens_are_those_of_the_text(make):
    tokenizer = make("</think>")
    token_bytes = TokenBytes(tokenizer, encode(tokenizer, "</think>"))
    for text in ("so  it is 4.\n\n</think>", "é ◁ 漢字 🙂 x", "a\tb  c"):
        joined = b"".join(token_bytes(token) for token in encode(tokenizer, text)).decode()
        assert joined.removeprefix(" ") == text  # SentencePiece writes a space before the first word
    assert token_bytes(tokenizer.eos_token_id) == tokenizer.eos_token.encode()
    assert token_bytes(10**6) == b""  # rows of embeddings beyond the vocabulary


def with_token(*tokens):
    tokenizer = make_melting_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def test_an_end_that_is_a_token_is_found_by_its_id():
    """The released method: text that spells it does not count."""
    spelled = encode(make_melting_tokenizer(), "4.</think>\n\n")
    tokenizer = with_token("</think>")
    markers = markers_of(tokenizer)
    assert not markers.in_text and markers.max_end_length == 1
    assert markers.end_of_thinking(spelled) is None
    for before, after in NEIGHBOURS:
        token_ids = encode(tokenizer, f"{before}</think>{after}")
        assert markers.end_of_thinking(token_ids) == token_ids.index(markers.think_end_ids[0]) + 1


@pytest.mark.parametrize(
    ("tokenizer", "think_end"),
    [
        (make_melting_tokenizer(vocab_size=900, think_end="####"), "####"),
        (with_token(AddedToken("</think>", single_word=True)), "</think>"),
    ],
    ids=["usual token", "single word"],
)
def test_one_token_that_melts_all_the_same(tokenizer, think_end):
    markers = markers_of(tokenizer, think_end)
    assert len(markers.think_end_ids) == 1 and markers.in_text
    for before, after in NEIGHBOURS:
        token_ids = encode(tokenizer, f"{before}{think_end}{after}")
        assert markers.end_of_thinking(token_ids) == length_up_to(tokenizer, token_ids, think_end)


def test_well_formed(make):
    tokenizer = make("</think>")
    markers = markers_of(tokenizer)

    def formed(thinking, summary, budget=99):
        thinking = Thinking.from_tokens(encode(tokenizer, thinking), markers, [tokenizer.eos_token_id])
        rollout = Rollout.from_budgets([], thinking, [budget], markers, [[encode(tokenizer, summary)]])
        return rollout.well_formed(markers)[0][0]

    for before, after in NEIGHBOURS:
        assert formed(f"{before}</think>{after}", "4")
        assert not formed(f"{before}</think>{after}", f"{before}</think>{after}")
        assert formed(f"{before} and so on", "4")  # reached the last budget
        assert not formed(f"{before} and so on", f"{before}</think>")
        for budget in range(1, len(encode(tokenizer, f"{before}</think>"))):
            assert formed(f"{before}</think>{after}", "4", budget)
    # Every character of the end a token of its own
    characters = [tokenizer.convert_tokens_to_ids(character) for character in "</think>"]
    thinking = Thinking.from_tokens(characters, markers, [])
    assert thinking.finished and len(thinking.token_ids) == len("</think>")
    assert Rollout.from_budgets([], thinking, [99], markers, [[[]]]).well_formed(markers) == [[True]]


def test_without_a_tokenizer():
    markers = markers_of(make_melting_tokenizer())
    fields = {name: getattr(markers, name) for name in ThinkingMarkers.__dataclass_fields__}
    bare = ThinkingMarkers(**fields)
    assert bare == markers
    for look in (bare.end_of_thinking, bare.count_think_end):
        with pytest.raises(ValueError, match="with_tokenizer"):
            look([1, 2])
    token_ids = encode(make_melting_tokenizer(), "4.</think>\n\n")
    assert bare.with_tokenizer(make_melting_tokenizer()).count_think_end(token_ids) == 1
    assert pickle.loads(pickle.dumps(markers)).count_think_end(token_ids) == 1


def test_an_end_that_is_not_in_its_own_tokens():
    """Such as one of white space that the tokenizer does not keep."""
    from tests.support.tiny import make_tokenizer

    tokenizer = make_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    with pytest.raises(ValueError, match=r"'so\\nso'"):
        find_markers(tokenizer, "x", think_end="so\nso", truncation_bridge="so\nso", answer_bridge="answer")
    markers = find_markers(tokenizer, "x", think_end="so so", truncation_bridge="so so", answer_bridge="answer")
    assert markers.end_of_thinking(encode(tokenizer, "1 so 2 so so 3")) == 5
