r"""The answer of a summary, answers that are the same, and summaries that contradict themselves."""

import pytest

from trl_anytime.rewards.agreement import contradicts_itself, majority, read_answer, same_answer
from trl_anytime.rewards.verifier.extraction import all_boxed, last_boxed

BRIDGE = "\n\n**Final Answer**\n"


@pytest.mark.parametrize(
    ("summary", "clipped", "answer"),
    [
        (r"\boxed{3}", False, "3"),
        (r"It is \boxed{ 3 } or so", True, "3"),  # the box has come
        (r"\boxed{3} \boxed{4}", False, "4"),  # the last one is graded
        ("three \n", False, "three"),
        ("three, because", True, None),
        (r"\boxed{3", True, None),
        ("Wait.\n\nIt is \\boxed{3}", True, None),  # in another paragraph, which is not graded
        ("  ", False, None),
    ],
)
def test_answers_of_summaries(summary, clipped, answer):
    assert read_answer(summary, BRIDGE, clipped) == answer


def test_the_same_answers():
    assert same_answer("3", "3.0") and same_answer(r"\frac12", "0.5") and same_answer("1{,}000", "1000")
    assert not same_answer("3", "4") and not same_answer("b", "c")
    assert not same_answer("x+1", "1+x")  # needs a worker
    long = "1" * 201
    assert same_answer(long, long) and not same_answer(long, f"{long}.0")


def test_boxes_in_order():
    text = r"\boxed{1} and {\boxed{\frac{1}{2}}} and \boxed{a\boxed{b}}"
    assert all_boxed(text) == ["1", r"\frac{1}{2}", r"a\boxed{b}"]
    assert all_boxed(r"no box, \boxed{1") == all_boxed(r"\boxedx{1}") == all_boxed("{}}") == []
    for text in (r"\boxed{1}}", r"{\boxed{2}", r"\{\boxed{3}\}", r"\boxed{1}\boxed{4}"):
        assert all_boxed(text)[-1] == last_boxed(text)
    assert len(all_boxed(r"\boxed{" * 100_000 + "}" * 100_000)) == 1  # linear


def test_contradictions():
    assert contradicts_itself(r"\boxed{3}. Wait, \boxed{4}")
    assert contradicts_itself("\\boxed{3}\n\n\\boxed{4}\n\n\\boxed{3}")
    assert not contradicts_itself(r"\boxed{0.5}, that is \boxed{\frac12}") and not contradicts_itself(r"\boxed{3}")


@pytest.mark.parametrize(
    ("answers", "agreement", "answer"),
    [
        (["3"], 1.0, "3"),
        ([None], 0.1, None),
        (["3", "3.0", "4"], 0.67, "3"),  # 2 of 3, as a user rounds it
        (["3", "3.0", "4"], 0.7, None),
        (["4", "3", "3", None], 0.5, "3"),
        (["4", "3"], 0.5, "4"),
    ],
)
def test_majorities(answers, agreement, answer):
    assert majority(answers, agreement) == answer
