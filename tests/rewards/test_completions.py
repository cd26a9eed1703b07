"""From a completion to a reward: extraction, formats, counters, gold columns, data sets."""

import dataclasses
import pickle
import warnings

import pytest
from datasets import Dataset, IterableDataset, load_dataset

from tests.support import DATA
from trl_anytime.rewards import ExactMatch, FormatReward, MathReward, MultipleChoice, NumericClose
from trl_anytime.rewards.verifier.extraction import after_thinking, answer_paragraph, completion_text, last_boxed

BRIDGE = "\n\n**Final Answer**\n"
COUNTERS = {
    "graded",
    "timeouts",
    "dead_workers",
    "ungraded",
    "no_box",
    "too_long",
    "bad_format",
    "skipped_gold_answers",
}
EVERY_CLASS = [MathReward, ExactMatch, MultipleChoice, NumericClose, FormatReward]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{2}", "2"),
        (r"so \boxed {2}.", "2"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{2} and \boxed{3", None),  # the last one counts, and is cut off
        (r"\boxed{2} and \boxed{3} and \boxed", None),
        (r"\boxed{1} \boxed{\frac{2}{3}", None),
        (r"\boxed{ \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{\begin{pmatrix}1\\{2}\end{pmatrix}}", r"\begin{pmatrix}1\\{2}\end{pmatrix}"),
        (r"{ \boxed{2} ", "2"),
        (r"} \boxed{2}}", "2"),
        (r"\boxed{\boxed{2}}", "2"),
        (r"\boxed{}", ""),
        (r"\boxed{2", None),
        (r"\boxed{{2}", None),
        (r"\boxed2", None),
        (r"boxed{2}", None),
        ("", None),
        ("2", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("summary", "paragraph"),
    [
        (r"\boxed{2}", "**Final Answer**\n\\boxed{2}"),
        ("so\n\\boxed{2}", "**Final Answer**\nso\n\\boxed{2}"),
        ("so\n\n\\boxed{2}", "**Final Answer**\nso"),  # the box is in another paragraph
        ("1\n \t\n2", "**Final Answer**\n1"),
        ("1\n\n**Final Answer**\n2", "**Final Answer**\n1"),  # the first one
        ("\n\n**Final Answer**\n2", "**Final Answer**"),
    ],
)
def test_answer_paragraph(summary, paragraph):
    assert answer_paragraph(summary, BRIDGE).strip() == paragraph


def test_answer_paragraph_of_other_bridges():
    assert last_boxed(answer_paragraph("42}. Done.", "\n\nThe answer is \\boxed{")) == "42"
    assert answer_paragraph("first\n\nsecond", "\n\n") == "first"  # a bridge without text: the first paragraph
    assert answer_paragraph("", "\n\n") == ""


def test_after_thinking():
    assert after_thinking("a</think>b", "</think>") == "b"
    assert after_thinking("ab", "</think>") is None
    assert after_thinking("a</think>b</think>c", "</think>") is None
    assert after_thinking("ab", None) == "ab"


def test_completion_text():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([{"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"}]) == "b"
    assert completion_text([{"content": [{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]}]) == "ab"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""


def counted(reward, completions, **columns):
    metrics = {}
    rewards = reward(
        prompts=[""] * len(completions), completions=completions, log_metric=metrics.__setitem__, **columns
    )
    name = type(reward).__name__
    assert all(isinstance(value, float) for value in metrics.values())
    return rewards, {key.removeprefix(f"rewards/{name}/"): value for key, value in metrics.items()}


def test_summaries_of_the_anytime_trainer():
    completions = [
        r"\boxed{2}",
        "so\n\n\\boxed{2}",
        r"\boxed{3}",
        r"\boxed{2}",
        r"\boxed{ }",
        "\\boxed{2",
        r"\boxed{\sqrt4}",
    ]
    well_formed = [True, True, True, False, True, True, True]
    rewards, counts = counted(MathReward(), completions, well_formed=well_formed, answer=["2"] * 7)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    # The second has its box behind a blank line, the fifth an empty one, the sixth an unfinished one.
    assert counts == {**dict.fromkeys(COUNTERS, 0), "graded": 3, "no_box": 3, "bad_format": 1}


def test_another_answer_bridge():
    reward = dataclasses.replace(MathReward(), answer_bridge="\n\nAnswer: \\boxed{")
    assert reward([""] * 2, ["2}", "3}"], well_formed=[True] * 2, answer=["2"] * 2) == [1.0, 0.0]


def test_whole_completions_of_a_plain_trainer():
    completions = [
        r"\boxed{3}</think>\boxed{2}",
        r"\boxed{2}",
        r"</think>\boxed{2}</think>",
        r"\boxed{2}</think>",
        "x</think>a\n\nb \\boxed{2}",
    ]
    rewards, counts = counted(MathReward(), completions, answer=[2.0] * 5)
    assert rewards == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert counts == {**dict.fromkeys(COUNTERS, 0), "graded": 2, "no_box": 1, "bad_format": 2}


def test_conversations_and_models_without_thinking():
    completions = [[{"role": "assistant", "content": text}] for text in (r"\boxed{2}", r"\boxed{3}")]
    reward = MathReward(end_of_thinking=None)
    extra = {"completion_ids": [[1], [2]], "trainer_state": None, "log_extra": print, "difficulty": [1, 2]}
    assert reward(prompts=[""] * 2, completions=completions, answer=["2"] * 2, **extra) == [1.0, 0.0]


def test_gold_columns():
    reward = MathReward(end_of_thinking=None)
    boxed = [r"\boxed{2}"]
    assert reward([""], boxed, answer=["2"], solution=["3"]) == [1.0]  # the first column there counts
    assert reward([""], boxed, solution=[r"Because $1+1=\boxed{2}$."]) == [1.0]
    assert MathReward(end_of_thinking=None, answer_columns=("gold",))([""], boxed, gold=[2]) == [1.0]
    with pytest.raises(ValueError, match=r"\['answer', 'solution', 'reward_model.ground_truth'\].*\['label'\]"):
        reward([""], boxed, label=["2"])


def test_every_key_on_every_call():
    rewards, counts = counted(MathReward(), [], answer=[])
    assert rewards == []
    assert counts == dict.fromkeys(COUNTERS, 0)


def test_an_answer_that_is_too_long():
    rewards, counts = counted(MathReward(end_of_thinking=None), [r"\boxed{" + "1" * 3000 + "}"], answer=["2"])
    assert rewards == [0.0]
    assert counts["too_long"] == 1 and counts["graded"] == 0


@pytest.mark.parametrize("value", [None, "", float("nan"), []])
def test_bad_gold_answers_at_call_time(value):
    completions = [r"\boxed{2}"] * 3
    with pytest.raises(ValueError, match="Row 1: column 'answer' holds .*`on_bad_gold`"):
        MathReward(end_of_thinking=None)([""] * 3, completions, answer=["2", value, "3"])
    reward = MathReward(end_of_thinking=None, on_bad_gold="skip")
    rewards, counts = counted(reward, completions, answer=["2", value, "3"])
    assert rewards == [1.0, None, 0.0]
    assert counts["skipped_gold_answers"] == 1 and counts["graded"] == 2


def test_check_dataset():
    good = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["2", r"\frac12"]})
    assert MathReward().check_dataset(good) is good
    assert MathReward().check_dataset(Dataset.from_dict({"solution": [1, 2]})).num_rows == 2
    assert MathReward().check_dataset(Dataset.from_dict({"answer": [["1", "2"], ["3"]]})).num_rows == 2
    bad = Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["2", None, ""]})
    with pytest.raises(ValueError, match="Row 1: column 'answer' holds None"):
        MathReward().check_dataset(bad)
    with pytest.warns(UserWarning, match="Left out 2 of 3 rows"):
        kept = MathReward(on_bad_gold="skip").check_dataset(bad)
    assert kept["prompt"] == ["a"]
    with pytest.raises(ValueError, match=r"none of the columns"):
        MathReward().check_dataset(Dataset.from_dict({"prompt": ["a"]}))
    with pytest.raises(ValueError, match="Row 1: column 'answer' holds nan"):
        MathReward().check_dataset(Dataset.from_dict({"answer": [1.0, float("nan")]}))


def test_an_iterable_dataset_is_checked_when_graded():
    dataset = IterableDataset.from_generator(lambda: iter([{"answer": None}]))
    assert MathReward().check_dataset(dataset) is dataset


def test_a_data_set_from_a_file(tmp_path):
    """24 problems with an answer, and one without."""
    path = DATA / "problems.jsonl"
    dataset = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="Row 24: column 'answer' holds None"):
        MathReward().check_dataset(dataset)
    with pytest.warns(UserWarning, match="1 of 25"):
        kept = MathReward(on_bad_gold="skip").check_dataset(dataset)
    assert len(kept) == 24
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MathReward().check_dataset(kept) is kept


@pytest.mark.parametrize("reward_class", EVERY_CLASS)
def test_rewards_are_plain_settings(reward_class):
    reward = reward_class(answer_bridge="\n\nA:\n", end_of_thinking=None)
    reward([""], [r"\boxed{2}"], answer=["2"] if reward_class is not MultipleChoice else ["B"])
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert hash(reward) == hash(dataclasses.replace(reward))
    assert getattr(reward, "__name__", type(reward).__name__) == reward_class.__name__  # as TRL names its metrics
    with pytest.raises(dataclasses.FrozenInstanceError):
        reward.answer_bridge = ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_bad_gold": "ignore"}, "`on_bad_gold`.*'raise'.*'skip'.*'ignore'"),
        ({"answer_columns": "answer"}, "`answer_columns`.*'answer'"),
        ({"workers": 0}, "`workers`.*1.*0"),
        ({"cpu_limit": 0.0}, "`cpu_limit`.*0.0"),
        ({"batch_limit": -1.0}, "`batch_limit`.*-1.0"),
        ({"max_answer_length": 0}, "`max_answer_length`.*0"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        MathReward(**settings)


def test_exact_match():
    answers = [r"\boxed{Paris}", r"\boxed{ Paris\n}".replace("\\n", "\n"), r"\boxed{paris}", "Paris", r"\boxed{2.0}"]
    gold_answers = ["Paris", "Paris", "Paris", "Paris", 2]
    assert ExactMatch(end_of_thinking=None)([""] * 5, answers, answer=gold_answers) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert ExactMatch(end_of_thinking=None, ignore_case=True)([""] * 5, answers, answer=gold_answers)[2] == 1.0
    assert ExactMatch()([""], [r"\boxed{b}"], well_formed=[True], answer=[["a", "b"]]) == [1.0]


@pytest.mark.parametrize("gold", ["B", "(B)", "b", r"\text{(B)}", 1, ["A", "B"], "B."])
def test_multiple_choice(gold):
    right = [
        "B",
        "(B)",
        "b",
        r"\text{B}",
        r"\textbf{(B)}",
        "B.",
        "B)",
        "(B) 42",
        r"\text{(B) } 42",
        "B. the cat",
        " B ",
    ]
    wrong = ["C", "(C)", "", "42", "BC", "B or C", "(B)(C)", "(B) or (C)", "Because", "(C) B", "K"]
    completions = [rf"\boxed{{{answer}}}" for answer in right + wrong]
    rewards = MultipleChoice(end_of_thinking=None)(
        [""] * len(completions), completions, answer=[gold] * len(completions)
    )
    assert dict(zip(right + wrong, rewards, strict=True)) == {**dict.fromkeys(right, 1.0), **dict.fromkeys(wrong, 0.0)}


@pytest.mark.parametrize("gold", ["Z", 26, -1, True, "42", 1.5, None])
def test_what_is_no_choice(gold):
    with pytest.raises(ValueError, match="Row 0"):
        MultipleChoice(end_of_thinking=None)([""], [r"\boxed{B}"], answer=[gold])


def test_numeric_close():
    reward = NumericClose(end_of_thinking=None, relative_tolerance=0.01)
    answers = [
        "100",
        "101",
        "101.1",
        "99",
        r"\frac{201}{2}",
        "1.005e2",
        "x = 100",
        r"100\text{ cm}",
        "ten",
        r"-100",
        "(100,1)",
    ]
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    expected = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert reward([""] * 11, completions, answer=[100] * 11) == expected
    near_zero = NumericClose(end_of_thinking=None, absolute_tolerance=0.5)
    assert near_zero([""] * 2, [r"\boxed{0.5}", r"\boxed{0.51}"], answer=[0.0] * 2) == [1.0, 0.0]
    with pytest.raises(ValueError, match="Row 0"):
        reward([""], [r"\boxed{2}"], answer=["about two"])
    with pytest.raises(ValueError, match="relative_tolerance"):
        NumericClose(relative_tolerance=float("nan"))


def test_format_reward():
    summaries = [r"\boxed{3}", r"\boxed{}", "3", r"\boxed{3}"]
    assert FormatReward()([""] * 4, summaries, well_formed=[True, True, True, False]) == [1.0, 0.0, 0.0, 0.0]
    whole = [r"a</think>\boxed{3}", r"\boxed{3}", r"</think></think>\boxed{3}"]
    assert FormatReward()([""] * 3, whole) == [1.0, 0.0, 0.0]
    assert FormatReward(end_of_thinking=None)([""], [r"\boxed{3}"]) == [1.0]
