"""Gold answers: the shapes that they come in, what is refused, and that training and evaluation read them alike."""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_anytime import cli
from trl_anytime.checks.start_checks import text_gold_answers
from trl_anytime.data.recipe import DataArguments, to_prompts
from trl_anytime.evaluation.problems import load_problems
from trl_anytime.rewards import ExactMatch, MathReward, MultipleChoice, NumericClose, grade_answers
from trl_anytime.rewards.verifier.gold_answers import bad_gold_message, gold_alternatives

SOLUTION = (
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether she sold 48+24 clips, because both months count."
)
SHAPES = [
    (f"{SOLUTION}\n#### 72", ["72"]),
    ("#### -1,234,567", ["-1234567"]),
    ("#### 1,234.5\n", ["1234.5"]),
    (f"{SOLUTION}\n#### $12", ["$12"]),
    ("['12']", ["12"]),
    ('["12", "13"]', ["12", "13"]),
    ("['12', 13]", ["12", "13"]),
    ("('12',)", ["12"]),
    (r"['\\frac{1}{2}']", [r"\frac{1}{2}"]),  # as `str` and `json.dumps` write it
    (json.dumps([r"\frac{1}{2}", r"\nu"]), [r"\frac{1}{2}", r"\nu"]),
    (str([r"\text{it's}"]), [r"\text{it's}"]),
    (r"['\frac{1}{2}']", [r"\frac{1}{2}"]),  # written without escapes
    ("[12]", ["12", "[12]"]),  # a list from a file, or a vector
    ("[1,2]", ["[1,2]"]),  # an interval
    ("[0, 1)", ["[0, 1)"]),
    (r"\{1, 2\}", [r"\{1, 2\}"]),
    ("{1, 2}", ["{1, 2}"]),
    ("The answer is: 8", ["8"]),
    ("First 3, then 5. The answer is 8.", ["8"]),
    (f"{SOLUTION} The final answer is **$72$**.", ["$72$"]),
    ("**Answer:** 8", ["8"]),
    ("Final answer: x = 3", ["x = 3"]),
    ("Final Answer: The final answer is $8$. I hope it is correct.", ["$8$"]),
    ("Final Answer: 8\nI hope it is correct.", ["8"]),
    ("The answer is: \\frac{1}{2}.\n\nThis follows from symmetry.", [r"\frac{1}{2}"]),
    ("The answer is St. Louis.", ["St. Louis"]),
    ("The answers are 3 and 4.", ["3 and 4"]),
    ("'12'", ["12"]),
    ('"12"', ["12"]),
    ("ANSWER = (B)", ["(B)"]),
    ("<answer> 8 </answer>", ["8"]),
    (f"{SOLUTION} So \\boxed{{72}} clips.", ["72"]),
    (r"\boxed{\frac12}", [r"\frac12"]),
    ("All real numbers except 2", ["All real numbers except 2"]),
    (r"4\text{ hours and }10\text{ minutes}", [r"4\text{ hours and }10\text{ minutes}"]),
    ("{}", ["{}"]),
    ("∞", ["∞"]),
    ("E", ["E"]),
]
NO_ANSWERS = [
    SOLUTION,
    "Since x is even, y is odd",
    "We get 5",
    " ".join(["word"] * 13),
    "['12' '13']",  # numpy's way, which Python would join
    "[['12']]",
    "{'answer': '8'}",
    '{"answer": 8}',
    r"so \boxed{8",
    r"\boxed{}",
    "#### ",
    "N/A",
    "nan",
    "None",
    "-",
    "?",
    "...",
    "$$",
]


@pytest.mark.parametrize(("value", "alternatives"), SHAPES)
def test_shapes(value, alternatives):
    assert gold_alternatives(value) == alternatives


@pytest.mark.parametrize("value", NO_ANSWERS)
def test_what_does_not_look_like_an_answer(value):
    assert gold_alternatives(value) is None
    assert repr(value)[:50] in bad_gold_message(3, "answer", value)


@pytest.mark.parametrize(
    ("value", "alternatives"),
    [
        (7, ["7"]),
        (2**63, ["9223372036854775808"]),
        (142.0, ["142"]),
        (2.0**53 - 1, ["9007199254740991"]),
        (-1e15, ["-1000000000000000"]),
        (1 / 3, ["0.333333333333333"]),
        (np.int64(7), ["7"]),
        (np.float64(0.1), ["0.1"]),
        (np.float32(0.1), ["0.1"]),
        (Decimal("12.50"), ["12.50"]),
        (Decimal("1E+3"), ["1000"]),
        (Fraction(1, 3), ["1/3"]),
        (["1", 2, 0.5], ["1", "2", "0.5"]),
        (("1", "2"), ["1", "2"]),
        (["['1', '2']", "#### 3"], ["1", "2", "3"]),
        (2.0**53, None),  # whole numbers that a float does not hold
        (-(2.0**53), None),
        (float(12345678901234567890), None),
        (Decimal("NaN"), None),
        (Decimal("1E+999999999"), None),
        (10**4000, None),
        (np.float32("nan"), None),
        (np.bool_(True), None),
        (np.array([1, 2]), None),
        (b"12", None),
        ([], None),
        ([["1"], ["2"]], None),
        ([b"1"], None),
        ({"value": 1}, None),
        (1 + 2j, None),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_odd_values(value, alternatives):
    assert gold_alternatives(value) == alternatives


def test_a_float_that_has_lost_digits_says_so():
    assert "2^53" in bad_gold_message(0, "answer", 2.0**60)
    # Within a tolerance they do not matter
    assert NumericClose(end_of_thinking=None)([""], [r"\boxed{6.02e23}"], answer=[6.02e23]) == [1.0]


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.decimals() | st.binary() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    )
)
def test_any_value_is_read_or_refused(value):
    alternatives = gold_alternatives(value)
    assert alternatives is None or (alternatives and all(text and isinstance(text, str) for text in alternatives))
    bad_gold_message(0, "answer", value)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1), min_size=1, max_size=3))
def test_lists_of_texts_come_back_as_they_were(items):
    """As `str` and `json.dumps` write them, read like each of their items."""
    each = [gold_alternatives(item, any_text=True) for item in items]
    expected = None if None in each else [text for of_item in each for text in of_item]
    # In text of no LaTeX a backslash before a letter is doubled, whether it is followed by more or not
    assert gold_alternatives(str(items), any_text=True) == expected
    assert gold_alternatives(json.dumps(items), any_text=True) == expected


def test_grading():
    gold_answers = [f"{SOLUTION}\n#### 1,072", "['12', '13']", "The answer is: 8", [f"{SOLUTION}\n#### 3"]]
    assert grade_answers(["1072", "13", "8", "3"], gold_answers) == [1.0] * 4
    assert grade_answers(["1073", "1213", "9", "4"], gold_answers) == [0.0] * 4
    with pytest.raises(ValueError, match="Row 1"):
        grade_answers(["1", "2"], ["1", SOLUTION])


def test_texts_are_answers_for_other_rewards():
    exact = ExactMatch(end_of_thinking=None)
    assert exact([""] * 2, [rf"\boxed{{{SOLUTION}}}", r"\boxed{7}"], answer=[SOLUTION, "#### 7"]) == [1.0, 1.0]
    choice = MultipleChoice(end_of_thinking=None)
    long = "(B) We do so, because " + "it is the best of all that can be done by anyone who is there in time"
    assert choice([""] * 2, [r"\boxed{B}"] * 2, answer=[long, "The answer is: B"]) == [1.0, 1.0]


# Where gold answers come from: training, evaluation and doctor alike


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_by_training(path: str, on_bad_gold: str = "raise", **settings) -> Dataset:
    data_args = DataArguments(path, instruction="", **settings)
    reward = MathReward(on_bad_gold=on_bad_gold)
    return to_prompts(data_args.sources[0].read(data_args), data_args, reward)


def test_training_and_evaluation_read_the_same(tmp_path):
    rows = [{"problem": "?", "answer": value} for value, _ in SHAPES]
    path = write(tmp_path / "good.jsonl", rows)
    assert read_by_training(path)["answer"] == load_problems(path).answers == [value for value, _ in SHAPES]
    for number, value in enumerate(NO_ANSWERS):
        path = write(
            tmp_path / f"bad{number}.jsonl", [{"problem": "?", "answer": "1"}, {"problem": "?", "answer": value}]
        )
        with pytest.raises(ValueError, match="Row 1.*`on_bad_gold`"):
            read_by_training(path)
        with pytest.raises(ValueError, match="Row 1.*`on_bad_gold`"):
            load_problems(path)
        with pytest.warns(UserWarning, match="1 of 2 rows"):
            assert len(read_by_training(path, "skip")) == 1
        assert load_problems(path, on_bad_gold="skip").answers == ["1"]
    # Rewards of one's own may want any text
    path = write(tmp_path / "text.jsonl", [{"problem": "?", "answer": SOLUTION}])
    assert load_problems(path, any_text=True).answers == [SOLUTION]


def test_an_integer_that_json_makes_a_float(tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_text('{"problem": "?", "answer": 123456789012345678901234567890}\n')
    for read in (read_by_training, load_problems):
        with pytest.raises(ValueError, match=r"2\^53.*string|too big"):  # older `datasets` do not read it at all
            read(str(path))


VERL = [
    {
        "prompt": [{"role": "user", "content": f"{n} + {n}?"}],
        "reward_model": {"style": "rule", "ground_truth": str(2 * n)},
    }
    for n in range(3)
]


@pytest.mark.parametrize("as_json", [False, True], ids=["struct", "json"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_nested_answers_of_verl(tmp_path, as_json, suffix):
    rows = [{**row, "reward_model": json.dumps(row["reward_model"])} for row in VERL] if as_json else VERL
    path = str(tmp_path / f"verl.{suffix}")
    {"jsonl": Dataset.to_json, "parquet": Dataset.to_parquet}[suffix](Dataset.from_list(rows), path)
    for named in ({}, {"answer_column": "reward_model.ground_truth"}):
        problems = load_problems(path, **named)
        assert problems.questions == ["0 + 0?", "1 + 1?", "2 + 2?"] and problems.answers == ["0", "2", "4"]
        trained = read_by_training(path, **named)
        assert list(trained["answer"]) == ["0", "2", "4"] and list(trained["prompt"]) == [
            row["prompt"] for row in VERL
        ]
    # Without a recipe: the columns as they are
    data = Dataset.from_list(rows)
    assert len(MathReward().check_dataset(data)) == 3
    completions = [r"\boxed{0}", r"\boxed{2}", r"\boxed{5}"]
    reward = MathReward(end_of_thinking=None)
    assert reward([""] * 3, completions, reward_model=list(data["reward_model"])) == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="[Rr]ow 0.*'reward_model.truth'.*None"):
        load_problems(path, answer_column="reward_model.truth")


@pytest.mark.parametrize("text", ["{", "[1]", "3", '{"a":' * 100_000, '{"ground_truth": null}'])
def test_nested_answers_that_are_not_there(text):
    with pytest.raises(ValueError, match="Row 0"):
        MathReward(end_of_thinking=None)([""], [r"\boxed{2}"], reward_model=[text])


@pytest.mark.parametrize("limit", ["0", "-1"])
def test_limits_of_nothing(tmp_path, capsys, limit):
    path = write(tmp_path / "mine.jsonl", [{"problem": "?", "answer": "1"}])
    assert cli.main(["eval", "nowhere", "--dataset", path, "--limit", limit]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "--limit" in printed


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("b.jsonl", "\n\n"), ("c.json", "[]"), ("d.csv", "problem,answer\n")]
)
def test_files_without_rows(tmp_path, capsys, name, content):
    (tmp_path / name).write_text(content)
    assert cli.main(["eval", "nowhere", "--dataset", str(tmp_path / name)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"trl-anytime: {tmp_path / name}")
    with pytest.raises(ValueError, match=name):
        read_by_training(str(tmp_path / name))


# Words that many rows share


def found(answers, reward=None) -> list[str]:
    return [
        finding.message
        for finding in text_gold_answers(reward or MathReward(), "data", Dataset.from_dict({"answer": answers}))
    ]


NUMBERS = [str(n) for n in range(90)]


@pytest.mark.parametrize("word", ["proof", "Proof.", r"\text{see solution}", "unknown", "no-answer", "DNE"])
def test_a_word_that_many_rows_share(word):
    (said,) = found([*NUMBERS, *[word] * 10])
    assert "10 of 100" in said
    (said,) = found([*NUMBERS[:10], *[word] * 90])
    assert "90 of 100" in said


def test_words_that_are_answers():
    assert found([*NUMBERS, "east", "west", "Evelyn"]) == []
    assert found([*NUMBERS, *["yes", "No"] * 10]) == []
    assert found([*NUMBERS, *["B", r"\text{(C)}"] * 10]) == []  # choices
    assert found([*NUMBERS, *["x"] * 10, *[r"\frac12"] * 10]) == []
    assert found(["red", "green", "blue"] * 20) == []  # labels, all of them
    assert found([[number, "proof"] for number in NUMBERS]) == []  # one of several
    assert found([*NUMBERS, *["proof"] * 10], ExactMatch()) == []
    assert found([str(n) for n in range(1000)] + ["Sunday"] * 5) == []  # half a per cent


def test_sentences_are_found():
    (said,) = found([*NUMBERS, "The sum of the first five primes is 28"])
    assert "1 of 91" in said
