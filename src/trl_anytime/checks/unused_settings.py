"""
Settings that were given but have no effect, each with the change that would give it one.

Only some settings are checked: those that this package defines or leaves without effect, and those of data and
adapters. What TRL and transformers do with their own settings changes between releases.
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
            Decides from all settings whether these have no effect.
        reason (`str`):
            Why they have no effect.
        instead (`str`, *optional*, defaults to `"Remove it."`):
            What to change.
    """

    names: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str
    instead: str = "Remove it."


_TRAINING = (
    _Unused(
        ("max_completion_length",),
        lambda args: args.loss_type != "dr_grpo",
        "only the `dr_grpo` loss divides by it, and it does not limit generation",
        "Remove it. `budgets` and `max_summary_length` limit generation.",
    ),
    _Unused(
        ("progress_decay",),
        lambda args: args.baseline in ("v2", "none"),
        "this baseline does not use earlier rewards",
        "Remove it, or set `baseline` to 'brpo' or 'v1'.",
    ),
    _Unused(
        ("max_cached_tokens",),
        lambda args: args.use_vllm or args.use_transformers_continuous_batching,
        "it only splits plain generation with transformers",
        "Remove it, or set `use_vllm: false` and `use_transformers_continuous_batching: false`.",
    ),
    _Unused(
        ("vllm_overlap",),
        lambda args: not args.use_vllm or args.vllm_mode == "server",
        "vLLM does not run in this process",
        "Remove it, or set `use_vllm: true` and `vllm_mode: colocate`.",
    ),
    _Unused(("max_tool_calling_iterations", "log_multimodal"), lambda args: True, "BRPO does not use tools or images"),
)
_EVALUATION = _Unused(
    ("eval_budgets",),
    lambda args: True,
    "there is no evaluation set",
    "Remove it, or set `eval_dataset_name`.",
)
_DATA = (
    _Unused(
        ("dataset_config", "dataset_train_split"), lambda data: is_file(data.dataset_name), "a file has one split"
    ),
    _Unused(
        ("dataset_test_split",),
        lambda data: data.eval_dataset_name is None or is_file(data.eval_dataset_name),
        "no evaluation set is loaded from the Hub",
        "Remove it, or set `eval_dataset_name`.",
    ),
)
_MODEL = (
    _Unused(
        tuple(f.name for f in fields(ModelConfig) if f.name.startswith("lora_")),
        lambda model: not model.use_peft,
        "all weights are trained, without adapters",
        "Set `use_peft: true`, or remove it.",
    ),
)


def unused_settings(args: BRPOConfig, has_eval_data: bool) -> list[Finding]:
    """
    Find training settings that differ from their default, but have no effect given the others.

    Args:
        args ([`BRPOConfig`]):
            All settings.
        has_eval_data (`bool`):
            Whether there is an evaluation set.

    Returns:
        `list[Finding]`: one warning for each reason.
    """
    return _unused(args, _TRAINING if has_eval_data else (*_TRAINING, _EVALUATION))


def unused_recipe_settings(data_args: DataArguments, model_args: ModelConfig) -> list[Finding]:
    """Find settings of data and adapters that have no effect, as [`unused_settings`] does."""
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
    """Return the names of the settings that differ from their default."""
    changed = set()
    for f in fields(settings):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name == "eval_budgets":  # filled in
            default = settings.budgets
        if default is not MISSING and getattr(settings, f.name) != default:
            changed.add(f.name)
    return changed
