"""Areas, the Anytime Index and the gap to a frontier, on curves that a reader can integrate."""

import json

import numpy as np
import pytest

from trl_anytime.evaluation.areas import anytime_index, area_weights
from trl_anytime.evaluation.frontier import Frontier, load_frontiers
from trl_anytime.evaluation.statistics import ResampledCurve
from trl_anytime.outside.validation import Unfit

BUDGETS = [2, 4, 8]


def test_the_weights_of_the_trapezoid_rule():
    # Half of 2, half of 2 and 4, half of 4, of 6 tokens
    assert area_weights(BUDGETS) == pytest.approx([1 / 6, 3 / 6, 2 / 6])
    # From 3 to 8: trapezoids of 1 and 4 tokens, and the value at 3 is the mean of those at 2 and 4
    assert area_weights(BUDGETS, 3, 8) == pytest.approx([0.5 * 0.1, 0.5 + 0.5 * 0.1, 0.4])
    assert area_weights(BUDGETS, 3, 3) == pytest.approx([0.5, 0.5, 0])
    assert area_weights([7]) == pytest.approx([1])
    # A straight line's mean is its value in the middle, however budgets lie
    budgets = [1, 2, 3, 50, 100]
    assert area_weights(budgets, 2, 80) @ np.array(budgets) == pytest.approx(41)


def test_the_anytime_index_by_hand():
    # Best so far 0.2, 0.4, 0.4: (0.2 · 1 + 0.4 · 3 + 0.4 · 2) / 6 = 2.2 / 6, of the best 0.4
    assert anytime_index(np.array([0.2, 0.4, 0.3]), BUDGETS) == pytest.approx(2.2 / 6 / 0.4)
    curves = np.array([[0.5, 0.5, 0.5], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -0.5, -0.2]])
    # The second rises over the last 4 of 6 tokens. Without a positive accuracy there is no index
    assert anytime_index(curves, BUDGETS) == pytest.approx([1, 2 / 6, np.nan, np.nan], nan_ok=True)
    assert np.isnan(anytime_index(np.array([1.0]), [4]))


def test_intervals_of_areas_and_indices():
    # Half of 400 questions are right from the first budget on, half from the last. The first half alone varies the
    # area: by half of 1.96 · sqrt(0.25 / 400) = 0.049, times the weight of what both do not share, 1 - 2/6
    values = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]] * 200)
    curve = ResampledCurve.of([values])
    area = curve.weighted(area_weights(BUDGETS))
    assert area.mean == pytest.approx(0.5 + 0.5 * 2 / 6)
    assert (area.low, area.high) == pytest.approx((area.mean - 0.0327, area.mean + 0.0327), abs=0.004)
    index = curve.statistic(lambda curves: anytime_index(curves, BUDGETS))
    assert (index.mean, index.low, index.high) == pytest.approx((area.mean, area.low, area.high))  # its best is 1
    assert ResampledCurve.of([0 * values]).statistic(lambda curves: anytime_index(curves, BUDGETS)) is None
    # Wilson's interval where nothing varies: z² / (n + z²) = 3.8415 / 403.8415
    none = ResampledCurve.of([0 * values]).weighted(area_weights(BUDGETS))
    assert (none.low, none.high) == (0, pytest.approx(0.00951, abs=1e-5))


def test_the_interval_of_an_index_leaves_out_samples_without_one():
    # 1 of 3 questions is right: (2/3)³ of the bootstrap samples have none. All others have the same index
    curve = ResampledCurve.of([np.array([[0.0, 0.0, 1.0], [0.0] * 3, [0.0] * 3])])
    index = curve.statistic(lambda curves: anytime_index(curves, BUDGETS))
    assert (index.mean, index.low, index.high) == pytest.approx((2 / 6, 2 / 6, 2 / 6))


# Frontiers


def test_a_gap_by_hand():
    # Over 2 to 8 the frontier is 0.4, 0.6, 0.7: (0.5 · 2 + 0.65 · 4) / 6 = 0.6
    frontier = Frontier([0, 4, 16], [0.2, 0.6, 0.9])
    gap = frontier.gap(BUDGETS, ResampledCurve.of([np.full((5, 3), 0.5)]))
    assert (gap["from"], gap["to"]) == (2, 8)
    assert gap["mean"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})
    assert gap["area"] == pytest.approx({"mean": 0.6, "low": 0.6, "high": 0.6})
    # A curve above it, and the range that both have
    gap = Frontier([4, 6], [0.25, 0.25]).gap(BUDGETS, ResampledCurve.of([np.full((5, 3), 0.5)]))
    assert (gap["from"], gap["to"], gap["mean"]["mean"]) == (4, 6, pytest.approx(-0.25))


def test_the_interval_of_a_gap_is_that_of_the_curve_upside_down():
    curve = ResampledCurve.of([np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]] * 200)])
    area, gap = curve.weighted(area_weights(BUDGETS)), Frontier([2, 8], [1, 1]).gap(BUDGETS, curve)["mean"]
    assert gap == pytest.approx({"mean": 1 - area.mean, "low": 1 - area.high, "high": 1 - area.low})


def test_files_of_frontiers(tmp_path):
    points = [{"budget": 8, "accuracy": 0.5}, {"budget": 2, "accuracy": 0.25}]
    (tmp_path / "f.json").write_text(json.dumps(points))
    (tmp_path / "f.csv").write_text("accuracy, budget\n0.5,8\n\n0.25 , 2\n")
    for name in ("f.json", "f.csv"):
        found = load_frontiers(tmp_path / name, ["a"], BUDGETS)
        assert found == {"a": Frontier([2, 8], [0.25, 0.5])}
    (tmp_path / "two.csv").write_text("dataset,budget,accuracy\na,2,0.1\na,8,0.2\naverage,1,0\naverage,9,1\n")
    found = load_frontiers(tmp_path / "two.csv", ["a", "b", "average"], BUDGETS)
    assert found == {"a": Frontier([2, 8], [0.1, 0.2]), "average": Frontier([1, 9], [0.0, 1.0])}


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("f.csv", "", "`budget`"),
        ("f.csv", "2,0.5\n8,0.6\n", "'2,0.5'"),
        ("f.csv", "budget,accuracy\n", "0 rows"),
        ("f.csv", "budget,accuracy,colour\n2,0.5,red\n", "colour"),
        ("f.csv", "budget,accuracy,accuracy\n2,0.5,0.5\n", "accuracy,accuracy"),
        ("f.csv", "budget,accuracy\n2,0.5\n8,53.1\n", r"`row 2.accuracy`.*53\.1.*100"),
        ("f.csv", "budget,accuracy\n2,nan\n", "`row 1.accuracy`"),
        ("f.csv", "budget,accuracy\n2,\n", "`row 1.accuracy`"),
        ("f.csv", "budget,accuracy\n2.5,0.5\n", "`row 1.budget`.*'2.5'"),
        ("f.csv", "budget,accuracy\n-2,0.5\n", "`row 1.budget`"),
        ("f.csv", "budget,accuracy\n2\n", "`row 1`"),
        ("f.csv", "budget,accuracy\n2,0.5\n2,0.6\n8,0.7\n", "two accuracies at budget 2"),
        ("f.csv", "budget,accuracy\n16,0.5\n32,0.6\n", "16 to 32.*2 to 8"),
        ("f.csv", "budget,accuracy\n8,0.5\n32,0.6\n", "8 to 32.*2 to 8"),
        ("f.csv", "budget,accuracy,dataset\n2,0.5,b\n8,0.6,b\n", "`dataset`.*'b'"),
        ("f.json", "{}", "a list"),
        ("f.json", "[]", "a list"),
        ("f.json", '[{"budget": 2}]', r"`\[0\].accuracy`"),
        ("f.json", '[{"budget": 2, "accuracy": 99}]', r"`\[0\].accuracy`.*100"),
        ("f.json", '[{"budget": 2, "accuracy": true}]', r"`\[0\].accuracy`"),
        ("f.json", '[{"budget": "2", "accuracy": 0.5}]', r"`\[0\].budget`"),
        ("f.json", '[{"budget": 2, "accuracy": 0.5, "dataset": 3}]', r"`\[0\].dataset`"),
        ("f.json", "[", "JSON"),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    with pytest.raises(Unfit, match=f"(?s){name}.*{named}") as raised:
        load_frontiers(tmp_path / name, ["a"], BUDGETS)
    assert len(str(raised.value).splitlines()) == 1


def test_a_frontier_says_which_of_several_curves_it_is_for(tmp_path):
    (tmp_path / "f.csv").write_text("budget,accuracy\n2,0.5\n8,0.6\n")
    with pytest.raises(Unfit, match=r"f\.csv.*`dataset`.*a, b, average"):
        load_frontiers(tmp_path / "f.csv", ["a", "b", "average"], BUDGETS)
    with pytest.raises(Unfit, match=r"missing\.csv"):
        load_frontiers(tmp_path / "missing.csv", ["a"], BUDGETS)
