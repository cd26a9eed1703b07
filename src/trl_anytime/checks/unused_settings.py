"""
Settings that were given and have no effect, each with what would give it one.

Only those that this package defines or leaves without effect, and those of data and adapters. What TRL and
transformers do with their own settings changes with their releases.
"""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from trl import ModelConfig

from ..brpo_config import BRPOConfig
from ..data.problems import is_file
from ..data.recipe import DataArguments
from .finding import WARNING, Finding


@dataclass(frozen=True)
class _Unused:
    """
    Settings without effect under a condition.

    Args:
        names (`tuple[str, ...]`):
            The settings.
        when (`Callable`):
            Whether they have none, from all settings.
        reason (`str`):
            Why.
        instead (`str`, *optional*, defaults to `"Remove it."`):
            What would give them one.
    """

    names: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str
    instead: str = "Remove it."


_TRAINING = (
    _Unused(
        ("max_completion_length",),
        lambda args: args.loss_type != "dr_grpo",
        "only the `dr_grpo` loss divides by it, and it limits no generation",
        "Remove it; `budgets` and `max_summary_length` limit what is generated.",
    ),
    _Unused(
        ("progress_decay",),
        lambda args: args.baseline in ("v2", "none"),
        "the baseline does not look at earlier rewards",
        "Remove it, or set `baseline` to 'brpo' or 'v1'.",
    ),
    _Unused(
        ("max_cached_tokens",),
        lambda args: args.use_vllm or args.use_transformers_continuous_batching,
        "it is transformers' plain generation that is split into parts",
        "Remove it, or generate with transformers (`use_vllm: false`).",
    ),
    _Unused(
        ("vllm_overlap",),
        lambda args: not args.use_vllm or args.vllm_mode == "server",
        "no engine of vLLM runs in this process",
        "Remove it, or set `use_vllm: true` and `vllm_mode: colocate`.",
    ),
    _Unused(("max_tool_calling_iterations", "log_multimodal"), lambda args: True, "BRPO has neither tools nor images"),
)
_EVALUATION = _Unused(
    ("eval_budgets",),
    lambda args: True,
    "there is no data to evaluate on",
    "Remove it, or give an evaluation set (`eval_dataset_name`).",
)
_DATA = (
    _Unused(("dataset_config", "dataset_train_split"), lambda data: is_file(data.dataset_name), "a file is one split"),
    _Unused(
        ("dataset_test_split",),
        lambda data: data.eval_dataset_name is None or is_file(data.eval_dataset_name),
        "there is no evaluation set on the Hub",
        "Remove it, or set `eval_dataset_name`.",
    ),
)
_MODEL = (
    _Unused(
        tuple(f.name for f in fields(ModelConfig) if f.name.startswith("lora_")),
        lambda model: not model.use_peft,
        "there are no adapters, all weights are trained",
        "Set `use_peft: true`, or remove it.",
    ),
)


def unused_settings(args: BRPOConfig, has_eval_data: bool) -> list[Finding]:
    """
    Find settings of a training that differ from their default and have no effect beside the others.

    Args:
        args ([`BRPOConfig`]):
            All settings.
        has_eval_data (`bool`):
            Whether there is an evaluation set.

    Returns:
        `list[Finding]`: a warning for each reason.
    """
    return _unused(args, _TRAINING if has_eval_data else (*_TRAINING, _EVALUATION))


def unused_recipe_settings(data_args: DataArguments, model_args: ModelConfig) -> list[Finding]:
    """Find the same among the settings of data and adapters."""
    return _unused(data_args, _DATA) + _unused(model_args, _MODEL)


def _unused(settings: Any, rows: Sequence[_Unused]) -> list[Finding]:
    changed = _changed(settings)
    findings = []
    for row in rows:
        names = [name for name in row.names if name in changed]
        if names and row.when(settings):
            said = ", ".join(f"`{name}={getattr(settings, name)!r}`" for name in names)
            has = "has" if len(names) == 1 else "have"
            instead = row.instead if len(names) == 1 else row.instead.replace("emove it", "emove them")
            findings.append(Finding("settings", WARNING, f"{said} {has} no effect: {row.reason}.", instead))
    return findings


def _changed(settings: Any) -> set[str]:
    """Names of the settings that differ from their default."""
    changed = set()
    for f in fields(settings):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name == "eval_budgets":  # filled in
            default = settings.budgets
        if default is not MISSING and getattr(settings, f.name) != default:
            changed.add(f.name)
    return changed
