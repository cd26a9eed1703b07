"""What a training recipe is made of: the settings of examples/train.py, and problems that become prompts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, cast

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, TrlParser

from .brpo_config import BRPOConfig
from .evaluation.problems import check_rows, question_text
from .outside.validation import Unfit, read_yaml
from .rewards import MathReward
from .rewards.base import ANSWER_COLUMNS
from .rewards.verifier.gold_answers import column_values, has_column

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
    answer_column: str = field(
        default="answer",
        metadata={
            "help": "Column with the true answer, or a list of them. `a.b` is the key `b` of column `a`; verl's "
            "`reward_model.ground_truth` is found without being named."
        },
    )
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


def is_file(dataset_name: str) -> bool:
    """Whether a dataset is given as a local file."""
    return Path(dataset_name).suffix in FILE_FORMATS


def name_in_card(dataset_name: str) -> str:
    """A dataset's name for the model card: of a local file without its folders, which are nobody's business."""
    return Path(dataset_name).name if is_file(dataset_name) else dataset_name


def read_rows(name: str, config: str | None, split: str, data_args: DataArguments) -> Dataset:
    """
    A dataset as it is stored.

    Raises:
        `ValueError`: If a file is missing or empty, or has no rows, or lacks the columns of problems and answers.
    """
    if is_file(name):
        if not Path(name).is_file() or not Path(name).stat().st_size:
            raise ValueError(f"{name} is {'empty' if Path(name).is_file() else 'not there'}.")
        check_rows(Path(name))
        # A file is one split, which `datasets` calls "train"
        try:
            dataset = load_dataset(FILE_FORMATS[Path(name).suffix], data_files=name, split="train")
        except (DatasetGenerationError, ValueError) as error:  # by version of datasets
            raise ValueError(f"{name} cannot be read: {error.__cause__ or error}") from error
    else:
        dataset = load_dataset(name, config, split=split)
    for column in (data_args.problem_column, _answer_column(dataset, data_args)):
        if not has_column(dataset.column_names, column):
            raise ValueError(
                f"{name} has the columns {dataset.column_names} and no {column!r}: set `--problem_column` and "
                "`--answer_column`."
            )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    return dataset


def _answer_column(dataset: Dataset, data_args: DataArguments) -> str:
    """The column of the answers, or verl's where there is none of the default name."""
    column = data_args.answer_column
    verls = ANSWER_COLUMNS[-1]
    is_verls = column == DataArguments.answer_column and column not in dataset.column_names
    return verls if is_verls and has_column(dataset.column_names, verls) else column


def to_problems(dataset: Dataset, data_args: DataArguments, reward: MathReward) -> Dataset:
    """Rows with the columns `prompt` (conversational) and `answer`, the latter checked by `reward`."""

    columns = [data_args.problem_column, _answer_column(dataset, data_args)]

    def to_prompt(row: dict, index: int) -> dict:
        as_columns = {name: [value] for name, value in row.items()}
        (value,), (answer,) = (column_values(as_columns, column, list(row)) for column in columns)
        problem = question_text(value)
        if problem is None:
            raise ValueError(f"Row {index}: column {columns[0]!r} holds no problem but {value!r}. Drop such rows.")
        content = f"{problem} {data_args.instruction}".strip()
        return {"prompt": [{"role": "user", "content": content}], "answer": answer}

    dataset = dataset.map(to_prompt, with_indices=True, remove_columns=dataset.column_names)
    return reward.check_dataset(dataset)  # now, when an error can name the row as the file counts it


def drop_long_prompts(dataset: Dataset, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose prompts have at most `max_prompt_length` tokens."""
    limit = data_args.max_prompt_length
    if limit is None:
        return dataset

    def is_short(prompt: list[dict]) -> bool:
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) <= limit

    return dataset.filter(is_short, input_columns="prompt")


def load_problems(
    name: str,
    config: str | None,
    split: str,
    data_args: DataArguments,
    tokenizer: PreTrainedTokenizerBase,
    reward: MathReward,
) -> Dataset:
    """A dataset with the columns `prompt` (conversational) and `answer`, the latter checked by `reward`."""
    problems = to_problems(read_rows(name, config, split, data_args), data_args, reward)
    return drop_long_prompts(problems, data_args, tokenizer)


def model_init_kwargs(training_args: BRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }


def read_recipe(
    path: Path, changes: Mapping[str, str], num_processes: int
) -> tuple[DataArguments, BRPOConfig, ModelConfig]:
    """
    The settings in a file, as `examples/train.py --config` takes it.

    Args:
        path (`Path`):
            A YAML file.
        changes (`Mapping[str, str]`):
            Settings that override those of the file, as on the command line.
        num_processes (`int`):
            Ranks that the run is going to have; batches are dealt out to so many.

    Returns:
        `tuple`: the settings of the data, of the training and of the model.

    Raises:
        `UnreadableRecipe`: If there is no such file, or if what is in it is no setting at all.
        `ValueError`: If a setting does not fit the method or another setting; the message says what to set.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UnreadableRecipe(f"{path} cannot be read: {error.strerror}.") from error
    except Unfit as error:
        raise UnreadableRecipe(str(error)) from error
    if not isinstance(content, dict):
        raise UnreadableRecipe(
            f"{path} holds {type(content).__name__} instead of settings: write one `name: value` in each line."
        )

    # BRPOConfig as it comes out on that many ranks
    planned = type(
        "BRPOConfig", (BRPOConfig,), {"__doc__": BRPOConfig.__doc__, "world_size": property(lambda _: num_processes)}
    )
    classes = (DataArguments, planned, ModelConfig)
    known = {f.name for one in classes for f in fields(one) if f.init}
    for name in [*content, *changes]:
        if name not in known and name != "env":
            near = get_close_matches(name, known, n=1)
            meant = f" Did you mean `{near[0]}`?" if near else ""
            raise UnreadableRecipe(f"{path}: there is no setting `{name}`.{meant}")
    for name in ("dataset_name", "model_name_or_path"):
        if name not in content and name not in changes:
            raise UnreadableRecipe(f"{path}: `{name}` is missing.")

    parser = TrlParser(cast(Any, classes))
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print hundreds of options and exit
    words = [word for name, value in changes.items() for word in (f"--{name}", *value.split())]
    return parser.parse_args_and_config(["--config", str(path), *words])  # type: ignore[return-value]


class UnreadableRecipe(ValueError):
    """A file of settings that says nothing a check could look at."""


def _refuse(message: str) -> NoReturn:
    raise UnreadableRecipe(f"{message[0].upper()}{message[1:]}.")
