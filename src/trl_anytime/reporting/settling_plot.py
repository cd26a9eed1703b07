"""Plot of what stopping when it has settled saves and loses. It needs matplotlib, which the extra `plot` installs."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from ..evaluation.settling import unbeaten
from ..outside.display import for_plot


@rc_context({"text.usetex": False})  # TeX would run commands in a name
def plot_settling(settling: dict[str, Any], path: Path) -> None:
    """
    Plot accuracy lost against tokens saved, with a panel per group.

    There is a line per spacing and share of agreement. Only points that no other beats are drawn, each with its number
    of checks. A ring marks the chosen one.

    Args:
        settling (`dict`):
            What [`~trl_anytime.evaluation.settling.calibration`] returns.
        path (`Path`):
            Path of the picture.
    """
    groups = settling["groups"]
    figure = Figure(figsize=(5 * len(groups), 4), layout="constrained")
    for axes, (name, group) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        points = group["points"]
        best = [points[i] for i in unbeaten(points)]
        for every, agreement in dict.fromkeys((point["every"], point["agreement"]) for point in best):
            own = [point for point in best if (point["every"], point["agreement"]) == (every, agreement)]
            label = f"agreement {agreement:g}" if every is None else f"every {every} tokens, agreement {agreement:g}"
            saved, lost = ([100 * p[key]["mean"] for p in own] for key in ("tokens_saved", "accuracy_lost"))
            ends = [
                [100 * abs(p["accuracy_lost"][end] - p["accuracy_lost"]["mean"]) for p in own]
                for end in ("low", "high")
            ]
            axes.errorbar(saved, lost, yerr=ends, fmt="o-", ms=3, lw=1, elinewidth=0.5, label=label)
            for x, y, point in zip(saved, lost, own, strict=True):
                axes.annotate(
                    str(point["checks"]), (x, y), textcoords="offset points", xytext=(3, 3), fontsize="small"
                )
        if group["chosen"] is not None:
            chosen = points[group["chosen"]]
            axes.plot(
                100 * chosen["tokens_saved"]["mean"],
                100 * chosen["accuracy_lost"]["mean"],
                "o",
                ms=11,
                mfc="none",
                mec="k",
            )
        axes.axhline(100 * settling["most_lost"], color="gray", lw=0.8, ls="--")
        axes.set(title=for_plot(name), xlabel="tokens saved (%)", ylabel="accuracy lost (points)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
