"""Why answers score 0: counters for each budget and the alarms on made-up samples."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
from datasets import load_dataset

from tests.support.anytime import make_anytime_config
from tests.support.tiny import make_tokenizer
from trl_anytime import Sampling
from trl_anytime.evaluation.evaluate import Evaluation
from trl_anytime.evaluation.problems import ProblemSet
from trl_anytime.evaluation.results import results_of, save_answers, table
from trl_anytime.evaluation.zeros import alarms, answer_counts, explain_zeros


def cut(budgets, rewards, well_formed, clipped, no_box):
    return {
        "budgets": budgets,
        "thinking_tokens": budgets[0],
        "bridge_tokens": 1,
        "answer_tokens": [3] * len(rewards),
        "answers": ["3"] * len(rewards),
        "well_formed": well_formed,
        "clipped": clipped,
        "no_box": no_box,
        "escapes": [""] * len(rewards),
        "rewards": rewards,
    }


def record(*cuts, question=0, finished=True):
    about = {"dataset": "set", "question": question, "sample": 0, "thinking": "1 1", "thinking_tokens": 2}
    return {**about, "prompt_tokens": 1, "finished": finished, "seconds": 1.0, "cuts": list(cuts)}


# At 2 tokens: 1 of 4 answers is right, 1 ill-formed, 2 cut off, 1 without a box. At 8: all the same, shared with 4
RECORDS = [
    record(
        cut([2], [1.0, 0.0], [True, False], [False, True], [False, False]),
        cut([4, 8], [0.0, 0.0], [True, True], [True, True], [True, True]),
    ),
    record(
        cut([2], [0.0, 0.0], [True, True], [True, False], [True, False]),
        cut([4, 8], [1.0, 1.0], [True, True], [False, False], [False, False]),
        question=1,
    ),
]


def results(records, reward=None):
    config = replace(make_anytime_config(budgets=[2, 4, 8]), sampling=Sampling())
    problems = ProblemSet("set", ["0", "1"], ["3", "4"])
    evaluation = Evaluation(None, make_tokenizer(), config, [problems], "m", num_summaries=2, reward=reward)
    return results_of(evaluation.protocol, records)


def changed(**values):
    """All samples with other values: one for each summary of a cut, or one of the sample."""
    records = deepcopy(RECORDS)
    for one in records:
        for name, value in values.items():
            for place in one["cuts"] if name in one["cuts"][0] else []:
                place[name] = [value] * 2
            if name in one:
                one[name] = value
    return records


def test_counters_by_hand():
    at_2, at_4, at_8 = answer_counts(RECORDS, [2, 4, 8])
    escapes = {"forced": 0, "escaped": 0, "escape_ratio": None}  # the traces of 2 tokens have ended by themselves
    assert at_2 == {"budget": 2, "answers": 4, "zero": 3, "ill_formed": 1, "clipped": 2, "no_box": 1} | escapes
    assert at_4 == {"budget": 4, "answers": 4, "zero": 2, "ill_formed": 0, "clipped": 2, "no_box": 2} | escapes
    assert at_8 == at_4 | {"budget": 8}


def escaping(at_2, at_4, finished=False):
    """The samples with these signs of the four answers at 2 tokens, and at 4 and 8, behind forced cuts."""
    records = changed(finished=finished)
    for one, *kinds in zip(records, (at_2[:2], at_2[2:]), (at_4[:2], at_4[2:]), strict=True):
        for place, signs in zip(one["cuts"], kinds, strict=True):
            place["escapes"] = signs
    return records


def test_escapes_by_hand():
    records = escaping(["reopened", "", "", ""], ["", "", "unanswered", "contradicted"])
    counts = answer_counts(records, [2, 4, 8])
    assert [(c["forced"], c["escaped"], c["escape_ratio"]) for c in counts] == [(4, 1, 0.25), (4, 2, 0.5), (4, 2, 0.5)]
    # 5 of 12; at 8 the same answers as at 4
    assert results(records)["alarms"].keys() == {"answers resume the reasoning", "thinking is never finished"}
    few = escaping(["reopened", "", "", ""], ["", "", "unanswered", ""])  # 3 of 12 are a quarter
    assert "answers resume the reasoning" in results(few)["alarms"]
    fewer = escaping(["reopened", "reopened", "", ""], [""] * 4)
    assert "answers resume the reasoning" not in results(fewer)["alarms"]
    # The second trace of 2 tokens ended by itself: its answers are not escapes, whatever they say
    records[1]["finished"] = True
    (at_2, at_4, _) = answer_counts(records, [2, 4, 8])
    assert (at_2["forced"], at_2["escaped"], at_4["forced"], at_4["escaped"]) == (2, 1, 2, 0)
    (line,) = (line for line in explain_zeros(results(few)) if "resume" in line)
    assert "3 of 12" in line and "--truncation-bridge" in line


def test_the_table_has_the_counters_and_the_number_of_problems():
    header, at_2, *_ = table(results(RECORDS)).splitlines()
    assert "set (n=2)" in header
    names = ["answers", "score", "0", "ill-formed", "cut", "off", "no", "box", "forced", "escaped"]
    assert header.split()[-10:] == names
    assert at_2.split()[-7:] == ["4", "3", "1", "2", "1", "0", "0"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, []),
        ({"well_formed": False, "rewards": 0.0}, ["nothing is well-formed"]),
        ({"rewards": 0.0}, ["no reward at any budget"]),
        ({"finished": False}, ["thinking is never finished"]),
        ({"finished": False, "rewards": 0.0}, ["no reward at any budget", "thinking is never finished"]),
    ],
)
def test_alarms(values, expected):
    found = results(changed(**values))
    assert list(found["alarms"]) == expected and all(sets == ["set"] for sets in found["alarms"].values())
    assert alarms(found) == found["alarms"]
    assert [line.split(". ")[0] for line in explain_zeros(found)] == [f"set: {name}" for name in expected]


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"well_formed": False}, "samples.parquet"),
        ({"no_box": True}, "--instruction"),
        ({"no_box": False, "clipped": True}, "--max-summary-length"),
        ({"no_box": False, "clipped": False}, "--reward"),
    ],
)
def test_what_to_look_at_when_all_is_zero(values, advice):
    (line,) = explain_zeros(results(changed(rewards=0.0, **values)))
    assert advice in line
    reasons = ("samples.parquet", "--instruction", "--max-summary-length", "--reward")
    assert [name in line for name in reasons].count(True) == 1


def test_rewards_that_look_for_no_box_and_old_samples():
    def own(**kwargs): ...

    escapes = ("forced", "escaped", "escape_ratio")
    cases = (
        (("no_box",), own, "`own`", ()),
        (("clipped", "no_box", "escapes"), None, "older", escapes),
        (("escapes",), None, "older", escapes),
    )
    for left_out, reward, named, unknown in cases:
        records = deepcopy(RECORDS)
        for place in (place for one in records for place in one["cuts"]):
            for name in left_out:
                del place[name]
        found = results(records, reward)
        counts = found["curves"]["set"]["answers"][0]
        known = [name for name in left_out if name != "escapes"]
        ratio = () if unknown else ("escape_ratio",)  # without forced cuts there is none
        assert [name for name, count in counts.items() if count is None] == [*known, *unknown, *ratio]
        (line,) = explain_zeros(found)
        assert named in line
        header = table(found).splitlines()[0]
        assert ("no box" in header) == ("no_box" not in left_out) and ("escaped" in header) == (not unknown)


def test_answers_by_hand(tmp_path):
    problems = ProblemSet("set", ["0", "1"], ["3", ["4", "5"]])
    save_answers(RECORDS, [problems], tmp_path / "answers.parquet")
    rows = load_dataset("parquet", data_files=str(tmp_path / "answers.parquet"), split="train")
    keys = list(zip(rows["question"], rows["budget"], rows["summary"], strict=True))
    assert keys == [(question, budget, k) for question in (0, 1) for budget in (2, 4, 8) for k in (0, 1)]
    assert rows[0]["reward"] == 1.0 and rows[1]["well_formed"] is False and rows[1]["clipped"] is True
    assert json.loads(rows[6]["gold"]) == ["4", "5"] and rows[6]["problem"] == "1"
    assert set(rows["finished"]) == {True}  # a trace of 2 tokens, within every budget
    assert set(rows["escape"]) == {""}
    assert rows["no_box"][:6] == [False, False, True, True, True, True]
