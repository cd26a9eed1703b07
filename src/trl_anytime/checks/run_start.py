"""What the trainer says when training begins: what the run is going to be, and what is odd about it."""

from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ..brpo_config import BRPOConfig
from ..rewards import AnswerReward, FormatReward
from ..rollout.markers import ThinkingMarkers, render_prompt
from .batch_sizes import BatchArithmetic, most_tokens
from .finding import ERROR, OK, WARNING, Finding
from .memory import Launch, memory_finding
from .start_checks import length_findings, reward_findings, sampled_rows, splice_findings, template_findings, text_of
from .unused_settings import unused_settings

logger = get_logger(__name__)


class ReadyTrainer(Protocol):
    """What the checks read off a [`BRPOTrainer`]."""

    args: BRPOConfig
    model: PreTrainedModel
    markers: ThinkingMarkers
    accelerator: Accelerator
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    reward_funcs: list[Any]
    is_fsdp_enabled: bool


class StartReport(TrainerCallback):
    """
    Print what the run is going to be, and check it, when training begins. See [`report_start`].

    Args:
        trainer ([`BRPOTrainer`]):
            The trainer.
        prompt_length (`int`):
            Tokens of the longest prompt.
    """

    def __init__(self, trainer: ReadyTrainer, prompt_length: int) -> None:
        self._trainer, self._prompt_length = trainer, prompt_length

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report from the main process."""
        if state.is_world_process_zero:
            report_start(self._trainer, self._prompt_length)


def report_start(trainer: ReadyTrainer, prompt_length: int) -> None:
    """
    The checks of `trl-anytime doctor` that are left once a trainer has been built, in seconds. For the main process.

    Args:
        trainer ([`BRPOTrainer`]):
            The trainer, ready to train.
        prompt_length (`int`):
            Tokens of the longest prompt.

    Raises:
        `ValueError`: If the run would fail.
    """
    args, data, markers = trainer.args, trainer.train_dataset, trainer.markers
    rows = [next(iter(data))] if isinstance(data, IterableDataset) else sampled_rows(data)
    num_prompts = None if isinstance(data, IterableDataset) else len(data)
    batch = BatchArithmetic.from_settings(
        args, num_prompts, prompt_length + most_tokens(args, markers.max_bridge_length)[0]
    )
    sets = _evaluated(trainer.eval_dataset)
    gold_rows = [*rows, *(row for part in sets.values() for row in sampled_rows(part))]
    if not isinstance(data, IterableDataset):
        sets = {"train_dataset": data, **sets}
    prompt, tokenizer = rows[0]["prompt"], cast(PreTrainedTokenizerBase, trainer.processing_class)
    rendered, generation_prompt = render_prompt(tokenizer, prompt, trainer.chat_template_kwargs)
    in_boxes = any(isinstance(func, AnswerReward | FormatReward) for func in trainer.reward_funcs)
    findings = [
        *batch.findings(),
        *unused_settings(args, has_eval_data=trainer.eval_dataset is not None),
        *template_findings(tokenizer, rendered, generation_prompt, args, markers),
        *splice_findings(tokenizer, rendered, text_of(prompt), markers, trainer.eos_token_ids, in_boxes),
        *reward_findings(args, trainer.reward_funcs, gold_rows, sets),
        *length_findings(args, trainer.reward_funcs, sets, tokenizer),
        *(_memory(trainer, prompt_length) if trainer.accelerator.device.type == "cuda" else ()),
    ]
    print(batch.table(), flush=True)
    for finding in findings:
        if finding.level == WARNING:
            logger.warning(str(finding))
        elif finding.level == OK:
            logger.info(str(finding))
    errors = [str(finding) for finding in findings if finding.level == ERROR]
    if errors:
        raise ValueError("\n".join(errors))


def _evaluated(eval_dataset: Any) -> dict[str, Dataset]:
    """The sets to evaluate on, by name; streams are left out."""
    sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    return {
        f"eval_dataset[{name!r}]" if name else "eval_dataset": part
        for name, part in sets.items()
        if isinstance(part, Dataset)
    }


def _memory(trainer: ReadyTrainer, prompt_length: int) -> list[Finding]:
    """The estimate for this GPU; none for quantized weights."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    if getattr(model.config, "quantization_config", None) is not None:
        return []
    stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    sharding = "fsdp" if trainer.is_fsdp_enabled else f"zero{stage}" if stage in (2, 3) else "none"
    finding, _ = memory_finding(
        model.config,
        model.dtype,
        model.peft_config["default"] if is_peft_model(model) else None,
        args,
        Launch(args.world_size, sharding),
        prompt_length,
        trainer.markers.max_bridge_length,
        torch.cuda.get_device_properties(trainer.accelerator.device).total_memory,
    )
    return [finding]
