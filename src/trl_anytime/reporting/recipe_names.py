"""Names of recipes in the papers, found from the settings."""

from collections.abc import Sequence

from ..method.budgets import prior_weights

_PRIORS = ("uniform", "linear", "base")


def recipe_name(
    budgets: Sequence[int],
    prior: str | Sequence[float],
    num_summaries: int,
    max_summary_length: int,
    baseline: str,
    progress_decay: float,
    summary_policy: str,
    summary_weight: float | str = 1.0,
) -> str:
    """
    Name the recipe that has these settings of [`BRPOConfig`], as the papers' tables do.

    The number of budgets, the lengths, and the number of summaries beyond one may differ from the papers. With a
    single budget all priors are the same, and so are the baselines `"brpo"` and `"v2"`.

    Args:
        budgets (`Sequence[int]`):
            Budgets b_1 < … < b_m in thinking tokens.
        prior (`str` or `Sequence[float]`):
            Weight of each budget, by name or as m numbers.
        num_summaries (`int`):
            Summaries A per trace and budget.
        max_summary_length (`int`):
            Most tokens of a summary.
        baseline (`str`):
            Baseline of the thinking's advantage.
        progress_decay (`float`):
            λ of the baseline V1.
        summary_policy (`str`):
            `"decoupled"` or `"final"`.
        summary_weight (`float` or `str`, *optional*, defaults to `1.0`):
            Factor of the summaries' advantages. It is 1 in the papers.

    Returns:
        `str`: one of the seven variants in arXiv 2505.13438 (`"AnytimeReasoner-uniform"`, `"-linear"` and `"-base"`,
            `"GRPO"`, `"GRPO+linear"`, `"GRPO+decouple"`, `"GRPO+vr"`), `"Elastic Reasoning"` (arXiv 2505.05315, GRPO
            whose solution may be as long as its thinking), or `"custom"`.
    """
    if summary_weight != 1:
        return "custom"
    if len(budgets) == 1:
        if num_summaries > 1 or baseline not in ("brpo", "v2"):
            return "custom"
        return "Elastic Reasoning" if max_summary_length >= budgets[0] else "GRPO"
    prior = _prior_name(prior, budgets)
    if baseline == "brpo" and progress_decay != 0.5:
        return "custom"
    if num_summaries > 1 and summary_policy == "decoupled":
        if baseline == "brpo" and prior in _PRIORS:
            return f"AnytimeReasoner-{prior}"
        return "GRPO+decouple" if (baseline, prior) == ("v2", "base") else "custom"
    if num_summaries == 1 and summary_policy == "final":
        return {("v2", "linear"): "GRPO+linear", ("brpo", "base"): "GRPO+vr"}.get((baseline, prior), "custom")
    return "custom"


def _prior_name(prior: str | Sequence[float], budgets: Sequence[int]) -> str:
    weights = prior_weights(prior, budgets)
    return next((name for name in _PRIORS if weights.allclose(prior_weights(name, budgets))), "custom")
