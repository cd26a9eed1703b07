r"""
Why answers score 0: counters for each budget, and alarms for what is wrong with a whole evaluation.

A summary scores 0 if it is ill-formed, has no `\boxed{}`, or is wrong. One that is cut off at its length limit often
has no box for that reason.
"""

from collections.abc import Sequence
from typing import Any

# What is counted for each budget, and the title of its column
COUNTERS = {
    "answers": "answers",
    "zero": "score 0",
    "ill_formed": "ill-formed",
    "clipped": "cut off",
    "no_box": "no box",
    "forced": "forced",
    "escaped": "escaped",
}
# Share of the answers that are ill-formed, from which an alarm names it as the reason
ILL_FORMED = 0.5
# Share of the graded summaries without a box, here and in training. If most lack a box, the reward mainly grades the
# form.
NO_BOX = 0.5
# Share of the summaries that are cut off, here and in training. A few repeat themselves in every run (1 % in the
# quickstart). At a quarter, correct answers no longer fit.
CLIPPED = 0.25
# Share of the summaries behind a forced cut that resume the reasoning, here and in training. Users counted 13 of 30 of
# a model that does, and 1 of 30 of one that does not.
ESCAPED = 0.25


def answer_counts(records: Sequence[dict[str, Any]], budgets: Sequence[int]) -> list[dict[str, int | None]]:
    """
    Count the answers at each budget.

    Args:
        records (`Sequence[dict]`):
            Samples of a journal.
        budgets (`Sequence[int]`):
            Budgets in thinking tokens.

    Returns:
        `list[dict]`: for each budget `budget`, the `COUNTERS`, and `escape_ratio`, the share `escaped` / `forced`.
        `no_box` is `None` for a reward that looks for no box. So are `clipped`, or `forced` and `escaped`, if some
        samples are of a version that did not record them. `escape_ratio` is `None` without forced cuts, too.
    """
    at: dict[int, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    forced_at: dict[int, list[dict[str, Any]]] = {budget: [] for budget in budgets}
    for record in records:
        for cut in record["cuts"]:
            for budget in cut["budgets"]:
                at[budget].append(cut)
                if is_forced(record, cut):
                    forced_at[budget].append(cut)
    return [
        {
            "budget": budget,
            "answers": sum(len(cut["answers"]) for cut in cuts),
            "zero": sum(reward == 0 for cut in cuts for reward in cut["rewards"]),
            "ill_formed": sum(not formed for cut in cuts for formed in cut["well_formed"]),
            **{
                name: sum(map(sum, (cut[name] for cut in cuts))) if all(name in cut for cut in cuts) else None
                for name in ("clipped", "no_box")
            },
            **_escape_counts(cuts, forced_at[budget]),
        }
        for budget, cuts in at.items()
    ]


def is_forced(record: dict[str, Any], cut: dict[str, Any]) -> bool:
    """Return whether a cut of a sample closed its trace by force. Otherwise the trace had ended by itself."""
    return not (record["finished"] and cut["thinking_tokens"] >= record["thinking_tokens"])


def _escape_counts(cuts: Sequence[dict[str, Any]], forced: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if not all("escapes" in cut for cut in cuts):
        return dict.fromkeys(("forced", "escaped", "escape_ratio"))
    total = sum(len(cut["answers"]) for cut in forced)
    escaped = sum(bool(kind) for cut in forced for kind in cut["escapes"])
    return {"forced": total, "escaped": escaped, "escape_ratio": escaped / total if total else None}


def alarms(results: dict[str, Any]) -> dict[str, list[str]]:
    """
    Return what is wrong with a whole evaluation.

    Args:
        results (`dict`):
            Results with the counters of each data set.

    Returns:
        `dict[str, list[str]]`: the data sets of each alarm, by its name.
    """
    found: dict[str, list[str]] = {}
    for name in results["protocol"]["problems"]:
        curve = results["curves"][name]
        total = _totals(curve)
        if total["ill_formed"] == total["answers"]:
            found.setdefault("nothing is well-formed", []).append(name)
        elif total["zero"] == total["answers"]:
            found.setdefault("no reward at any budget", []).append(name)
        if curve["thinking"]["finished"] == 0:
            found.setdefault("thinking is never finished", []).append(name)
        if total["escaped"] and total["escaped"] >= ESCAPED * total["forced"]:
            found.setdefault("answers resume the reasoning", []).append(name)
    return found


def explain_zeros(results: dict[str, Any]) -> list[str]:
    """Return a line for each alarm of an evaluation, and one for what is not counted."""
    lines = [
        f"{', '.join(names)}: {name}. {_advice(name, results, names)}" for name, names in results["alarms"].items()
    ]
    counts = next(iter(results["curves"].values()))["answers"][0]
    if counts["clipped"] is None or counts["escaped"] is None:
        what = "Answers that are cut off" if counts["clipped"] is None else "Answers that resume the reasoning"
        lines.append(f"{what} are not counted, because some samples are of an older version.")
    elif counts["no_box"] is None:
        lines.append(
            f"Missing boxes are not counted, because the reward `{results['protocol']['reward']}` needs none."
        )
    return lines


def _totals(curve: dict[str, Any]) -> dict[str, int]:
    return {name: sum(counts[name] or 0 for counts in curve["answers"]) for name in COUNTERS}


def _advice(alarm: str, results: dict[str, Any], names: Sequence[str]) -> str:
    protocol = results["protocol"]
    totals = [_totals(results["curves"][name]) for name in names]
    total = {name: sum(counts[name] for counts in totals) for name in COUNTERS}
    if alarm == "thinking is never finished":
        return (
            f"Raise the last of --budgets ({protocol['budgets'][-1]}). If `thinking` in samples.parquet ends with "
            "another marker, set --think-end."
        )
    if alarm == "answers resume the reasoning":
        return (
            f"{total['escaped']} of {total['forced']} answers behind a forced cut go on thinking. Look at `escape` in "
            "answers.parquet. If most are `unanswered` and good, raise --max-summary-length. If not, give the model a "
            "--truncation-bridge that it knows, or train it by BRPO."
        )
    if total["ill_formed"] >= ILL_FORMED * total["answers"]:
        return (
            f"{total['ill_formed']} of {total['answers']} answers are ill-formed. Look at `thinking` and `cuts` in "
            f"samples.parquet. A trace ends with EOS instead of {protocol['markers']['think_end']!r}, or an answer "
            "has that once more."
        )
    if total["no_box"] >= NO_BOX * total["answers"]:
        return (
            rf"{total['no_box']} of {total['answers']} answers have no \boxed{{}}. Look at `answer` in "
            "answers.parquet, and ask for a box by --instruction."
        )
    if total["clipped"] >= CLIPPED * total["answers"]:
        return f"{total['clipped']} of {total['answers']} answers are cut off. Raise --max-summary-length."
    return (
        "Compare `answer` with `gold` in answers.parquet. If the reward should have accepted some, give another "
        "--reward. If not, the problems are too hard for this model."
    )
