"""What the trainer says when training begins: what the run is going to be, and what is odd about it."""

from typing import TYPE_CHECKING, cast

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..markers import render_prompt
from ..rewards import AnswerReward, FormatReward
from .batch_arithmetic import BatchArithmetic, most_tokens
from .finding import ERROR, OK, WARNING, Finding
from .idle_settings import idle_settings
from .memory import Launch, memory_finding
from .start_checks import reward_findings, sampled_rows, splice_findings, template_findings, text_of

if TYPE_CHECKING:
    from ..brpo_trainer import BRPOTrainer

logger = get_logger(__name__)


def report_start(trainer: "BRPOTrainer", prompt_length: int) -> None:
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
    batch = BatchArithmetic.of(args, num_prompts, prompt_length + most_tokens(args, markers.max_bridge_length)[0])
    prompt, tokenizer = rows[0]["prompt"], cast(PreTrainedTokenizerBase, trainer.processing_class)
    rendered, generation_prompt = render_prompt(tokenizer, prompt, trainer.chat_template_kwargs)
    in_boxes = any(isinstance(func, AnswerReward | FormatReward) for func in trainer.reward_funcs)
    findings = [
        *batch.findings(),
        *idle_settings(args, has_eval_data=trainer.eval_dataset is not None),
        *template_findings(tokenizer, rendered, generation_prompt, args, markers),
        *splice_findings(tokenizer, rendered, text_of(prompt), markers, trainer.eos_token_ids, in_boxes),
        *reward_findings(args, trainer.reward_funcs, rows),
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


def _memory(trainer: "BRPOTrainer", prompt_length: int) -> list[Finding]:
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
