"""What stopping when it has settled would have saved and cost, replayed by hand on made-up samples."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest

from tests.support.anytime import make_anytime_config
from tests.support.tiny import make_tokenizer
from trl_anytime import Sampling
from trl_anytime.evaluation.evaluate import Evaluation
from trl_anytime.evaluation.problems import ProblemSet
from trl_anytime.evaluation.results import results_of, table
from trl_anytime.evaluation.settling import calibration, choose, settings_of, settling_table, unbeaten
from trl_anytime.reporting.settling_plot import plot_settling

BUDGETS = [10, 20, 30, 40]


def sample(question, answers, thinking_tokens, gold, finished=True, length=2):
    """A sample with one answer at each budget, each after a bridge of 3 tokens, or of 1 behind a finished trace."""
    cuts = []
    for budget, answer in zip(BUDGETS, answers, strict=False):
        ended = finished and thinking_tokens <= budget
        cuts.append(
            {
                "budgets": [budget] if len(cuts) + 1 < len(answers) else BUDGETS[len(cuts) :],
                "thinking_tokens": min(budget, thinking_tokens),
                "bridge_tokens": 1 if ended else 3,
                "answer_tokens": [length],
                "answers": [rf"\boxed{{{answer}}}"],
                "well_formed": [True],
                "clipped": [False],
                "no_box": [False],
                "escapes": [""],
                "rewards": [float(answer == gold)],
            }
        )
    about = {"dataset": "set", "question": question, "sample": 0, "thinking": "", "thinking_tokens": thinking_tokens}
    return {**about, "prompt_tokens": 1, "finished": finished, "seconds": 1.0, "cuts": cuts}


# Right from the second check on, all 40 tokens thought; wrong twice, then right; ended by itself after 15 tokens
RECORDS = [
    sample(0, ["1", "3", "3", "3"], 40, "3", finished=False),
    sample(1, ["2", "2", "4", "4"], 40, "4", finished=False),
    sample(2, ["5", "5"], 15, "5"),
]


def replayed(records, num_answers=1):
    return calibration(records, BUDGETS, {"set": ["set"]}, "answer", num_answers)


def test_the_replay_by_hand():
    """
    Without the rule 40 + 3 + 2, 40 + 3 + 2 and 15 + 1 + 2 tokens: 108 in all, and all is right.

    With two checks the first stops at 30 after three checks of 3 + 2 tokens: 45, right. The second stops at 20 after
    two: 30, wrong. The third has one check, at 10, and ends by itself: 18 + 5. In all 98.
    """
    found = replayed(RECORDS)
    assert found["most_lost"] == 0.005
    two, three = found["groups"]["set"]["points"]
    assert [(p["checks"], p["every"], p["agreement"]) for p in (two, three)] == [(2, 10, 1.0), (3, 10, 1.0)]
    assert two["tokens_saved"]["mean"] == pytest.approx(1 - 98 / 108)
    assert two["thinking_saved"] == pytest.approx(1 - (30 + 20 + 15) / 95)
    assert two["accuracy_lost"]["mean"] == pytest.approx(1 / 3) and two["settled"] == pytest.approx(2 / 3)
    # No three of the first three checks agree: the checks are paid for, and nothing is saved
    assert three["tokens_saved"]["mean"] == pytest.approx(1 - (108 + 3 * 5 + 3 * 5 + 5) / 108)
    assert (three["accuracy_lost"]["mean"], three["thinking_saved"], three["settled"]) == (0, 0, 0)
    assert two["accuracy_lost"]["low"] == 0 < two["accuracy_lost"]["high"] <= 1
    assert two["tokens_saved"]["low"] < two["tokens_saved"]["mean"] < two["tokens_saved"]["high"]
    assert found["groups"]["set"]["chosen"] is None  # the one loses too much, the other saves nothing


def test_answers_that_do_not_count():
    """One that is cut off before its box, and one that is ill-formed, agree with none."""
    for field, value, text in (("clipped", True, "3"), ("well_formed", False, r"\boxed{3}")):
        records = deepcopy(RECORDS)
        records[0]["cuts"][2] |= {field: [value], "answers": [text]}
        two, _ = replayed(records)["groups"]["set"]["points"]
        assert two["settled"] == pytest.approx(1 / 3)
    old = deepcopy(RECORDS)  # of a version that did not record what was cut off
    for place in (place for one in old for place in one["cuts"]):
        del place["clipped"]
    assert replayed(old) == replayed(RECORDS)


def test_several_answers_at_a_check():
    """Two of four agree at 10 tokens already, four of four at 30."""
    records = [deepcopy(RECORDS[0])]
    for place, answers in zip(records[0]["cuts"], ("3315", "3331", "3333", "3333"), strict=True):
        many = {"answers": [rf"\boxed{{{answer}}}" for answer in answers], "answer_tokens": [2] * 4}
        flags = {name: [place[name][0]] * 4 for name in ("well_formed", "clipped", "no_box", "escapes")}
        place |= many | flags | {"rewards": [float(answer == "3") for answer in answers]}
    points = replayed(records, 4)["groups"]["set"]["points"]
    found = {(p["checks"], p["agreement"]): p for p in points if p["every"] == 10}
    assert {(p["checks"], p["every"]) for p in points} - {(k, 10) for k in (1, 2, 3)} == {(1, 20), (1, 30)}
    assert found.keys() == {(k, share) for k in (1, 2, 3) for share in (1.0, 0.75, 0.5)}
    # One check of 4 · (3 + 2) tokens and 10 of thinking, in place of 45
    assert found[1, 0.5]["tokens_saved"]["mean"] == pytest.approx(1 - 30 / 45)
    assert found[1, 0.5]["accuracy_lost"]["mean"] == pytest.approx(0.5)
    assert found[1, 0.75]["accuracy_lost"]["mean"] == pytest.approx(0.25)
    assert found[1, 1.0]["accuracy_lost"]["mean"] == 0 and found[1, 1.0]["settled"] == 1
    assert found[2, 1.0]["settled"] == 0 and found[2, 0.75]["settled"] == 1


@pytest.mark.parametrize(
    ("budgets", "answers", "expected"),
    [
        ([10, 20, 30, 40], 1, [(1, 2, 1.0), (1, 3, 1.0)]),
        ([10, 20, 30, 40, 50], 1, [(1, 2, 1.0), (1, 3, 1.0), (1, 4, 1.0), (2, 2, 1.0)]),
        ([10, 20, 30, 50, 80], 1, [(1, 2, 1.0), (1, 3, 1.0), (1, 4, 1.0)]),
        ([10, 20], 1, []),
        ([10], 4, []),
        ([10, 20, 30], 2, [(1, 1, 1.0), (1, 2, 1.0), (1, 2, 0.5), (2, 1, 1.0)]),
        ([10, 20, 30], 3, [(1, 1, 1.0), (1, 2, 1.0), (1, 1, 0.5), (1, 2, 0.5), (2, 1, 1.0), (2, 1, 0.5)]),
    ],
)
def test_settings_that_can_be_told_apart(budgets, answers, expected):
    """Of two answers, a share of 0.75 asks for both. One that asks for a single answer needs two checks."""
    found = [(setting.stride, setting.checks, setting.agreement) for setting in settings_of(budgets, answers)]
    assert found == expected


def test_checks_at_every_second_budget():
    """At 20 and 40 of 50: both say 3, after 2 checks of 3 + 2 tokens, with 40 of 60 tokens thought."""
    budgets = [10, 20, 30, 40, 50]
    one = sample(0, ["1", "3", "4", "3"], 60, "3", finished=False)
    one["cuts"][3]["budgets"] = [40]
    one["cuts"].append({**deepcopy(one["cuts"][3]), "budgets": [50], "thinking_tokens": 50})
    points = calibration([one], budgets, {"set": ["set"]}, "answer", 1)["groups"]["set"]["points"]
    (wide,) = (p for p in points if p["every"] == 20)
    assert wide["settled"] == 1 and wide["tokens_saved"]["mean"] == pytest.approx(1 - 50 / 65)
    assert not any(p["settled"] for p in points if p["every"] == 10)


def point(saved, lost):
    return {"tokens_saved": {"mean": saved}, "accuracy_lost": {"mean": lost}}


def test_the_choice():
    points = [point(0.5, 0.01), point(0.3, 0.005), point(0.2, -0.01), point(0.1, 0.0), point(0.3, 0.005)]
    assert choose(points) == 1 and choose(points, 0.01) == 0 and choose(points[3:4]) == 0
    assert choose([point(-0.1, 0.0)]) is None and choose([]) is None
    assert unbeaten(points) == [0, 1, 2, 4]


def results(records, budgets=BUDGETS):
    config = replace(make_anytime_config(budgets=budgets), sampling=Sampling())
    problems = ProblemSet("set", ["0", "1", "2"], ["3", "4", "5"])
    return results_of(Evaluation(None, make_tokenizer(), config, [problems], "m").protocol, records)


def test_what_is_printed(tmp_path):
    steady = [RECORDS[0], sample(1, ["4", "4", "4", "4"], 40, "4", finished=False), RECORDS[2]]
    found = results(steady)
    assert found["settling"] == json.loads(json.dumps(calibration(steady, BUDGETS, {"set": ["set"]}, "answer", 1)))
    header, *rows, advice = settling_table(found).splitlines()
    assert header.split()[:3] == ["checks", "every", "agreement"] and rows[0].split()[:3] == ["*2", "10", "1"]
    assert "--stop-when settled --checks 2 --check-every 10" in advice and "0.5" in advice
    assert "--stop-when" not in settling_table(results(RECORDS))
    wrong = deepcopy(steady)
    for cut in (cut for record in wrong for cut in record["cuts"]):
        cut["rewards"] = [0.0] * len(cut["rewards"])
    assert settling_table(results(wrong)) == "" and "-0.0" not in table(results(wrong))
    plot_settling(found["settling"], tmp_path / "settling.png")
    assert (tmp_path / "settling.png").stat().st_size > 0
