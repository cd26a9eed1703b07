"""When two answers are equal: families of spellings, real gold answers, hostile text, and random text."""

import json
import random
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import DATA
from tests.support.rewards_cases import DIFFERENT, EQUAL, HOSTILE, TOO_EXPENSIVE, TOO_LONG
from trl_anytime.rewards import MathReward, grade_answers
from trl_anytime.rewards.verifier.equality import Exact, answers_equal
from trl_anytime.rewards.verifier.forms import as_fraction, read
from trl_anytime.rewards.verifier.gold_answers import gold_alternatives
from trl_anytime.rewards.verifier.latex import normalize, tokens


def scores(pairs) -> dict:
    gold_answers, answers = [gold for gold, _ in pairs], [answer for _, answer in pairs]
    return dict(
        zip([(str(gold), answer) for gold, answer in pairs], grade_answers(answers, gold_answers), strict=True)
    )


@pytest.mark.parametrize("family", EQUAL)
def test_equal(family):
    assert [pair for pair, score in scores(EQUAL[family]).items() if score != 1.0] == []


@pytest.mark.parametrize("family", DIFFERENT)
def test_different(family):
    pairs = [(gold, answer) for gold, answer in DIFFERENT[family] if gold != ""]
    assert [pair for pair, score in scores(pairs).items() if score != 0.0] == []


# Pairs with an outcome beyond doubt, from bug reports and from what other graders are tested with.
OUTSIDE = [json.loads(line) for line in (DATA / "answers.jsonl").read_text().splitlines()]


def test_pairs_from_outside():
    scores = grade_answers([pair["answer"] for pair in OUTSIDE], [pair["gold"] for pair in OUTSIDE])
    wrong = [
        (pair["gold"], pair["answer"]) for pair, score in zip(OUTSIDE, scores, strict=True) if score != pair["equal"]
    ]
    assert len(OUTSIDE) == 253
    assert wrong == []


def test_symmetric_where_it_should_be():
    # Not where an answer claims more than a gold asks for: `m+n=17` answers 17, but 17 does not say that m+n is 17;
    # and not where a gold offers two values, of which an answer may claim one.
    # and not where a letter is a unit only because the gold is a number, or one side claims by \approx.
    one_way = {
        ("17", "m+n=17"),
        (r"\$\dfrac23 \approx \$0.67", "0.67"),
        ("5", "2+3=5"),
        ("3", "3 m"),
        (r"x\approx 3.14", "3.14"),
    }
    pairs = [
        (gold, answer)
        for family in EQUAL.values()
        for gold, answer in family
        if isinstance(gold, str) and (gold, answer) not in one_way
    ]
    assert [pair for pair, score in scores([(b, a) for a, b in pairs]).items() if score != 1.0] == []
    reverse = [
        (answer, gold)
        for family, pairs in DIFFERENT.items()
        for gold, answer in pairs
        if family not in ("hedges", "code") and (gold, answer) != ("x+y=1", "1")
        if isinstance(gold, str) and gold and answer.strip()
    ]
    assert [pair for pair, score in scores(reverse).items() if score != 0.0] == []


# Made-up gold answers in the shapes of contests and school books
GOLD_ANSWERS = [json.loads(line)["answer"] for line in (DATA / "gold_answers.jsonl").read_text().splitlines()]


def test_every_gold_answer_equals_itself():
    assert len(GOLD_ANSWERS) == 80
    texts = [gold_alternatives(gold)[0] for gold in GOLD_ANSWERS]
    for answers in (texts, [rf" $\displaystyle {text} $." for text in texts]):  # not by string equality alone
        graded = grade_answers(answers, GOLD_ANSWERS)
        assert [gold for gold, score in zip(GOLD_ANSWERS, graded, strict=True) if score != 1.0] == []


def test_gold_answers_against_each_other():
    """No two of them are equal."""
    for shift in (1, 2, 7):
        others = GOLD_ANSWERS[shift:] + GOLD_ANSWERS[:shift]
        graded = grade_answers(others, GOLD_ANSWERS)
        assert [pair for *pair, score in zip(GOLD_ANSWERS, others, graded, strict=True) if score] == []


def test_minerva_and_olympiadbench_style_gold_answers():
    gold_answers = [
        ["2", "-2"],
        [r"$\frac{1}{2}$"],
        ["(1,2)"],
        [4.0],
        [r"\boxed{7}"],
        r"4.5e33",
        r"\boxed{\frac{3}{4}}",
        "$x=3$",
    ]
    answers = ["-2", "0.5", "(1, 2)", "4", "7", r"4.5 \times 10^{33}", "0.75", "3"]
    assert grade_answers(answers, gold_answers) == [1.0] * len(gold_answers)


@pytest.mark.parametrize(
    "value", [None, "", "  ", float("nan"), float("inf"), True, {}, object(), [], [[]], ["a", None], b"2"]
)
def test_what_is_no_gold(value):
    assert gold_alternatives(value) is None
    with pytest.raises(ValueError, match="Row 1: column 'gold_answers'"):
        grade_answers(["1", "2"], ["1", value])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"\b2\b.*\b1\b"):
        grade_answers(["1", "2"], ["1"])


def test_hostile_answers_are_wrong_and_cheap_or_late():
    counts = {}
    hostile = [answer for answer in HOSTILE if answer != "2\x00"]
    reward = MathReward(end_of_thinking=None, cpu_limit=0.5, hard_limit=10.0)
    completions = [rf"\boxed{{{answer}}}" for answer in hostile]
    start = time.perf_counter()
    rewards = reward([""] * len(hostile), completions, answer=["2"] * len(hostile), log_metric=counts.__setitem__)
    assert time.perf_counter() - start < reward.batch_limit
    assert [answer for answer, score in zip(hostile, rewards, strict=True) if score] == []
    assert counts["rewards/MathReward/dead_workers"] == 0
    assert counts["rewards/MathReward/timeouts"] >= len(TOO_EXPENSIVE)


@pytest.mark.parametrize("answer", TOO_EXPENSIVE)
def test_what_cannot_be_evaluated_counts_as_a_timeout(answer):
    counts = {}
    reward = MathReward(end_of_thinking=None)
    assert reward([""], [rf"\boxed{{{answer}}}"], answer=["2"], log_metric=counts.__setitem__) == [0.0]
    assert counts["rewards/MathReward/timeouts"] == 1


@pytest.mark.parametrize("answer", TOO_LONG, ids=range(len(TOO_LONG)))
def test_long_text_is_not_looked_at(answer, monkeypatch):
    monkeypatch.setattr("trl_anytime.rewards.math.answers_equal", None)  # would raise if it was called
    assert grade_answers([answer], ["2"]) == [0.0]
    reward = MathReward(end_of_thinking=None)
    for text in (rf"\boxed{{{answer}}}", answer, r"\boxed{" + answer):
        assert reward([""], [text], answer=["2"]) == [0.0]


def test_a_gold_longer_than_the_cap_equals_itself():
    gold = "+".join(f"x_{{{number}}}" for number in range(500))
    assert len(gold) > MathReward().max_answer_length
    assert grade_answers([gold, gold + "+1"], [gold, gold]) == [1.0, 0.0]


# LaTeX-like noise: tokens that the grader gives a meaning, in any order.
NOISE = st.lists(
    st.sampled_from(
        [
            *r"0123456789xyiBe+-*/^_=<>(){}[]|,;:.%$&!'~ ",
            *("\\" + symbol for symbol in ",!{}()[]$% \\"),
            "\\frac ",
            "\\sqrt ",
            "\\pi ",
            "\\pm ",
            "\\cup ",
            "\\in ",
            "\\le ",
            "\\approx ",
            "\\circ ",
            "\\infty ",
            "\\left",
            r"\text{",
            r"\begin{pmatrix}",
            r"\end{pmatrix}",
            "or",
            "and",
            "sqrt",
            "cm",
            "Evelyn",
            "\x00",
            "😀",
            "½",
            "²",
        ]
    ),
    max_size=40,
).map("".join)
ANY_TEXT = st.one_of(st.text(max_size=60), NOISE)
FAST = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FAST
@given(ANY_TEXT, ANY_TEXT)
def test_random_text_never_raises(gold, answer):
    verdict = answers_equal(gold, answer, Exact())
    assert verdict in (True, False, None)
    assert normalize(normalize(gold)) is not None
    read(normalize(answer))


@FAST
@given(NOISE.filter(lambda text: r"\approx" not in text), NOISE.filter(lambda text: r"\approx" not in text))
def test_exact_comparison_is_symmetric(a, b):
    forward, backward = answers_equal(a, b, Exact()), answers_equal(b, a, Exact())
    assert forward == backward or "=" in a + b  # an equation answers a value, not the other way round


@FAST
@given(ANY_TEXT)
def test_every_text_equals_itself_but_nothing(text):
    assert answers_equal(text, text, Exact()) is bool(normalize(text))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), min_size=20, max_size=20))
def test_random_text_in_workers(pairs):
    gold_answers = [gold if gold.strip() else "1" for gold, _ in pairs]
    gold_answers = [gold if gold_alternatives(gold) else "1" for gold in gold_answers]
    rewards = grade_answers([answer for _, answer in pairs], gold_answers, cpu_limit=0.5)
    assert set(rewards) <= {0.0, 1.0}


NUMBERS = st.fractions(min_value=-(10**6), max_value=10**6, max_denominator=10**4)


@FAST
@given(NUMBERS, NUMBERS)
def test_fractions_are_exact(a, b):
    spellings = [rf"\frac{{{a.numerator}}}{{{a.denominator}}}", f"{a.numerator}/{a.denominator}", f"({a})"]
    other = rf"\dfrac{{{3 * b.numerator}}}{{{3 * b.denominator}}}"
    for spelling in spellings:
        assert as_fraction(read(normalize(spelling)).text) == a
        assert answers_equal(spelling, other, Exact()) is (a == b)


@FAST
@given(st.decimals(min_value=-(10**9), max_value=10**9, places=4), st.integers(0, 9))
def test_decimals_are_exact(decimal, digit):
    text = f"{decimal:f}"
    assert as_fraction(normalize(text)) == Fraction(decimal)
    assert answers_equal(text, f"{decimal:,f}".replace(",", "{,}"), Exact()) is True
    assert answers_equal(text, text + str(digit), Exact()) is (digit == 0)


@FAST
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_order_counts_in_tuples_only(items, shuffle: random.Random):
    shuffled = items.copy()
    shuffle.shuffle(shuffled)
    for opening, closing, ordered in (("(", ")", True), ("[", "]", True), ("", "", False), (r"\{", r"\}", False)):
        a, b = (opening + ", ".join(map(str, values)) + closing for values in (items, shuffled))
        assert answers_equal(a, b, Exact()) is (not ordered or items == shuffled)


@FAST
@given(NOISE)
def test_white_space_between_tokens_changes_nothing(text):
    once = normalize(text)
    assert tokens(once) == tokens(once.replace(" ", "   "))
