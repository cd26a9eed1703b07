"""Settings that were given and would have no effect, each with what gives it one."""

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from trl import ModelConfig

from ..brpo_config import BRPOConfig
from ..data import DataArguments, is_file
from .finding import WARNING, Finding

_NOTHING_TO_DO = "Remove it."


@dataclass(frozen=True)
class _Idle:
    """
    Settings without effect under a condition.

    Args:
        names (`tuple[str, ...]`):
            The settings.
        when (`Callable`):
            Whether they have none, from all settings.
        reason (`str`):
            Why.
        instead (`str`, *optional*):
            What would give them one.
    """

    names: tuple[str, ...]
    when: Callable[[Any], bool]
    reason: str
    instead: str = _NOTHING_TO_DO


_VLLM_SERVER = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
)
_VLLM_COLOCATE = (
    "vllm_enable_sleep_mode",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_model_impl",
    "vllm_overlap",
    "vllm_tensor_parallel_size",
)
_VLLM_CORRECTION = (
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)

# Read off TRL 1.15 and 1.16, transformers 5.10 to 5.23, and this package
_TRAINING = (
    # BRPO
    _Idle(
        ("max_completion_length",),
        lambda args: args.loss_type != "dr_grpo",
        "only the `dr_grpo` loss divides by it, and it limits no generation",
        "Remove it; `budgets` and `max_summary_length` limit what is generated.",
    ),
    _Idle(
        ("progress_decay",),
        lambda args: args.baseline in ("v2", "none"),
        "the baseline does not look at earlier rewards",
        "Remove it, or set `baseline` to 'brpo' or 'v1'.",
    ),
    _Idle(
        ("max_cached_tokens",),
        lambda args: args.use_vllm or args.use_transformers_continuous_batching,
        "it is transformers' plain generation that is split into parts",
        "Remove it, or generate with transformers (`use_vllm: false`).",
    ),
    _Idle(("max_tool_calling_iterations", "log_multimodal"), lambda args: True, "BRPO has neither tools nor images"),
    # Losses
    _Idle(
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
        lambda args: True,
        "BRPO refuses the loss 'vespo'",
    ),
    _Idle(
        ("sapo_temperature_neg", "sapo_temperature_pos"),
        lambda args: args.loss_type != "sapo",
        "only the loss 'sapo' has it",
        "Remove it, or set `loss_type: sapo`.",
    ),
    _Idle(
        ("epsilon", "epsilon_high"),
        lambda args: args.loss_type == "sapo",
        "the loss 'sapo' does not clip",
        "Remove it, or take another `loss_type`.",
    ),
    _Idle(
        ("epsilon",),
        lambda args: args.loss_type == "cispo" and args.epsilon_high is not None,
        "the loss 'cispo' clips at `epsilon_high` alone",
        "Remove it, or take another `loss_type`.",
    ),
    _Idle(
        ("delta",),
        lambda args: args.loss_type in ("sapo", "cispo"),
        "this loss is not clipped on two sides",
        "Remove it, or take another `loss_type`.",
    ),
    _Idle(
        ("use_bias_correction_kl",),
        lambda args: not args.beta,
        "there is no KL term",
        "Remove it, or set `beta`.",
    ),
    _Idle(
        ("ref_model_mixup_alpha", "ref_model_sync_steps"),
        lambda args: not args.sync_ref_model,
        "the reference model stays as it is",
        "Remove it, or set `sync_ref_model: true`.",
    ),
    _Idle(
        ("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
        lambda args: not args.use_adaptive_entropy,
        "the entropy bonus is constant",
        "Remove it, or set `use_adaptive_entropy: true`.",
    ),
    _Idle(("label_smoothing_factor",), lambda args: True, "the loss has no labels"),
    # Generation
    _Idle(
        (*_VLLM_SERVER, *_VLLM_COLOCATE, *_VLLM_CORRECTION, "vllm_mode", "vllm_importance_sampling_correction"),
        lambda args: not args.use_vllm,
        "nothing is generated with vLLM",
        "Remove it, or set `use_vllm: true`.",
    ),
    _Idle(
        _VLLM_SERVER,
        lambda args: args.use_vllm and args.vllm_mode == "colocate",
        "the engine runs in this process",
        "Remove it, or set `vllm_mode: server`.",
    ),
    _Idle(
        _VLLM_COLOCATE,
        lambda args: args.use_vllm and args.vllm_mode == "server",
        "the server has settings of its own",
        "Remove it, and give it to `vllm serve` where it has one.",
    ),
    _Idle(
        _VLLM_CORRECTION,
        lambda args: args.use_vllm and not args.vllm_importance_sampling_correction,
        "the correction is off",
        "Remove it, or set `vllm_importance_sampling_correction: true`.",
    ),
    _Idle(
        ("use_transformers_continuous_batching", "cache_implementation"),
        lambda args: args.use_vllm,
        "vLLM generates",
        "Remove it, or set `use_vllm: false`.",
    ),
    _Idle(
        ("cache_implementation",),
        lambda args: (
            not (args.use_vllm or args.use_transformers_continuous_batching) and args.tree_attention != "rows"
        ),
        "thinkings and summaries share a cache of its own kind wherever the model allows it",
    ),
    _Idle(
        ("transformers_continuous_batching_config",),
        lambda args: not args.use_transformers_continuous_batching or args.use_vllm,
        "there is no continuous batching",
        "Remove it, or set `use_transformers_continuous_batching: true`.",
    ),
    # Logging and the loop
    _Idle(
        ("num_completions_to_print", "log_unique_prompts"),
        lambda args: not args.log_completions,
        "no completions are logged",
        "Remove it, or set `log_completions: true`.",
    ),
    _Idle(
        ("gradient_checkpointing_kwargs",),
        lambda args: not args.gradient_checkpointing,
        "there is no gradient checkpointing",
        "Remove it, or set `gradient_checkpointing: true`.",
    ),
    _Idle(
        ("num_train_epochs",),
        lambda args: args.max_steps > 0,
        "`max_steps` says how long to train",
        "Remove one of the two.",
    ),
    _Idle(
        ("warmup_steps",),
        lambda args: str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) == "constant",
        "the schedule 'constant' does not warm up",
        "Set `lr_scheduler_type: constant_with_warmup`, or remove it.",
    ),
    _Idle(
        ("save_steps", "save_total_limit"),
        lambda args: str(getattr(args.save_strategy, "value", args.save_strategy)) == "no",
        "no checkpoints are saved",
        "Remove it, or set `save_strategy: steps`.",
    ),
    _Idle(("train_sampling_strategy",), lambda args: True, "TRL samples prompts in groups, by itself"),
)
_EVALUATION = _Idle(
    ("eval_budgets", "num_generations_eval", "per_device_eval_batch_size", "eval_steps"),
    lambda args: True,
    "there is no data to evaluate on",
    "Remove it, or give an evaluation set (`eval_dataset_name`).",
)
_DATA = (
    _Idle(
        ("dataset_config", "dataset_train_split"),
        lambda data: is_file(data.dataset_name),
        "a file is one split",
    ),
    _Idle(
        ("eval_dataset_split",),
        lambda data: data.eval_dataset_name is None or is_file(data.eval_dataset_name),
        "there is no evaluation set on the Hub",
        "Remove it, or set `eval_dataset_name`.",
    ),
)
_MODEL = (
    _Idle(
        (
            "lora_r",
            "lora_alpha",
            "lora_dropout",
            "lora_target_modules",
            "lora_target_parameters",
            "lora_modules_to_save",
            "lora_task_type",
            "use_rslora",
            "use_dora",
        ),
        lambda model: not model.use_peft,
        "there are no adapters, all weights are trained",
        "Set `use_peft: true`, or remove it.",
    ),
    _Idle(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
        lambda model: not model.load_in_4bit,
        "the model is not quantized to 4 bits",
        "Set `load_in_4bit: true`, or remove it.",
    ),
)


def idle_settings(args: BRPOConfig, has_eval_data: bool) -> list[Finding]:
    """Settings of a training that differ from their default and have no effect beside the others."""
    return _idle(args, _TRAINING if has_eval_data else (*_TRAINING, _EVALUATION))


def idle_recipe_settings(data_args: DataArguments, model_args: ModelConfig) -> list[Finding]:
    """The same for the settings of data and model."""
    return _idle(data_args, _DATA) + _idle(model_args, _MODEL)


def _idle(settings: Any, rows: Sequence[_Idle]) -> list[Finding]:
    changed = _changed(settings)
    findings = []
    for row in rows:
        names = [name for name in row.names if name in changed]
        if names and row.when(settings):
            said = ", ".join(f"`{name}={getattr(settings, name)!r}`" for name in names)
            has = "has" if len(names) == 1 else "have"
            instead = row.instead if len(names) == 1 else row.instead.replace("Remove it", "Remove them")
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
