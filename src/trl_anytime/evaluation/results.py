"""From samples to curves: the results of an evaluation, their files, their table, and their comparison."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..inference.anytime_config import BUDGETS
from ..outside.display import for_terminal
from ..outside.tables import aligned
from ..outside.validation import (
    MEBIBYTE,
    Unfit,
    fields,
    free_form,
    integer,
    list_of,
    mapping_of,
    number,
    read_json,
    string,
)
from .areas import anytime_index, area_weights
from .frontier import FRONTIER, Frontier
from .journal import REWARD, mean_rewards, question_means
from .problems import ProblemSet
from .protocol import NOT_COMPARED, Protocol, differences
from .settling import calibration
from .stability import RIGHT_AT, first_stable, flips, right_in_sample, stability, stays_right
from .statistics import Estimate, ResampledCurve, compare
from .zeros import COUNTERS, alarms, answer_counts

AVERAGE = "average"  # over several data sets, each with the same weight
_RESULTS_FORMAT = 1
_MOST_SETS = 64  # the picture has a panel for each
_MOST_BYTES_OF_RESULTS = 256 * MEBIBYTE

_ESTIMATE = fields(mean=REWARD, low=REWARD, high=REWARD)
_RESULTS = fields(
    {"frontier": mapping_of(FRONTIER, most=_MOST_SETS + 1), "right_at": number(-1e30, 1e30)},
    protocol=fields(
        model=string(10_000),
        budgets=BUDGETS,
        problems=mapping_of(list_of(free_form, least=2, most=2), least=1, most=_MOST_SETS),
    ),
    curves=mapping_of(fields(accuracy=list_of(_ESTIMATE), anytime_average=_ESTIMATE), least=1, most=_MOST_SETS + 1),
    questions=mapping_of(list_of(list_of(REWARD), least=1), least=1, most=_MOST_SETS),
)
# Counters of a reward with gold answers. They count answers that score 0 because of a limit, or because it failed.
LIMITS = ("timeouts", "dead_workers", "too_long", "scorer_errors", "bad_scores", "unsafe_answers")


def accuracies(records: list[dict[str, Any]], budgets: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the mean reward of each question at each budget, shape (Q, M), by data set."""
    return question_means(records, lambda record: mean_rewards(record, budgets))


def curve_names(sets: Iterable[str]) -> list[str]:
    """Return the names of an evaluation's curves: those of its data sets, and the average of several."""
    names = list(sets)
    return [*names, AVERAGE] if len(names) > 1 else names


def results_of(
    protocol: Protocol,
    records: list[dict[str, Any]],
    right_at: float = RIGHT_AT,
    frontiers: Mapping[str, Frontier] | None = None,
) -> dict[str, Any]:
    """
    Return the results of an evaluation, for a file.

    Args:
        protocol ([`Protocol`]):
            Protocol of the evaluation.
        records (`list[dict]`):
            All samples.
        right_at (`float`, *optional*, defaults to `0.5`):
            Least mean reward of a question that is right.
        frontiers (`Mapping[str, Frontier]`, *optional*):
            Frontiers by the name of the curve.
    """
    frontiers = {} if frontiers is None else frontiers
    expected = sum(count for _, count in protocol.problems.values()) * protocol.num_samples
    assert len(records) == expected, f"{len(records)} of {expected} samples"
    budgets = protocol.config.budgets
    by_set = accuracies(records, budgets)
    results: dict[str, Any] = {"format": _RESULTS_FORMAT, "protocol": protocol.as_dict(), "curves": {}}
    groups = {name: list(protocol.problems) if name == AVERAGE else [name] for name in curve_names(protocol.problems)}
    for group, names in groups.items():
        sets = [by_set[name] for name in names]
        curve = ResampledCurve.of(sets)
        index = curve.statistic(lambda curves: anytime_index(curves, budgets))
        group_records = [record for record in records if record["dataset"] in names]
        lengths = [record["thinking_tokens"] for record in group_records]
        results["curves"][group] = {
            "accuracy": [asdict(estimate) for estimate in curve.at_budgets()],
            "anytime_average": asdict(curve.average()),
            "area": asdict(curve.weighted(area_weights(budgets))),
            "anytime_index": None if index is None else asdict(index),
            **({"gap": frontiers[group].gap(budgets, curve)} if group in frontiers else {}),
            "stability": stability(sets, budgets, right_at),
            "thinking": {
                "mean_tokens": float(np.mean(lengths)),
                "finished": float(np.mean([record["finished"] for record in group_records])),
                "mean_tokens_at": [float(np.minimum(lengths, budget).mean()) for budget in budgets],
            },
            "well_formed": float(
                np.mean(
                    [formed for record in group_records for cut in record["cuts"] for formed in cut["well_formed"]]
                )
            ),
            "answers": answer_counts(group_records, budgets),
        }
    results["alarms"] = alarms(results)
    bridge = protocol.config.markers.answer_bridge
    results["settling"] = calibration(records, budgets, groups, bridge, protocol.num_summaries)
    results["questions"] = {name: values.tolist() for name, values in by_set.items()}
    right = {name: values >= right_at for name, values in by_set.items()}
    results["right_at"] = right_at
    results["first_stable_budget"] = {name: first_stable(right_QM, budgets) for name, right_QM in right.items()}
    results["flips"] = {name: flips(right_QM).tolist() for name, right_QM in right.items()}
    if frontiers:
        results["frontier"] = {name: frontier.points for name, frontier in frontiers.items()}
    results["cost"] = _cost(records)
    limited: Counter[str] = Counter()
    for record in records:
        limited.update(record.get("limited", {}))
    answers = sum(len(cut["answers"]) for record in records for cut in record["cuts"])
    results["limited"] = {"answers": answers, **{name: limited[name] for name in LIMITS}}
    return results


def limited_answers(results: dict[str, Any]) -> str:
    """Say how many answers count as wrong because of a limit or failure of the reward, or return `""`."""
    counts = {name: results["limited"][name] for name in LIMITS if results["limited"].get(name)}
    answers = results["limited"]["answers"]
    if not counts:
        return ""
    message = ", ".join(f"{count} {name}" for name, count in counts.items())
    share = sum(counts.values()) / answers
    return f"{share:.2%} of {answers} answers count as wrong, because of a limit or failure of the reward: {message}."


def _cost(records: list[dict[str, Any]]) -> dict[str, float]:
    """Count the computed tokens, and those that an evaluation at the last budget alone would compute."""
    thinking = sum(record["thinking_tokens"] for record in records)
    prompts = sum(record["prompt_tokens"] for record in records)

    def after(cut: dict[str, Any]) -> int:
        return cut["bridge_tokens"] + sum(cut["answer_tokens"])

    answers = sum(after(cut) for record in records for cut in record["cuts"])
    last_answers = sum(after(record["cuts"][-1]) for record in records)
    return {
        "thinking_tokens": thinking,
        "answer_tokens": answers,
        "tokens": prompts + thinking + answers,
        "tokens_at_last_budget_alone": prompts + thinking + last_answers,
        "seconds": sum(record["seconds"] for record in records),
    }


def comparison(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """
    Compare results with those of a baseline, question by question.

    Returns:
        `dict`: by data set, the differences at each budget and of the anytime average.

    Raises:
        `ValueError`: If the two come from different protocols.
    """
    found = differences(ours["protocol"], theirs["protocol"], NOT_COMPARED)
    if found:
        raise ValueError(f"The baseline has another protocol: {'; '.join(found)}. Use the same settings.")
    compared = {}
    for group in ours["curves"]:
        names = list(ours["protocol"]["problems"]) if group == AVERAGE else [group]
        mine, other = ([np.array(results["questions"][name]) for name in names] for results in (ours, theirs))
        curve, average = compare(mine, other)
        compared[group] = {"accuracy": [asdict(c) for c in curve], "anytime_average": asdict(average)}
    return {"model": theirs["protocol"]["model"], "curves": compared}


def load_results(path: Path) -> dict[str, Any]:
    """
    Load results from a file.

    Raises:
        `ValueError`: If this version cannot read them. The message names the file and the field.
    """
    try:
        results = read_json(path, fields(format=integer(1)), _MOST_BYTES_OF_RESULTS)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}. Give a results.json of `trl-anytime eval`.") from None
    if results["format"] != _RESULTS_FORMAT:
        raise Unfit(
            f"{path} has format {results['format']}, but this version reads {_RESULTS_FORMAT}. Repeat the evaluation."
        )
    try:
        _RESULTS(results, "")
        free_form(results["protocol"], "protocol")
        _check_shapes(results)
    except Unfit as error:
        raise Unfit(f"{path} is not a result file of `trl-anytime eval`: {error}") from error
    return results


def _check_shapes(results: dict[str, Any]) -> None:
    """Refuse results without one number for each question and budget."""
    protocol, num_budgets = results["protocol"], len(results["protocol"]["budgets"])
    if results["questions"].keys() != protocol["problems"].keys():
        raise Unfit("`questions` and `protocol.problems` must have the same data sets.")
    for name, values in results["questions"].items():
        if len(values) != protocol["problems"][name][1] or any(len(row) != num_budgets for row in values):
            raise Unfit(f"`questions.{name}` must have a number for each question and budget.")
    for name, curve in results["curves"].items():
        if len(curve["accuracy"]) != num_budgets:
            raise Unfit(f"`curves.{name}.accuracy` must have an estimate for each budget.")


def save_samples(
    records: list[dict[str, Any]], problem_sets: Sequence[ProblemSet], path: Path, right_at: float = RIGHT_AT
) -> None:
    """Write all samples to a Parquet file, one row each."""
    from datasets import Dataset, Value

    problems = _problem_of(problem_sets)
    rows = [
        {
            **problems(record),
            **{name: record[name] for name in ("thinking", "thinking_tokens", "finished")},
            "first_stable_budget": first_stable(right, budgets)[0],
            "flips": int(flips(right)[0]),
            "cuts": record["cuts"],
        }
        for record in records
        for budgets in [_budgets_of(record)]
        for right in [right_in_sample(record, budgets, right_at)]
    ]
    dataset = Dataset.from_list(rows)
    # Where no sample stays right, the column would have no type
    dataset.cast_column("first_stable_budget", Value("int64")).to_parquet(str(path))


def _budgets_of(record: dict[str, Any]) -> list[int]:
    return sorted(budget for cut in record["cuts"] for budget in cut["budgets"])


def save_answers(
    records: list[dict[str, Any]], problem_sets: Sequence[ProblemSet], path: Path, right_at: float = RIGHT_AT
) -> None:
    """Write all answers to a Parquet file, a row for each sample, budget and summary."""
    from datasets import Dataset, Features, Value

    problems = _problem_of(problem_sets)
    rows = [
        {
            **problems(record),
            "budget": budget,
            "summary": k,
            "thinking_tokens": cut["thinking_tokens"],
            "finished": record["finished"] and record["thinking_tokens"] <= budget,
            "answer": cut["answers"][k],
            "answer_tokens": cut["answer_tokens"][k],
            "well_formed": cut["well_formed"][k],
            **{name: cut[name][k] if name in cut else None for name in ("clipped", "no_box")},
            "escape": cut["escapes"][k] if "escapes" in cut else None,
            "reward": cut["rewards"][k],
            "stays_right": stable[budget],
        }
        for record in records
        for stable in [_stable_at(record, right_at)]
        for cut in record["cuts"]
        for budget in cut["budgets"]
        for k in range(len(cut["answers"]))
    ]
    # Given, because a column of nothing but null has no type of its own
    types = {name: type(value).__name__ for name, value in rows[0].items()}
    types |= {"clipped": "bool", "no_box": "bool", "escape": "str", "reward": "float", "stays_right": "bool"}
    names = {"str": "string", "int": "int64", "bool": "bool", "float": "float64"}
    features = Features({name: Value(names[kind]) for name, kind in types.items()})
    Dataset.from_list(rows, features).to_parquet(str(path))


def _stable_at(record: dict[str, Any], right_at: float) -> dict[int, bool]:
    """Return for each budget whether a sample is right there and at all larger ones."""
    budgets = _budgets_of(record)
    stable = stays_right(right_in_sample(record, budgets, right_at))[0]
    return dict(zip(budgets, stable.tolist(), strict=True))


def _problem_of(problem_sets: Sequence[ProblemSet]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function that gives the columns about a record's problem."""
    sets = {problems.name: problems for problems in problem_sets}

    def columns(record: dict[str, Any]) -> dict[str, Any]:
        problems, question = sets[record["dataset"]], record["question"]
        return {
            **{name: record[name] for name in ("dataset", "question", "sample")},
            "problem": problems.questions[question],
            "gold": json.dumps(problems.answers[question], ensure_ascii=False, default=str),
        }

    return columns


def _flipped(stability: dict[str, Any]) -> str:
    """Say how many questions are right and later wrong, and what this costs at the last budget."""
    return f"{stability['flipped']} questions, {-100 * stability['at'][-1]['lost']:z.1f}"


def table(results: dict[str, Any]) -> str:
    """
    Return the curves as text.

    Rows are budgets and columns are data sets. Cells are in percent, with the ends of the confidence interval.
    """
    curves = results["curves"]
    budgets = results["protocol"]["budgets"]

    def cell(value: dict[str, float]) -> str:
        return Estimate(**value).in_percent(width=5)

    samples = results["protocol"]["num_samples"]

    def header(name: str) -> str:
        if name == AVERAGE:
            return AVERAGE
        count = results["protocol"]["problems"][name][1]
        return f"{for_terminal(name, one_line=True)} (n={count}{f'×{samples}' if samples > 1 else ''})"

    counts = list(curves.values())[-1]["answers"]  # of all data sets
    counters = {name: title for name, title in COUNTERS.items() if counts[0][name] is not None}
    rows = [["budget", *map(header, curves), *counters.values()]]
    rows += [
        [
            str(budget),
            *(cell(c["accuracy"][j]) for c in curves.values()),
            *(str(counts[j][name]) for name in counters),
        ]
        for j, budget in enumerate(budgets)
    ]
    rows.append(["anytime", *(cell(c["anytime_average"]) for c in curves.values())])
    if len(budgets) > 1:
        rows.append(["area", *(cell(c["area"]) for c in curves.values())])
        rows.append(["index", *(cell(c["anytime_index"]) if c["anytime_index"] else "–" for c in curves.values())])
    if "frontier" in results:
        rows.append(["gap", *(cell(c["gap"]["mean"]) if "gap" in c else "–" for c in curves.values())])
    rows.append(["stable", *(f"{c['stability']['right_at_last']} questions" for c in curves.values())])
    rows.append(["flipped", *(_flipped(c["stability"]) for c in curves.values())])
    rows.append(["thinking", *(f"{c['thinking']['mean_tokens']:.0f} tokens" for c in curves.values())])
    rows.append(["finished", *(f"{100 * c['thinking']['finished']:.1f} %" for c in curves.values())])
    if "baseline" in results:
        rows.append([for_terminal(f"anytime, minus {results['baseline']['model']}", one_line=True)])
        rows.append(
            [
                "",
                *(
                    f"{cell(c['anytime_average']['difference'])} p={c['anytime_average']['p_value']:.3g}"
                    for c in results["baseline"]["curves"].values()
                ),
            ]
        )
    return aligned(rows, left=())
