"""Which questions stay right, on rewards that a reader can count."""

import numpy as np
import pytest

from trl_anytime.evaluation.stability import first_stable, flips, lost, right_in_sample, stability, stays_right

BUDGETS = [2, 4, 8, 16]
# From 4 on; right, wrong, and right again at the last; right only at the first; never
VALUES = np.array([[0, 1, 1, 1], [1, 0, 0, 1], [0.5, 0, 0, 0], [0, 0, 0.4, 0]])


def test_the_first_budget_from_which_a_question_stays_right():
    right = VALUES >= 0.5
    assert first_stable(right, BUDGETS) == [4, 16, None, None]
    assert stays_right(right).sum(axis=0).tolist() == [0, 1, 1, 2]
    assert flips(right).tolist() == [0, 1, 1, 0]
    # A lower threshold: the last question is right at 8, too, and then wrong
    assert first_stable(VALUES >= 0.4, BUDGETS) == [4, 16, None, None]
    assert flips(VALUES >= 0.4).tolist() == [0, 1, 1, 1]


def test_the_accuracy_that_is_lost():
    # At 4 the second question has lost 1 and the third 0.5, of 4 questions. At 16 the third and 0.4 of the last
    assert lost(VALUES) == pytest.approx([0, 1.5 / 4, 1.5 / 4, 0.9 / 4])


def test_what_is_counted():
    found = stability([VALUES], BUDGETS)
    assert {name: found[name] for name in ("questions", "never_right", "right_at_last", "flipped", "flips")} == {
        "questions": 4,
        "never_right": 1,
        "right_at_last": 2,
        "flipped": 2,
        "flips": 2,
    }
    at = {name: [row[name] for row in found["at"]] for name in found["at"][0]}
    assert at["budget"] == BUDGETS
    assert (at["right"], at["stable"], at["fallen"]) == ([2, 1, 1, 2], [0, 1, 1, 2], [0, 2, 2, 1])
    assert at["lost"] == pytest.approx(lost(VALUES))


def test_counts_are_sums_over_sets_and_accuracies_means():
    found = stability([VALUES, np.ones((1, 4))], BUDGETS)
    assert (found["questions"], found["right_at_last"], found["at"][0]["right"]) == (5, 3, 3)
    assert [row["lost"] for row in found["at"]] == pytest.approx(lost(VALUES) / 2)


def test_a_sample_with_several_summaries():
    # The mean of 1 and 0 is right at 0.5. Budgets that share a cut share its rewards
    record = {"cuts": [{"budgets": [2], "rewards": [1.0, 0.0]}, {"budgets": [4, 8], "rewards": [0.0, 0.0]}]}
    assert right_in_sample(record, [2, 4, 8]).tolist() == [[True, False, False]]
    assert right_in_sample(record, [2, 4, 8], 0.6).tolist() == [[False, False, False]]
    assert right_in_sample(record, [2, 4, 8], 0.0).tolist() == [[True, True, True]]
