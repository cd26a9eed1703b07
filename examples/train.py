"""
Train a reasoning model by Budget Relative Policy Optimization on problems with verifiable answers.

    accelerate launch examples/train.py --config examples/configs/8k_anytime_uniform.yaml

or on one device, with a local file and LoRA, everything on the command line:

    python examples/train.py \
        --model_name_or_path deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B \
        --dataset_name problems.jsonl \
        --budgets 1000 2000 4000 \
        --use_peft \
        --output_dir outputs/anytime

Every setting of BRPOConfig (and so of TRL's GRPOConfig) and of TRL's ModelConfig is an option; `--help` lists them.
`--resume_from_checkpoint outputs/anytime/checkpoint-100` goes on, `--push_to_hub` uploads the model with its card.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.rewards import MathReward

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class DataArguments:
    """Where the problems come from, and how they become prompts."""

    dataset_name: str = field(metadata={"help": "Dataset on the Hub, or path of a local JSONL, Parquet or CSV file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub dataset to train on."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset to evaluate on, given as `dataset_name` is. None: no evaluation."}
    )
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of a Hub dataset to evaluate on."})
    problem_column: str = field(default="problem", metadata={"help": "Column with the problem's text."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the true answer, or a list of them."})
    on_bad_answer: str = field(
        default="raise",
        metadata={"help": "What to do about problems without a usable answer.", "choices": ["raise", "skip"]},
    )
    instruction: str = field(
        default=r"Let's think step by step and output the final answer within \boxed{}.",
        metadata={"help": "Follows the problem in the prompt; the default is the paper's."},
    )
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Problems with longer prompts, in tokens, are left out."}
    )


def load_problems(
    name: str,
    config: str | None,
    split: str,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    reward: MathReward,
) -> Dataset:
    """A dataset with the columns `prompt` (conversational) and `answer`, the latter checked by `reward`."""
    if Path(name).suffix in FILE_FORMATS:
        # A file is one split, which `datasets` calls "train"
        dataset = load_dataset(FILE_FORMATS[Path(name).suffix], data_files=name, split="train")
    else:
        dataset = load_dataset(name, config, split=split)
    for column in (data_args.problem_column, data_args.answer_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has the columns {dataset.column_names} and no {column!r}: set `--problem_column` and "
                "`--answer_column`."
            )

    def to_prompt(problem: str, answer: object) -> dict:
        content = f"{problem} {data_args.instruction}".strip()
        return {"prompt": [{"role": "user", "content": content}], "answer": answer}

    def is_short(prompt: list[dict]) -> bool:
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) <= limit

    columns = [data_args.problem_column, data_args.answer_column]
    dataset = dataset.map(to_prompt, input_columns=columns, remove_columns=dataset.column_names)
    dataset = reward.check_dataset(dataset)  # now, when an error can name the row as the file counts it
    if (limit := data_args.max_prompt_length) is not None:
        dataset = dataset.filter(is_short, input_columns="prompt")
    return dataset


def _name_in_card(dataset_name: str) -> str:
    """Without the folders of a local file, which are nobody's business."""
    return Path(dataset_name).name if Path(dataset_name).suffix in FILE_FORMATS else dataset_name


def main(data_args: DataArguments, training_args: BRPOConfig, model_args: ModelConfig) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        trust_remote_code=training_args.trust_remote_code,
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }

    # What the card cannot find out
    training_args.card_dataset = training_args.card_dataset or _name_in_card(data_args.dataset_name)
    if data_args.eval_dataset_name:
        training_args.card_eval_dataset = training_args.card_eval_dataset or _name_in_card(data_args.eval_dataset_name)
    training_args.card_question = training_args.card_question or f"What is 2 + 2? {data_args.instruction}".strip()

    reward = MathReward(on_bad_gold=data_args.on_bad_answer)
    shared = {"data_args": data_args, "tokenizer": tokenizer, "reward": reward}
    # One process prepares the data, the others read its cache
    with PartialState().local_main_process_first():
        train_dataset = load_problems(
            data_args.dataset_name, data_args.dataset_config, data_args.dataset_train_split, **shared
        )
        eval_dataset = None
        if data_args.eval_dataset_name:
            eval_dataset = load_problems(data_args.eval_dataset_name, None, data_args.eval_dataset_split, **shared)

    trainer = BRPOTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset,
        reward_funcs=reward,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    if eval_dataset is not None and not training_args.resume_from_checkpoint:
        trainer.evaluate()  # for the card: the curve before training
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if eval_dataset is not None:
        trainer.save_metrics("eval", trainer.evaluate())
        trainer.create_model_card()  # once more, with this evaluation
    if training_args.push_to_hub:
        trainer.push_to_hub()
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    parser = TrlParser((DataArguments, BRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
