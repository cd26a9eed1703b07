"""
Train a reasoning model by Budget Relative Policy Optimization on problems with verifiable answers.

    accelerate launch -m trl_anytime.train --config 8k_anytime_uniform

On one device, with a local file and LoRA, and all settings on the command line:

    python -m trl_anytime.train \
        --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --dataset_name problems.jsonl \
        --budgets 1000 2000 4000 \
        --use_peft \
        --output_dir outputs/anytime

Every setting of BRPOConfig, which includes TRL's GRPOConfig, and of TRL's ModelConfig is an option. `--help` lists
them. `--resume_from_checkpoint outputs/anytime/checkpoint-100` continues a run. `--push_to_hub` uploads the model with
its card.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from accelerate import PartialState
from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from .brpo_config import BRPOConfig
from .brpo_trainer import BRPOTrainer
from .data.recipe import (
    DataArguments,
    load_prompts,
    model_init_kwargs,
    name_in_card,
    parse_recipe,
    set_chat_template,
    without_shared,
)
from .data.tasks import check_lengths
from .outside.command_line import BAD_INPUT, SERVER_FAILED
from .outside.display import for_terminal
from .outside.model_files import load_files
from .outside.progress import hide_host_bars_in_pipe
from .rewards.task import ENTRY_COLUMN
from .training.checkpoint import UnfitCheckpoint


def make_trainer(data_args: DataArguments, training_args: BRPOConfig, model_args: ModelConfig) -> BRPOTrainer:
    """
    Make the trainer of a recipe, with its problems.

    Args:
        data_args ([`DataArguments`]):
            Settings of the problems.
        training_args ([`BRPOConfig`]):
            Settings of the training.
        model_args (`ModelConfig`):
            Settings of the model and its adapters.

    Raises:
        `ValueError`: If settings, problems or model do not fit. The message says what to do.
        `ConnectionError`: If the Hub does not answer.
    """
    model_name = str(model_args.model_name_or_path)
    tokenizer = load_files(
        "tokenizer",
        model_name,
        AutoTokenizer.from_pretrained,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    set_chat_template(tokenizer, data_args.chat_template_path)
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)

    # The card cannot find these out by itself
    training_args.card_dataset = training_args.card_dataset or name_in_card(str(data_args.dataset_name))
    if data_args.eval_dataset_name:
        training_args.card_eval_dataset = training_args.card_eval_dataset or name_in_card(data_args.eval_dataset_name)
    training_args.card_question = training_args.card_question or f"What is 2 + 2? {data_args.instruction}".strip()

    reward = data_args.reward
    # One process prepares the data, and the others read its cache
    with PartialState().local_main_process_first():
        datasets = [load_prompts(source, data_args, tokenizer, reward) for source in data_args.sources]
    for source, dataset in zip(data_args.sources, datasets, strict=True):
        if ENTRY_COLUMN in dataset.column_names:  # before an evaluation has taken its time
            check_lengths(str(source), dataset["answer"][:], tokenizer, training_args.max_summary_length)
    train_dataset, eval_dataset = (*datasets, None)[:2]
    if eval_dataset is not None:
        train_dataset = without_shared(train_dataset, eval_dataset)

    return BRPOTrainer(
        model_name,
        training_args,
        train_dataset,
        reward_funcs=None if training_args.summary_reward and eval_dataset is None else reward,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def train(trainer: BRPOTrainer) -> None:
    """
    Train, evaluate and save a model.

    Args:
        trainer ([`BRPOTrainer`]):
            What [`make_trainer`] returned.
    """
    training_args, has_evaluation = trainer.args, trainer.eval_dataset is not None
    if has_evaluation and not training_args.resume_from_checkpoint:
        trainer.evaluate()  # the card shows the curve before training
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if has_evaluation:
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.create_model_card()  # again, with this evaluation
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.end_training()


def main(words: Sequence[str] | None = None) -> None:
    """Train by the settings on the command line. What does not fit prints one line and exits with code 2."""
    hide_host_bars_in_pipe()
    try:
        trainer = make_trainer(*parse_recipe(sys.argv[1:] if words is None else words))
    except ConnectionError as error:
        _exit(error, SERVER_FAILED)
    except (ValueError, OSError) as error:
        _exit(error, BAD_INPUT)
    try:
        train(trainer)
    except UnfitCheckpoint as error:
        _exit(error, BAD_INPUT)


def _exit(error: Exception, code: int) -> NoReturn:
    print(for_terminal(f"trl_anytime.train: {error}"), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
