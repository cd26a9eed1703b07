"""
The tables and figures of docs/results_tables.md, from the results of the studies in `configs/`:

    python -m studies.learning.analysis studies/learning/results docs/results_tables.md

Each table replaces what stands between `<!-- table: NAME -->` and `<!-- end -->` in the page; the figures go to
`images/` beside it. The words around the tables, and the numbers of docs/results.md, are the author's, who has to read
them again.

Anytime accuracy is the mean over the grid of evaluation budgets. Intervals are 95 %, by Student's t over seeds.
Differences are paired by seed: the same warm start, problems and held-out problems; one whose interval leaves out 0 is
what a paired t-test at 5 % would call one.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]
Cell = tuple[str, str]  # task, family

# The paper's, and the one that trains its thinking alike but not its summaries
MAIN_ARMS = ("grpo", "ar_base", "ar_linear", "ar_uniform", "uniform_final")
NAMES = {
    "grpo": "GRPO",
    "ar_base": "AR-base",
    "ar_linear": "AR-linear",
    "ar_uniform": "AR-uniform",
    "grpo_linear": "GRPO+linear",
    "grpo_decouple": "GRPO+decouple",
    "grpo_vr": "GRPO+vr",
    "elastic": "Elastic Reasoning",
    "uniform_v1": "AR-uniform, V1",
    "uniform_v2": "AR-uniform, V2",
    "uniform_none": "AR-uniform, no baseline",
    "uniform_adaptive": "AR-uniform, adaptive",
    "uniform_decay_0.2": "AR-uniform, λ = 0.2",
    "uniform_decay_1": "AR-uniform, λ = 1",
    "uniform_2_budgets": "AR-uniform, 2 budgets",
    "uniform_8_budgets": "AR-uniform, 8 budgets",
    "uniform_final": "AR-uniform, summaries as GRPO's",
    "uniform_final_adaptive": "AR-uniform, summaries as GRPO's, adaptive",
    "uniform_final_8_budgets": "AR-uniform, summaries as GRPO's, 8 budgets",
    "pairs_v2": "AR-uniform, G = 2, V2",
    "pairs_brpo": "AR-uniform, G = 2, V",
    "pairs_adaptive": "AR-uniform, G = 2, adaptive",
    "pairs_final_v2": "AR-uniform, summaries as GRPO's, G = 2, V2",
    "pairs_final_brpo": "AR-uniform, summaries as GRPO's, G = 2, V",
    "pairs_final_adaptive": "AR-uniform, summaries as GRPO's, G = 2, adaptive",
    "grpo_twice": "GRPO, twice the full budget",
    "grpo_decayed": "GRPO, rate to zero",
    "grpo_decayed_110": "GRPO, rate to zero, 110 updates",
    "ar_uniform_decayed": "AR-uniform, rate to zero",
    "uniform_final_decayed": "AR-uniform, summaries as GRPO's, rate to zero",
}
# Of the studies `objective` and `variants`, in the order of their tables
VARIANT_NAMES = {
    "objective": "weight P/A",
    "weight_0.25": "weight 0.25",
    "objective_2_summaries": "weight P/A, A = 2",
    "objective_1_summary": "weight P/A, A = 1",
    "objective_adaptive": "weight P/A, adaptive",
    "likelihood": "likelihood",
    "likelihood_14_budgets": "likelihood, 14 budgets",
    "log_likelihood": "log-likelihood",
    "mean_log_likelihood": "log-likelihood per token",
    "pairs_objective": "weight P/A, G = 2, V",
    "pairs_objective_adaptive": "weight P/A, G = 2, adaptive",
}
# What those with groups of eight are compared with, and those with groups of two
COMPARED = ("grpo", "ar_uniform", "uniform_final")
COMPARED_PAIRS = {
    "pairs_objective": ("grpo", "pairs_brpo"),
    "pairs_objective_adaptive": ("grpo", "pairs_brpo"),
}
# The studies whose runs begin at the same warm starts, so that they can be paired
FROM_THE_SAME = {"main": ("tuning", "main", "objective"), "variants": ("variants", "noise")}
# What an arm is compared with, beside GRPO
REFERENCES = {name: "ar_uniform" for name in NAMES if name.startswith("uniform_")} | {
    "uniform_final_adaptive": "uniform_final",
    "uniform_final_8_budgets": "uniform_final",
    "pairs_brpo": "pairs_v2",
    "pairs_adaptive": "pairs_brpo",
    "pairs_final_brpo": "pairs_final_v2",
    "pairs_final_adaptive": "pairs_final_brpo",
    "ar_uniform_decayed": "grpo_decayed",
    "uniform_final_decayed": "grpo_decayed",
}
BASELINES = {
    "v1": "V1",
    "v2": "V2",
    "brpo": "V",
    "v2_others": "V2, own left out",
    "brpo_others": "V, own left out",
    "adaptive": "adaptive",
}
# Those of which the goals were set, and those that were found on the way
GOAL_ARMS = ("ar_linear", "ar_uniform", "uniform_final", "pairs_final_adaptive")
MEASURED = ("", "grpo", "ar_uniform")  # whose checkpoints; the first is the warm start's
_COLORS = dict(zip(MAIN_ARMS, ("tab:red", "tab:green", "tab:orange", "tab:blue", "tab:purple"), strict=True))
# Quantile 0.975 of Student's t by degrees of freedom
_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Results:
    """
    The records of studies that have the same warm starts, by what they are about.

    Args:
        folder (`Path`):
            Where the results of the studies lie, named after them. Those that are not there have no records.
        studies (`Sequence[str]`, defaults to those of `main`'s warm starts):
            Their names.

    Attributes:
        runs (`dict`): by cell, arm and seed.
        tuning (`list`): runs of the tuning study.
        measures (`dict`): main study, by cell and arm (`""` for the warm start), one for each seed.
        noise (`dict`): measurements of the study `noise`, by cell.
        warm_starts (`dict`): by cell and seed.

    Raises:
        `ValueError`: If two studies disagree about a warm start, or have a run of the same name.
    """

    def __init__(self, folder: Path, studies: Sequence[str] = FROM_THE_SAME["main"]):
        self.warm_starts: dict[tuple[Cell, int], Record] = {}
        self.tuning: list[Record] = []
        self.runs: dict[Cell, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
        self.measures: dict[Cell, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        self.noise: dict[Cell, list[Record]] = defaultdict(list)
        for study in studies:
            path = folder / f"{study}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                record = json.loads(line)
                job = record["job"]
                cell = job["task"], job["family"]
                if job["kind"] == "warm_start":
                    known = self.warm_starts.setdefault((cell, job["seed"]), record)
                    if known["accuracy"] != record["accuracy"]:  # then nothing is paired
                        raise ValueError(
                            f"{path}: the warm start {job['seed']} of {cell} is not that of other studies."
                        )
                elif study == "noise":
                    self.noise[cell].append(record)
                elif job["kind"] == "measure":
                    self.measures[cell][job["arm"]].append(record)
                elif study == "tuning":
                    self.tuning.append(record)
                elif job["seed"] in self.runs[cell][job["arm"]]:
                    raise ValueError(f"{path}: another study has seed {job['seed']} of {job['arm']} on {cell}, too.")
                else:
                    self.runs[cell][job["arm"]][job["seed"]] = record

    def progress(self, record: Record) -> dict[str, np.ndarray]:
        """The evaluations of a run from its warm start on: `update`, `tokens`, `seconds` (CPU), `accuracy`, …"""
        job = record["job"]
        before = self.warm_starts[(job["task"], job["family"]), job["warm_start_seed"]]
        points = [{"update": 0, "tokens": 0, "cpu_seconds": 0.0, **before}, *record["evaluations"]]
        return {
            "update": np.array([point["update"] for point in points]),
            "tokens": np.array([point["tokens"] for point in points]),
            "seconds": np.array([point["cpu_seconds"] for point in points]),
            "accuracy": np.array([point["accuracy"] for point in points]),
            "anytime": np.array([np.mean(point["accuracy"]) for point in points]),
            "thinking_length": np.array([point["thinking_length"] for point in points]),
        }

    def at(self, record: Record, axis: str, value: float) -> np.ndarray:
        """Accuracy by budget when `axis` (`update`, `tokens`, `seconds`) reaches `value`, linear in between."""
        progress = self.progress(record)
        return np.array([np.interp(value, progress[axis], column) for column in progress["accuracy"].T])

    def updates(self, cell: Cell) -> int:
        """Updates at which the arms of a cell are compared: those of the arm that has the fewest."""
        return min(num_updates(record) for runs in self.runs[cell].values() for record in runs.values())


def num_updates(record: Record) -> int:
    """Return how long a run was: up to its last evaluation."""
    return record["evaluations"][-1]["update"]


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval; NaN for fewer than three values, whose spread is unknown."""
    values = np.asarray(values, dtype=float)
    if len(values) < 3:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(_T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values)))


def text(values: Sequence[float] | np.ndarray, signed: bool = False) -> str:
    """`0.812 ± 0.031`, without an interval for fewer than three; bold where that of a difference leaves out 0."""
    mean, half = interval(values)
    number = f"{mean:+.3f}" if signed else f"{mean:.3f}"
    if np.isnan(half):
        return number
    return f"**{number}** ± {half:.3f}" if signed and abs(mean) > half else f"{number} ± {half:.3f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# Tables


def curves_table(results: Results, cell: Cell) -> str:
    """Accuracy by budget, before and after, at equal updates."""
    runs, n = results.runs[cell], results.updates(cell)
    first = next(iter(runs["grpo"].values()))
    warm = [record for (of_cell, _), record in results.warm_starts.items() if of_cell == cell]
    rows = [["before", str(len(warm)), *(text(column) for column in np.array([r["accuracy"] for r in warm]).T)]]
    for arm in MAIN_ARMS:
        if runs[arm]:
            after = np.array([results.at(record, "update", n) for record in runs[arm].values()])
            rows.append([NAMES[arm], str(len(after)), *(text(c) for c in after.T), text(after.mean(axis=1))])
    rows[0].append(text([np.mean(r["accuracy"]) for r in warm]))
    return markdown(["", "n", *map(str, grid(results, first)), "mean"], rows)


def grid(results: Results, record: Record) -> list[int]:
    """The evaluation budgets: eighths of the full one."""
    return [record["budgets"][-1] * eighths // 8 for eighths in (1, 2, 3, 4, 6, 8)]


def differences(
    results: Results, cell: Cell, arm: str, axis: str, against: str = "grpo", after: int | None = None
) -> np.ndarray:
    """
    Accuracy of `arm` minus that of `against`, shape (seeds, budgets): `arm` after so many updates (by default those
    that all arms have), `against` when it has used as many updates, tokens or seconds.
    """
    runs, n, out = results.runs[cell], after or results.updates(cell), []
    for seed in sorted(set(runs[arm]) & set(runs[against])):
        progress = results.progress(runs[arm][seed])
        spent = float(np.interp(n, progress["update"], progress[axis]))
        out.append(results.at(runs[arm][seed], "update", n) - results.at(runs[against][seed], axis, spent))
    return np.array(out)


def differences_table(results: Results, cell: Cell) -> str:
    """Each arm minus GRPO at every budget, at equal updates (early and at the end), tokens and CPU seconds."""
    first = next(iter(results.runs[cell]["grpo"].values()))
    n, rows = results.updates(cell), []
    for arm in MAIN_ARMS[1:]:
        for axis, after, name in (
            ("update", n // 3, f"updates: {n // 3}"),
            ("update", n, f"updates: {n}"),
            ("tokens", n, "tokens"),
            ("seconds", n, "CPU seconds"),
        ):
            delta = differences(results, cell, arm, axis, after=after)
            if len(delta):
                columns = [text(column, signed=True) for column in delta.T]
                rows.append([NAMES[arm], name, str(len(delta)), *columns, text(delta.mean(axis=1), signed=True)])
    return markdown(["minus GRPO", "at equal", "n", *map(str, grid(results, first)), "mean"], rows)


def reach(progress: dict[str, np.ndarray], target: float, axis: str) -> float:
    """Where on `axis` the anytime accuracy first reaches `target`, linear between evaluations; infinity if never."""
    anytime, x = progress["anytime"], progress[axis]
    for i, value in enumerate(anytime):
        if value >= target:
            if i == 0:
                return 0.0
            return float(x[i - 1] + (x[i] - x[i - 1]) * (target - anytime[i - 1]) / (value - anytime[i - 1]))
    return float("inf")


def reach_table(results: Results, cell: Cell) -> str:
    """What each arm needs to reach the anytime accuracy that GRPO has in the end."""
    runs, rows = results.runs[cell], []
    n = results.updates(cell)
    for arm in MAIN_ARMS[1:]:
        for target_update in (n, max(num_updates(record) for record in runs["grpo"].values())):
            seeds = sorted(set(runs[arm]) & set(runs["grpo"]))
            parts: dict[str, list[float]] = defaultdict(list)
            for seed in seeds:
                grpo, own = results.progress(runs["grpo"][seed]), results.progress(runs[arm][seed])
                target = float(np.interp(target_update, grpo["update"], grpo["anytime"]))
                for axis in ("update", "tokens", "seconds"):
                    of_grpo = float(np.interp(target_update, grpo["update"], grpo[axis]))
                    parts[axis].append(reach(own, target, axis) / of_grpo)
            if seeds:
                cells = [f"{np.median(parts[axis]):.2f}" for axis in ("update", "tokens", "seconds")]
                reached = sum(np.isfinite(parts["update"]))
                rows.append([NAMES[arm], str(target_update), f"{reached} of {len(seeds)}", *cells])
    head = [
        "",
        "GRPO after updates",
        "seeds that reach it",
        "share of GRPO's updates",
        "of its tokens",
        "of its CPU seconds",
    ]
    return markdown(head, rows)


def arms_table(results: Results, cell: Cell) -> str:
    """All arms at the end of their runs, GRPO after as many updates as the others."""
    runs, n, rows = results.runs[cell], results.updates(cell), []
    for arm in NAMES:
        if not runs[arm]:
            continue
        end = n if arm == "grpo" else num_updates(next(iter(runs[arm].values())))
        after = np.array([results.at(record, "update", end) for record in runs[arm].values()])
        last = [results.progress(record) for record in runs[arm].values()]
        length = [np.interp(end, p["update"], p["thinking_length"]) for p in last]
        seconds = [np.interp(end, p["update"], p["seconds"]) for p in last]
        against = []
        for reference in ("grpo", REFERENCES.get(arm)):
            delta = differences(results, cell, arm, "update", reference, end) if reference else []
            name = NAMES[reference] if reference else ""
            against.append(
                f"{text(delta.mean(axis=1), signed=True)} ({name})" if len(delta) and arm != reference else ""
            )
        rows.append(
            [
                NAMES[arm],
                str(len(after)),
                text(after.mean(axis=1)),
                text(after[:, 1]),
                text(after[:, -1]),
                f"{np.mean(length):.1f}",
                f"{np.mean(seconds):.0f}",
                against[0].removesuffix(" (GRPO)"),
                against[1],
            ]
        )
    head = ["", "n", "anytime", "second-smallest budget", "full budget", "thinking length", "CPU seconds"]
    return markdown([*head, "anytime minus GRPO", "minus its reference"], rows)


def variants_table(results: Results, cell: Cell) -> str:
    """
    Arms of `objective` or `variants` beside those of COMPARED: accuracy and cost, and differences paired by seed.

    Each has the differences of anytime accuracy from those arms after as many updates, and from GRPO after as much CPU
    time. Those with groups of two are compared with AR-uniform with groups of two.
    """
    n, rows = results.updates(cell), []
    for arm in _variants(results, cell):
        runs = results.runs[cell][arm]
        after = np.array([results.at(record, "update", n) for record in runs.values()])
        last = [record["evaluations"][-1] for record in runs.values()]
        seconds, tokens = ([point[axis] / point["update"] for point in last] for axis in ("cpu_seconds", "tokens"))
        minus = [
            differences(results, cell, arm, "update", reference) for reference in COMPARED_PAIRS.get(arm, COMPARED)
        ]
        minus.insert(1, differences(results, cell, arm, "seconds"))
        cells = [text(delta.mean(axis=1), signed=True) if delta.any() else "" for delta in minus]
        rows.append(
            [
                _name(arm),
                str(len(runs)),
                text(after.mean(axis=1)),
                text(after[:, 1]),
                text(after[:, -1]),
                f"{np.mean(seconds):.2f}",
                f"{np.mean(tokens):.0f}",
                *cells,
                *[""] * (4 - len(cells)),
            ]
        )
    head = ["", "n", "anytime", "second-smallest budget", "full budget", "CPU seconds per update", "tokens per update"]
    return markdown([*head, "minus GRPO", "at equal time", "minus AR-uniform", "minus one summary trained"], rows)


def variants_curves_table(results: Results, cell: Cell) -> str:
    """Accuracy by budget of the same arms, at equal updates, and below each its differences from two of COMPARED."""
    first = next(iter(results.runs[cell]["grpo"].values()))
    n, rows = results.updates(cell), []
    for arm in _variants(results, cell):
        after = np.array([results.at(record, "update", n) for record in results.runs[cell][arm].values()])
        rows.append([_name(arm), "", str(len(after)), *(text(column) for column in after.T)])
        for reference in (COMPARED_PAIRS.get(arm, COMPARED)[:2]) if arm in VARIANT_NAMES else ():
            delta = differences(results, cell, arm, "update", reference)
            if len(delta):
                columns = [text(column, signed=True) for column in delta.T]
                rows.append([_name(arm), _name(reference), str(len(delta)), *columns])
    return markdown(["", "minus", "n", *map(str, grid(results, first))], rows)


def _variants(results: Results, cell: Cell) -> list[str]:
    """The arms of a table that have runs: what is compared with first."""
    return [arm for arm in (*COMPARED, "pairs_brpo", *VARIANT_NAMES) if results.runs[cell][arm]]


def _name(arm: str) -> str:
    return VARIANT_NAMES.get(arm) or NAMES[arm]


def pooled_table(all_results: Sequence[Results], cell: Cell) -> str:
    """The differences by budget of the arms that several sets of warm starts have, over all of these."""
    rows = []
    grpo = next(iter(all_results[0].runs[cell]["grpo"].values()))
    for arm in VARIANT_NAMES:
        for reference in COMPARED:
            deltas = [differences(results, cell, arm, "update", reference) for results in all_results]
            if all(len(delta) for delta in deltas):
                delta = np.concatenate(deltas)
                columns = [text(column, signed=True) for column in (delta.mean(axis=1), *delta.T)]
                rows.append([_name(arm), _name(reference), str(len(delta)), *columns])
    return markdown(["", "minus", "n", "anytime", *map(str, grid(all_results[0], grpo))], rows)


def noise_table(results: Results) -> str:
    """Noise of the gradient with sampled summaries and with rewards by likelihood: median, smallest and largest."""
    columns = {
        "none": "no baseline",
        "v2_others": BASELINES["v2_others"],
        "brpo_others": BASELINES["brpo_others"],
        "adaptive": BASELINES["adaptive"],
        "answers": "answers",
        "all": "all",
    }
    rows = []
    for cell, records in results.noise.items():
        for of_setting in zip(*(record["likelihood"]["uniform"] for record in records), strict=True):
            first, cells = of_setting[0], []
            for name in columns:
                known = [row["noise"][name] for row in of_setting if row["noise"][name] is not None]
                span = f" ({min(known):.2f}–{max(known):.2f})" if len(known) > 1 else ""
                cells.append(f"{np.median(known):.2f}{span}" if known else "")
            tokens = np.mean([row["tokens"] for row in of_setting])
            reward = {"sampled": "4 summaries", "likelihood": "likelihood"}[first["reward"]]
            rows.append(
                ["/".join(cell), reward, str(first["num_budgets"]), str(len(records)), f"{tokens:.0f}", *cells]
            )
    return markdown(["", "reward", "budgets", "n", "packed tokens", *columns.values()], rows)


def decayed_table(results: Results, cell: Cell) -> str:
    """Arms whose learning rate goes down to zero, against GRPO's after as many updates and after as much time."""
    first = next(iter(results.runs[cell]["grpo"].values()))
    rows = []
    for arm in ("ar_uniform_decayed", "uniform_final_decayed"):
        for reference, equal in (("grpo_decayed", "updates"), ("grpo_decayed_110", "CPU seconds, about")):
            runs, others = results.runs[cell][arm], results.runs[cell][reference]
            seeds = sorted(set(runs) & set(others))
            if seeds:
                delta = np.array([_last(runs[seed]) - _last(others[seed]) for seed in seeds])
                columns = [text(column, signed=True) for column in delta.T]
                mean = text(delta.mean(axis=1), signed=True)
                rows.append([NAMES[arm], NAMES[reference], equal, str(len(seeds)), *columns, mean])
    return markdown(["", "minus", "at equal", "n", *map(str, grid(results, first)), "mean"], rows)


def _last(record: Record) -> np.ndarray:
    return np.array(record["evaluations"][-1]["accuracy"])


def tuning_table(results: Results) -> str:
    """Learning rates: anytime accuracy up to the updates that all arms have, and over all of their own."""
    n = min((num_updates(record) for record in results.tuning), default=0)
    rows = []
    for record in sorted(results.tuning, key=lambda r: (r["job"]["task"], r["job"]["arm"], r["job"]["learning_rate"])):
        job, progress = record["job"], results.progress(record)
        early = progress["anytime"][(progress["update"] > 0) & (progress["update"] <= n)]
        last = f"{progress['anytime'][-1]:.3f} ({progress['update'][-1]})"
        rate = f"{job['learning_rate']:g}"
        cells = [f"{early.mean():.3f}", f"{early[-1]:.3f}", last, f"{progress['anytime'][1:].mean():.3f}"]
        rows.append([f"{job['task']}/{job['family']}", NAMES[job["arm"]], rate, *cells])
    means = f"mean up to update {n}", f"at update {n}", "at the end (update)", "mean of all"
    return markdown(["", "", "learning rate", *means], rows)


def _settings(records: list[Record], num_budgets: int, group_size: int, prior: str) -> list[Record]:
    wanted = {"num_budgets": num_budgets, "group_size": group_size, "prior": prior}
    return [v for r in records for v in r["variance"] if wanted.items() <= v.items()]


def _segments(variances: list[Record], statistic: str, name: str) -> list[str]:
    """Mean over the measurements, by segment; empty where undefined."""
    values = np.array([v[statistic][name] for v in variances], dtype=float)
    return [f"{np.nanmean(column):.2f}" if np.isfinite(column).any() else "" for column in values.T]


def variance_table(
    results: Results,
    cell: Cell,
    num_budgets: int = 4,
    group_size: int = 8,
    priors: Sequence[str] = ("uniform", "linear", "base"),
) -> str:
    """Var[R - V] / Var[R] by segment, and weighted by tokens."""
    rows = []
    for arm in MEASURED:
        records = results.measures[cell][arm]
        for prior in priors:
            variances = _settings(records, num_budgets, group_size, prior)
            for name, title in BASELINES.items():
                if variances:
                    weighted = [v["token_weighted"][name] for v in variances]
                    segments = _segments(variances, "variance_ratio", name)
                    checkpoint = NAMES.get(arm, "warm start")
                    each = " ".join("–" if value is None else f"{value:.2f}" for value in weighted)
                    rows.append([checkpoint, prior, title, *segments, each])
    head = ["checkpoint", "prior", "baseline", *(f"segment {j + 1}" for j in range(num_budgets))]
    return markdown([*head, "token-weighted, each seed"], rows)


def correlation_table(results: Results, cell: Cell, num_budgets: int = 4) -> str:
    """Corr[V, R] by segment."""
    rows = []
    for arm in MEASURED:
        variances = _settings(results.measures[cell][arm], num_budgets, 8, "uniform")
        for name, title in BASELINES.items():
            if variances:
                rows.append([NAMES.get(arm, "warm start"), title, *_segments(variances, "correlation", name)])
    return markdown(["checkpoint", "baseline", *(f"segment {j + 1}" for j in range(num_budgets))], rows)


def adaptive_table(results: Results) -> str:
    """
    Adaptive's normalised variance minus the others', mean and interval over the measured seeds; behind it, of how
    many seeds the bootstrap's own 95 % interval over prompts lies wholly above 0.
    """
    rows = []
    for cell, arm, records in _checkpoints(results):
        variances = _settings(records, 4, 8, "uniform")
        for name in ("v1", "v2_others", "brpo_others") if variances else ():
            segments = []
            for j in range(4):
                pairs = [(v["variance_ratio"]["adaptive"][j], v["variance_ratio"][name][j]) for v in variances]
                lows = [v["adaptive_minus"][name][j][0] for v in variances]
                known = [own - other for own, other in pairs if own is not None and other is not None]
                above = sum(low is not None and low > 0 for low in lows)
                segments.append(f"{text(known, signed=True)} ({above})" if known else "")
            where = f"{'/'.join(cell)}, {NAMES.get(arm, 'warm start')}"
            rows.append([where, BASELINES[name], str(len(variances)), *segments])
    return markdown(["checkpoint", "minus", "n", *(f"segment {j + 1}" for j in range(4))], rows)


def gradient_table(results: Results) -> str:
    """Noise of the gradient, in units of the thinking's without a baseline: median, smallest and largest."""
    columns = {**BASELINES, "summaries": "all summaries", "last_summary": "last summary"}
    rows = []
    for cell, arm, records in _checkpoints(results):
        noise = [record["gradient"]["uniform"]["noise"] for record in records]
        cells = []
        for name in columns:
            known = [n[name] for n in noise if n[name] is not None]
            cells.append(f"{np.median(known):.2f} ({min(known):.2f}–{max(known):.2f})" if known else "")
        rows.append(["/".join(cell), NAMES.get(arm, "warm start"), str(len(noise)), *cells])
    return markdown(["", "checkpoint", "n", *columns.values()], rows)


def _checkpoints(results: Results) -> Iterator[tuple[Cell, str, list[Record]]]:
    """Cell, arm and measurements of every kind of checkpoint, the warm start first."""
    for cell, by_arm in results.measures.items():
        for arm in MEASURED:
            if by_arm[arm]:
                yield cell, arm, by_arm[arm]


def goals_table(results: Results, cell: Cell) -> str:
    """The goals that were set for learning, one column for each arm they are asked of, each cell with its figure."""

    def verdict(met: bool) -> str:
        return "met" if met else "not met"

    n, runs = results.updates(cell), results.runs[cell]
    arms = [arm for arm in GOAL_ARMS if set(runs[arm]) & set(runs["grpo"])]
    rows: list[list[str]] = []
    for axis, after, name in (
        ("update", n // 3, f"{n // 3} updates"),
        ("update", n, f"{n} updates"),
        ("seconds", n, "equal CPU seconds"),
    ):
        means = [differences(results, cell, arm, axis, after=after).mean(axis=0) for arm in arms]
        rows += [
            [
                f"at or above GRPO at every budget, {name}: smallest difference",
                *(f"{mean.min():+.3f}: {verdict(mean.min() >= 0)}" for mean in means),
            ],
            [
                f"10 points above it at the second-smallest budget, {name}",
                *(f"{mean[1]:+.3f}: {verdict(mean[1] >= 0.10)}" for mean in means),
            ],
        ]
    medians = [float(np.median(_reach_shares(results, cell, arm))) for arm in arms]
    name = f"GRPO's anytime accuracy after {n} updates with at most half of its updates: median share"
    rows.append([name, *(f"{median:.2f}: {verdict(median <= 0.5)}" for median in medians)])
    return markdown(["goal", *(NAMES[arm] for arm in arms)], rows)


def variance_goal_table(results: Results) -> str:
    """In how many seeds the token-weighted variance of V is below those of V1 and V2, on the warm starts."""
    rows = []
    for cell, by_arm in results.measures.items():
        for prior in ("uniform", "linear", "base"):
            counts = []
            for names in (("brpo", "v1", "v2"), ("brpo_others", "v1", "v2_others")):
                weighted = [[v["token_weighted"][n] for n in names] for v in _settings(by_arm[""], 4, 8, prior)]
                known = [values for values in weighted if None not in values]
                counts.append(f"{sum(values[0] < min(values[1:]) for values in known)} of {len(known)}")
            rows.append(["/".join(cell), prior, *counts])
    return markdown(["", "prior", "released group mean", "own left out"], rows)


def _reach_shares(results: Results, cell: Cell, arm: str) -> list[float]:
    runs, n, shares = results.runs[cell], results.updates(cell), []
    for seed in sorted(set(runs[arm]) & set(runs["grpo"])):
        target = float(results.at(runs["grpo"][seed], "update", n).mean())
        shares.append(reach(results.progress(runs[arm][seed]), target, "update") / n)
    return shares


# Figures


def training_figure(results: Results, cell: Cell, path: Path) -> None:
    """Curves before and after; anytime accuracy over updates and tokens; thinking length over updates."""
    runs, n = results.runs[cell], results.updates(cell)
    figure = Figure(figsize=(11, 7), layout="constrained")
    (curve, updates), (tokens, length) = figure.subplots(2, 2)
    budgets = grid(results, next(iter(runs["grpo"].values())))
    warm = np.mean([r["accuracy"] for (of_cell, _), r in results.warm_starts.items() if of_cell == cell], axis=0)
    curve.plot(budgets, warm, "o--", color="tab:gray", label="before")
    for arm in MAIN_ARMS:
        if not runs[arm]:
            continue
        after = np.array([results.at(record, "update", n) for record in runs[arm].values()])
        means, halves = zip(*(interval(column) for column in after.T), strict=True)
        color, label = _COLORS[arm], f"{NAMES[arm]} ({len(after)} seeds)"
        curve.errorbar(budgets, means, np.nan_to_num(halves), fmt="o-", capsize=3, color=color, label=label)
        progress = [results.progress(record) for record in runs[arm].values()]
        for axes, axis, value in (
            (updates, "update", "anytime"),
            (tokens, "tokens", "anytime"),
            (length, "update", "thinking_length"),
        ):
            x, y = (np.mean([p[name] for p in progress], axis=0) for name in (axis, value))
            axes.plot(x, y, "o-", color=color, label=NAMES[arm])
            for p in progress:
                axes.plot(p[axis], p[value], color=color, alpha=0.2, linewidth=0.8)
    curve.set(xlabel="thinking budget (tokens)", ylabel="accuracy", title=f"after {n} updates")
    updates.set(xlabel="updates", ylabel="anytime accuracy")
    tokens.set(xlabel="generated tokens", ylabel="anytime accuracy")
    length.set(xlabel="updates", ylabel="thinking length (tokens)")
    curve.legend()
    for axes in (curve, updates, tokens, length):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=70)


def write_page(folder: Path, page: Path) -> None:
    """Put all tables of the results in a folder into the page, and the figures beside it."""
    results, variants = (Results(folder, studies) for studies in FROM_THE_SAME.values())
    makers: dict[str, Callable[[], str]] = {
        "tuning": lambda: tuning_table(results),
        "adaptive": lambda: adaptive_table(results),
        "gradient": lambda: gradient_table(results),
        "noise": lambda: noise_table(variants),
        "variance goal": lambda: variance_goal_table(results),
    }
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    for cell in [cell for cell, runs in results.runs.items() if runs["grpo"]]:
        training_figure(results, cell, images / f"learning_{'_'.join(cell)}.png")
        for name, table in (
            ("curves", curves_table),
            ("differences", differences_table),
            ("reach", reach_table),
            ("arms", arms_table),
            ("decayed", decayed_table),
            ("objective", variants_table),
            ("objective curves", variants_curves_table),
            ("variance", variance_table),
            ("variance 8 budgets", lambda r, c: variance_table(r, c, num_budgets=8, priors=["uniform"])),
            ("variance pairs", lambda r, c: variance_table(r, c, group_size=2, priors=["uniform"])),
            ("correlation", correlation_table),
            ("goals", goals_table),
        ):
            makers[f"{name} {'/'.join(cell)}"] = lambda table=table, cell=cell: table(results, cell)
    for cell in [cell for cell, runs in variants.runs.items() if runs["grpo"]]:
        of_cell = "/".join(cell)
        makers[f"variants {of_cell}"] = lambda cell=cell: variants_table(variants, cell)
        makers[f"variants curves {of_cell}"] = lambda cell=cell: variants_curves_table(variants, cell)
        makers[f"pooled {of_cell}"] = lambda cell=cell: pooled_table((results, variants), cell)

    def filled(match: re.Match) -> str:
        name = match.group(1)
        if name not in makers:
            raise ValueError(f"{page} asks for the table {name!r}; there are {sorted(makers)}.")
        return f"<!-- table: {name} -->\n\n{makers[name]()}\n\n<!-- end -->"

    page.write_text(re.sub(r"<!-- table: (.*?) -->.*?<!-- end -->", filled, page.read_text(), flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description="Put the tables and figures of the studies into a page.")
    parser.add_argument("results", type=Path, help="folder with main.jsonl and the others")
    parser.add_argument("page", type=Path, help="Markdown page")
    options = parser.parse_args()
    write_page(options.results, options.page)


if __name__ == "__main__":
    main()
