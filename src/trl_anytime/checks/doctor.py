"""`trl-anytime doctor`, which checks a training recipe before it runs."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config
from trl.import_utils import is_vllm_available
from trl.trainer.utils import add_fused_lm_head

from ..brpo_config import BRPOConfig
from ..data.problems import find_benchmark
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
from ..outside.versions import installed_version
from ..rewards import AnswerReward
from ..rollout.markers import ThinkingMarkers, find_markers, render_prompt
from ..rollout.vllm_server import check_server, server_url
from .batch_sizes import BatchArithmetic, most_tokens
from .finding import ERROR, OK, WARNING, Finding
from .memory import Launch, memory_finding, planned_model, without_memory
from .prompts import shortest_and_longest
from .start_checks import (
    context_findings,
    learning_rate_findings,
    length_findings,
    prompt_findings,
    reward_findings,
    sampled_rows,
    splice_findings,
    template_findings,
    text_of,
)
from .unused_settings import unused_recipe_settings, unused_settings

# Models up to this number of weights are loaded and measured unasked. It takes seconds, and 2 GB in float32.
_SMALL = 500_000_000
# Warn if a larger share of the problems than this has too long prompts
_MOST_LONG_PROMPTS = 0.05


@dataclass
class Report:
    """
    Results of the checks of a recipe.

    Args:
        findings (`list[Finding]`):
            One or more findings of each check.
        tables (`list[str]`):
            Tables of the batch sizes, and of the memory of a GPU.
    """

    findings: list[Finding] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether no finding is an error."""
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
    Read how a run is distributed over GPUs.

    Args:
        accelerate_config (`Path`, *optional*):
            File for `accelerate launch --config_file`, or the name of one that comes with this package.
        num_processes (`int`, *optional*):
            Number of GPUs. Defaults to that of the file, or to the GPUs of this machine, at least 1.
        sharding (`str`, *optional*):
            See [`Launch`]. Defaults to that of the file.

    Raises:
        `ValueError`: If the file cannot be read.
    """
    config: Any = {}
    if accelerate_config is not None:
        try:
            config = read_yaml(packaged_file("accelerate_configs", accelerate_config))
            _LAUNCH(config, "")
        except (OSError, ValueError) as error:
            raise ValueError(f"{accelerate_config} is not a configuration file of accelerate: {error}") from error
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
    assume_vllm: bool = False,
) -> Report:
    """
    Check a recipe.

    Args:
        path (`Path`):
            File or name of a recipe, as for `trl-anytime train --config`.
        changes (`Mapping[str, str]`):
            Settings that override those of the file.
        launch ([`Launch`]):
            Planned distribution over GPUs.
        gpu_bytes (`int`, *optional*):
            Memory of one GPU. Defaults to that of this machine's GPU, if it has one.
        settings_only (`bool`, *optional*, defaults to `False`):
            Whether to skip checks that need the model's files or the data.
        load_model (`bool`, *optional*, defaults to `False`):
            Whether to load the weights of a large model, too, to measure tree attention.
        assume_vllm (`bool`, *optional*, defaults to `False`):
            Whether to take vLLM for installed, because the run is for another machine.

    Raises:
        `ValueError`: If the file does not contain settings.
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
        found.findings.append(Finding("settings", OK, "All given settings have an effect."))
    engine_findings, engine_context = _vllm(args, name, launch, settings_only, assume_vllm)
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
        # Without data, the instruction serves as the prompt, and `max_prompt_length` as the longest length
        instruction = [{"role": "user", "content": data_args.instruction}]
        markers = _prompts(found, tokenizer, instruction if dataset is None else dataset[0]["prompt"], args)
    if tokenizer is not None and markers is not None:
        found.findings += prompt_findings(tokenizer, datasets, _template_kwargs(args), markers)
    if tokenizer is not None and dataset is not None:
        prompt_length = _longest_prompt(tokenizer, dataset, args)
    found.findings += _rewards(args, reward, datasets, tokenizer)

    row = None
    if markers is not None and prompt_length is not None:
        row = prompt_length + most_tokens(args, markers.max_bridge_length)[0]
    batch = BatchArithmetic.from_settings(args, None if dataset is None else len(dataset), row)
    found.findings += batch.findings() or [
        Finding("batch", OK, f"Each optimiser step uses {batch.prompts_per_step:g} prompts. See the table.")
    ]
    found.tables.append(batch.table())
    if config is None:
        return found

    if markers is not None and prompt_length is not None:
        in_model = getattr(config.get_text_config(), "max_position_embeddings", None)
        found.findings += context_findings(prompt_length, args, markers, in_model, engine_context)
        if model_args.load_in_4bit or model_args.load_in_8bit:
            found.findings.append(Finding("memory", OK, "Memory is not estimated for quantized weights."))
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
    """Read the settings of a recipe. A setting that only this machine refuses, such as bf16, is a finding."""
    try:
        return read_recipe(path, changes, launch.num_processes)
    except UnreadableRecipe:
        raise
    except ValueError as error:
        if torch.accelerator.is_available():
            raise
        settings = read_recipe(path, {**changes, "use_cpu": "true"}, launch.num_processes)
        level = WARNING if is_elsewhere else ERROR
        advice = "Train on a GPU that can, or set `bf16: false`."
        if not is_elsewhere:
            advice += " `--gpu-memory` says that the run is for another machine."
        message = f"This machine cannot train with these settings: {_first_line(error)}"
        found.findings.append(Finding("settings", level, message, advice))
        return settings


def _settings(data_args: DataArguments, args: BRPOConfig, model_args: ModelConfig) -> list[Finding]:
    has_eval_data = data_args.eval_dataset_name is not None
    findings = unused_settings(args, has_eval_data) + unused_recipe_settings(data_args, model_args)
    findings += learning_rate_findings(args, bool(model_args.use_peft))
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy != "no" and not has_eval_data:
        findings.append(
            Finding(
                "settings",
                ERROR,
                f"`eval_strategy={strategy!r}` evaluates during training, but there is no evaluation set.",
                "Set `eval_dataset_name`, or remove `eval_strategy`.",
            )
        )
    return findings


def _rewards(
    args: BRPOConfig, reward: Any, datasets: dict[str, Dataset], tokenizer: PreTrainedTokenizerBase | None
) -> list[Finding]:
    """Check the reward, and the answers of the data."""
    rows = [row for part in datasets.values() for row in sampled_rows(part)]
    findings = reward_findings(args, [reward], rows, datasets)
    return findings if tokenizer is None else findings + length_findings(args, [reward], datasets, tokenizer)


def _vllm(
    args: BRPOConfig, model_name: str, launch: Launch, settings_only: bool, assume_vllm: bool
) -> tuple[list[Finding], int | None]:
    """Check generation with vLLM. Returns findings, and the context length of its engine if that is known."""
    if not args.use_vllm:
        return [Finding("vllm", OK, "vLLM is not used. transformers generates.")], None
    context = args.vllm_max_model_length if args.vllm_mode == "colocate" else None
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        available = is_vllm_available()
    if not available and not assume_vllm:
        message = "`use_vllm` is set, but vLLM is not installed here."
        return [
            Finding(
                "vllm",
                ERROR,
                message,
                "Run `pip install 'trl-anytime[vllm]'`, or set `use_vllm: false`. --assume-vllm is for another "
                "machine.",
            )
        ], context
    findings = []
    if raised:
        findings.append(Finding("vllm", WARNING, str(raised[0].message), "Install a vLLM version in that range."))
    if args.vllm_mode == "colocate" and launch.num_processes % args.vllm_tensor_parallel_size:
        findings.append(
            Finding(
                "vllm",
                ERROR,
                f"{launch.num_processes} GPUs cannot be divided into engines of "
                f"`vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}` GPUs.",
                "Lower `vllm_tensor_parallel_size`, or train on another number of GPUs.",
            )
        )
    if args.vllm_mode == "server" and not settings_only:
        try:
            context = check_server(server_url(args), 1.0, model_name)
        except (ConnectionError, ValueError) as error:
            advice = "Start the server before training, as the message says."
            findings.append(Finding("vllm", ERROR, str(error), advice))
    assert args.steps_per_generation is not None  # filled in by TRL
    requests = args.per_device_train_batch_size * args.steps_per_generation * args.vllm_tensor_parallel_size
    installed = installed_version("vllm") or "of unknown version" if available else "taken for installed"
    message = f"vLLM {installed}, {args.vllm_mode} mode"
    if args.vllm_mode == "colocate":
        message += (
            f", at most {requests} continuations at a time per engine, "
            f"{args.vllm_gpu_memory_utilization:.0%} of a GPU's memory"
        )
    return findings or [Finding("vllm", OK, f"{message}.")], context


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith(".") else f"{line}."


def _hub_advice(name: str, error: BaseException, is_data: bool = False) -> str | None:
    """Return what to do if the Hub was not reached, or `None` if that is not what is wrong."""
    reason: BaseException | None = error
    while not isinstance(reason, ConnectionError | LocalEntryNotFoundError):
        if reason is None:
            return None
        reason = reason.__cause__ or reason.__context__
    benchmark = find_benchmark(name) if is_data else None
    hub_id = name if benchmark is None else benchmark.hub_id
    load = f"load it once by `datasets.load_dataset({hub_id!r})`" if is_data else f"run `hf download {hub_id}`"
    where = f"where there is a network, {load}. Copy the cache (`HF_HOME`) to this machine"
    if HF_HUB_OFFLINE:
        return f"`HF_HUB_OFFLINE` is set, and {hub_id} is not in the cache. Unset it. Without a network: {where}."
    return f"If this machine has no network: {where}, and set `HF_HUB_OFFLINE=1`."


def _model_files(
    found: Report, name: str, init_kwargs: Mapping[str, Any]
) -> tuple[PreTrainedTokenizerBase | None, PretrainedConfig | None]:
    """Load the model's tokenizer and configuration. A failure is a finding."""
    if Path(name, "adapter_config.json").is_file():
        found.findings.append(
            Finding(
                "model",
                ERROR,
                f"{name!r} is a PEFT adapter. Loaded as a model, none of its parameters is trainable. Checks that "
                "need the model are skipped.",
                "Merge the adapter into its base model (`merge_and_unload`) and set `model_name_or_path` to the "
                "result. Or pass `PeftModel.from_pretrained(..., is_trainable=True)` to the trainer in a script.",
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
                f"{name!r} cannot be loaded: {_first_line(error)} Checks that need the model are skipped.",
                _hub_advice(name, error)
                or "Set `model_name_or_path` to a folder, or to a model on the Hub that you can access.",
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
    """Read the problems to train and to evaluate on, as the training script does. A failure is a finding."""
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
                    f"{source.name!r} cannot be used: {_first_line(error)} Checks that need it are skipped.",
                    _hub_advice(source.name, error, is_data=True)
                    or "Fix the data, or set `dataset_name`, `problem_column`, `answer_column` or "
                    "`on_bad_gold: skip`.",
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
    message = " ".join([f"{source}: {len(kept):,} of {num_rows:,} rows are used.", *raised])
    if long:
        message += f" {long:,} prompts are left out, because they have more than {data_args.max_prompt_length} tokens."
    if not len(kept):
        return Finding("data", ERROR, f"{message} No row is left.", "Add problems, or raise `max_prompt_length`.")
    if long > _MOST_LONG_PROMPTS * num_rows:
        return Finding("data", WARNING, message, "Raise `max_prompt_length`, and with it `vllm_max_model_length`.")
    return Finding("data", OK, message)


def _prompts(
    found: Report, tokenizer: PreTrainedTokenizerBase, prompt: Any, args: BRPOConfig
) -> ThinkingMarkers | None:
    """Find the markers of a prompt, and check template and splices."""
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
        advice = "Change the chat template, `chat_template_kwargs`, or the setting that is named."
        found.findings.append(Finding("template", ERROR, str(error), advice))
        return None
    found.findings += template_findings(tokenizer, rendered, generation_prompt, args, markers)
    eos_token_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found.findings += splice_findings(tokenizer, rendered, text_of(prompt), markers, eos_token_ids, True)
    return markers


def _longest_prompt(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, args: BRPOConfig) -> int:
    """Return the tokens of the longest prompt, among those with the longest texts."""
    _, prompts = shortest_and_longest(dataset)
    texts = [render_prompt(tokenizer, prompt, _template_kwargs(args))[0] for prompt in prompts]
    return max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _template_kwargs(args: BRPOConfig) -> dict[str, Any]:
    return cast(dict[str, Any], args.chat_template_kwargs or {})


def _dtype(config: PretrainedConfig, init_kwargs: Mapping[str, Any]) -> torch.dtype:
    """Return the precision in which TRL loads the weights."""
    wanted = init_kwargs["dtype"]
    if wanted in (None, "auto"):
        wanted = config.get_text_config().dtype or torch.float32
    return getattr(torch, wanted) if isinstance(wanted, str) else wanted


def _tree_attention(
    config: PretrainedConfig, name: str, args: BRPOConfig, init_kwargs: Mapping[str, Any], load_model: bool
) -> list[Finding]:
    """
    Check whether rollouts can be packed.

    This looks at the model's structure, and at its weights if the model is small or `load_model` is set.
    """
    if args.packing == "rows":
        message = "`packing` is 'rows', so rollouts are not packed. Training costs several times as much."
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
                    "Download the weights, or set `model_name_or_path` to a folder that has them.",
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
                    f"Rollouts can be packed, but summaries cannot reuse the cache of their trace: {decoding}. Each "
                    "summary computes its trace again.",
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
                "Train a model with plain attention layers, or set `packing: rows` to accept the cost.",
            )
        ]
    message = (
        "Packed rollouts agree with separate rows on these weights."
        if measured
        else "The model's structure allows packed rollouts. The trainer measures them on the weights when it starts. "
        "`--load-model` does so here."
    )
    return [Finding("tree attention", OK, message)]
