"""
What stopping when it has settled would have saved and cost, from the answers of an evaluation's own samples.

The rule is that of [`~trl_anytime.rollout.settling.Settling`]. Its checks are the answers at the budgets.

Dimensions: Q questions, T settings, B bootstrap samples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..outside.tables import aligned
from ..rewards.agreement import majority, read_answer
from ..rollout.settling import Streak
from .journal import question_means
from .statistics import Estimate, quantile_estimate, resampled_means
from .zeros import is_forced

# Largest loss of accuracy of the setting that is named
MOST_LOST = 0.005
# What is tried, as far as the budgets and the answers at a cut allow: checks in a row, shares of agreement, and steps
# between the budgets of two checks
_MOST_CHECKS = 8
_AGREEMENTS = (1.0, 0.75, 0.5)
_STRIDES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class _Totals:
    """
    Means over the samples of each question, without the rule and with it.

    Args:
        score, tokens, thinking (`np.ndarray`):
            Reward, all tokens after the prompt, and thinking tokens, each of shape (Q, 1 + T). The first column is
            without the rule.
        settled (`np.ndarray`):
            Share of the samples that stop, of shape (Q, 1 + T).
    """

    score: np.ndarray
    tokens: np.ndarray
    thinking: np.ndarray
    settled: np.ndarray


@dataclass(frozen=True)
class _Setting:
    """
    Setting of the rule.

    Args:
        stride (`int`):
            A check at every so many budgets.
        checks (`int`):
            Checks in a row that must have the same answer.
        agreement (`float`):
            Share of a check's answers that must be the same.
    """

    stride: int
    checks: int
    agreement: float


def settings_of(budgets: Sequence[int], num_answers: int) -> list[_Setting]:
    """
    Return the settings that an evaluation can tell apart.

    Args:
        budgets (`Sequence[int]`):
            Budgets in thinking tokens. If they are multiples of the first one, wider spacings are tried, too.
        num_answers (`int`):
            Answers at each budget. With one there is nothing to agree within a check.
    """
    # Shares that ask for the same number of answers are the same, of which the largest is taken
    shares = {math.ceil((share - 5e-3) * num_answers): share for share in sorted(_AGREEMENTS)}
    return [
        _Setting(stride, checks, share)
        for stride in (_STRIDES if _spacing(budgets) else (1,))
        for needed, share in sorted(shares.items(), reverse=True)
        for checks in range(1 if needed > 1 else 2, min((len(budgets) - 1) // stride, _MOST_CHECKS) + 1)
    ]


def _spacing(budgets: Sequence[int]) -> int | None:
    """Return the first budget if the others are its multiples one after the other."""
    return budgets[0] if all(b == budgets[0] * (i + 1) for i, b in enumerate(budgets)) else None


def calibration(
    records: Sequence[dict[str, Any]],
    budgets: Sequence[int],
    groups: Mapping[str, Sequence[str]],
    answer_bridge: str,
    num_answers: int,
) -> dict[str, Any]:
    """
    Replay the rule on all samples.

    Args:
        records (`Sequence[dict]`):
            Samples of a journal.
        budgets (`Sequence[int]`):
            Budgets in thinking tokens.
        groups (`Mapping[str, Sequence[str]]`):
            Names of the data sets of each group, by its name. Data sets weigh the same.
        answer_bridge (`str`):
            Text before each answer.
        num_answers (`int`):
            Answers at each budget.

    Returns:
        `dict`: `most_lost`, and by group the `points` and the number of the one that is `chosen`, or `None`. A point
        has a setting (`checks`, `every`, `agreement`), `accuracy_lost` and `tokens_saved` as estimates,
        `thinking_saved`, and the share `settled` of the samples. `every` is `None` if the budgets are not multiples
        of the first one.
    """
    settings, every = settings_of(budgets, num_answers), _spacing(budgets)
    replayed = question_means(
        records if settings else (), lambda record: _replay(record, budgets, settings, answer_bridge)
    )
    totals = {name: _Totals(*np.moveaxis(means, 1, 0)) for name, means in replayed.items()}
    found = {}
    for group, names in groups.items():
        points = _points([totals[name] for name in names], settings, every) if settings else []
        found[group] = {"points": points, "chosen": choose(points)}
    return {"most_lost": MOST_LOST, "groups": found}


def choose(points: Sequence[Mapping[str, Any]], most_lost: float = MOST_LOST) -> int | None:
    """
    Return the number of the point with most tokens saved at a small loss, or `None` if none saves.

    Args:
        points (`Sequence[Mapping]`):
            Points of [`calibration`].
        most_lost (`float`, *optional*, defaults to `0.005`):
            Largest loss of accuracy.
    """
    allowed = [
        i
        for i, point in enumerate(points)
        if point["accuracy_lost"]["mean"] <= most_lost + 1e-12 and point["tokens_saved"]["mean"] > 0
    ]
    return max(allowed, key=lambda i: points[i]["tokens_saved"]["mean"], default=None)


def unbeaten(points: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the points that no other point beats in both tokens saved and accuracy lost."""

    def beats(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        ours, theirs = ((p["tokens_saved"]["mean"], -p["accuracy_lost"]["mean"]) for p in (a, b))
        return ours != theirs and ours[0] >= theirs[0] and ours[1] >= theirs[1]

    return [i for i, point in enumerate(points) if not any(beats(other, point) for other in points)]


def _replay(
    record: dict[str, Any], budgets: Sequence[int], settings: Sequence[_Setting], answer_bridge: str
) -> np.ndarray:
    """Return score, tokens, thinking tokens and whether it stops, of one sample, shape (4, 1 + T)."""
    cut_at = {budget: cut for cut in record["cuts"] for budget in cut["budgets"]}
    last = cut_at[budgets[-1]]
    score, thinking = float(np.mean(last["rewards"])), record["thinking_tokens"]
    # The answer that is given in the end, and not all that were sampled there
    tokens = thinking + last["bridge_tokens"] + float(np.mean(last["answer_tokens"]))
    running = [
        cut_at[budget] for budget in budgets[:-1] if budget < thinking and is_forced(record, cut_at[budget])
    ]  # the trace goes on behind these
    costs = [len(cut["answers"]) * cut["bridge_tokens"] + sum(cut["answer_tokens"]) for cut in running]
    answers = [[_answer(cut, k, answer_bridge) for k in range(len(cut["answers"]))] for cut in running]
    verdicts = {
        agreement: [majority(found, agreement) for found in answers]
        for agreement in {setting.agreement for setting in settings}
    }
    rows = [(score, tokens, float(thinking), 0.0)]
    for setting in settings:
        checked = range(setting.stride - 1, len(running), setting.stride)
        streak = Streak()
        stop = next((i for i in checked if streak.add(verdicts[setting.agreement][i]) >= setting.checks), None)
        if stop is None:
            rows.append((score, tokens + sum(costs[i] for i in checked), float(thinking), 0.0))
            continue
        cut = running[stop]
        spent = sum(costs[i] for i in checked if i <= stop)  # the answer is one of the last check's
        rows.append((float(np.mean(cut["rewards"])), cut["thinking_tokens"] + spent, cut["thinking_tokens"], 1.0))
    return np.array(rows, dtype=float).T


def _answer(cut: dict[str, Any], k: int, answer_bridge: str) -> str | None:
    """Return the answer of a summary, `None` for one that is ill-formed or has none."""
    if not cut["well_formed"][k]:
        return None
    clipped = cut["clipped"][k] if "clipped" in cut else False
    return read_answer(cut["answers"][k], answer_bridge, clipped)


def _points(sets: Sequence[_Totals], settings: Sequence[_Setting], every: int | None) -> list[dict[str, Any]]:
    """Return the point of each setting, with intervals by bootstrap over questions."""

    def lost(score: np.ndarray) -> np.ndarray:
        return score[..., :1] - score[..., 1:]

    def saved(tokens: np.ndarray) -> np.ndarray:
        return 1 - tokens[..., 1:] / tokens[..., :1]

    means = [(lost(t.score.mean(axis=0)), saved(t.tokens.mean(axis=0)), saved(t.thinking.mean(axis=0))) for t in sets]
    lost_T, saved_T, thinking_T = (np.mean(values, axis=0) for values in zip(*means, strict=True))
    settled_T = np.mean([t.settled.mean(axis=0)[1:] for t in sets], axis=0)
    drawn = []
    for i, t in enumerate(sets):  # the same draws of questions for both
        columns = t.score.shape[1]
        both = resampled_means(np.concatenate([t.score, t.tokens], axis=1), seed=i)
        drawn.append((lost(both[:, :columns]), saved(both[:, columns:])))
    lost_BT, saved_BT = (np.mean(values, axis=0) for values in zip(*drawn, strict=True))
    return [
        {
            "checks": setting.checks,
            "every": None if every is None else every * setting.stride,
            "agreement": setting.agreement,
            "accuracy_lost": asdict(quantile_estimate(lost_T[t], lost_BT[:, t])),
            "tokens_saved": asdict(quantile_estimate(saved_T[t], saved_BT[:, t])),
            "thinking_saved": float(thinking_T[t]),
            "settled": float(settled_T[t]),
        }
        for t, setting in enumerate(settings)
    ]


def settling_table(results: dict[str, Any]) -> str:
    """
    Return the points that no other beats as text, of all data sets together, and what is chosen.

    Without a right answer there is nothing to lose, and nothing to say.
    """
    settling = results["settling"]
    (*_, (name, group)) = settling["groups"].items()
    if not group["points"] or results["curves"][name]["accuracy"][-1]["mean"] == 0:
        return ""

    def cell(value: dict[str, float]) -> str:
        return Estimate(**value).in_percent(width=5)

    shown = unbeaten(group["points"])
    rows = [
        [
            "checks",
            "every",
            "agreement",
            "tokens saved (%)",
            "accuracy lost (points)",
            "thinking saved (%)",
            "stopped (%)",
        ]
    ]
    rows += [
        [
            f"{'*' if i == group['chosen'] else ''}{point['checks']}",
            "-" if point["every"] is None else str(point["every"]),
            f"{point['agreement']:g}",
            cell(point["tokens_saved"]),
            cell(point["accuracy_lost"]),
            f"{100 * point['thinking_saved']:.1f}",
            f"{100 * point['settled']:.1f}",
        ]
        for i, point in enumerate(group["points"])
        if i in shown
    ]
    return f"{aligned(rows, left=())}\n{_advice(settling, group, results['protocol']['num_summaries'])}"


def _advice(settling: dict[str, Any], group: dict[str, Any], num_answers: int) -> str:
    points = 100 * settling["most_lost"]
    if group["chosen"] is None:
        return f"No setting saves tokens at {points:g} points of accuracy lost or less."
    chosen = group["points"][group["chosen"]]
    every = "" if chosen["every"] is None else f" --check-every {chosen['every']}"
    answers = "" if num_answers == 1 else f" --check-answers {num_answers}"
    shared = "" if chosen["agreement"] == 1 else f" --agreement {chosen['agreement']:g}"
    rule = f"--stop-when settled --checks {chosen['checks']}{every}{answers}{shared}"
    return f"* saves most at {points:g} points of accuracy lost or less: {rule}"
