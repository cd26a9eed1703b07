"""Read a training recipe: its settings, and problems that become prompts."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, TrlParser

from ..brpo_config import BRPOConfig
from ..outside.display import did_you_mean
from ..outside.validation import MEBIBYTE, Unfit, read_text, read_yaml
from ..rewards import AnswerReward, MathReward, TaskReward
from ..rewards.task import ENTRY_COLUMN
from ..rewards.tasks.source import PREFIX, is_task
from ..rewards.verifier.gold_answers import check_on_bad_gold, column_values
from .problems import ProblemRows, find_benchmark, is_file, problem_text, read_rows


@dataclass
class DataArguments(ScriptArguments):
    """Where the problems come from, and how they become prompts: TRL's arguments of scripts, and ours."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Problems to train on: a data set of the Hub (owner/name, or owner/name:config), a benchmark such "
            "as math500, a task of reasoning-gym (reasoning_gym:chain_sum?max_terms=4&size=500&seed=0), or a JSON, "
            "JSONL, Parquet or CSV file."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set on the Hub to train on."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of a Hub data set to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split of a Hub data set to evaluate on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Not supported: all gold answers are read before training."}
    )
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "Not supported."})
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Problems to evaluate on, given as `dataset_name` is. None: no evaluation."}
    )
    problem_column: str | None = field(
        default=None,
        metadata={"help": "Column with the problem's text. Defaults to `problem`, `question` or `prompt`."},
    )
    answer_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the gold answer, or a list of them. `a.b` is the key `b` of column `a`. Defaults to "
            "`answer`, `solution`, verl's `reward_model.ground_truth` or `final_answer`."
        },
    )
    on_bad_gold: str = field(
        default="raise",
        metadata={"help": "What to do about problems without a usable gold answer.", "choices": ["raise", "skip"]},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message before each problem. None: what the chat template writes."}
    )
    instruction: str = field(
        default=r"Let's think step by step and output the final answer within \boxed{}.",
        metadata={"help": "Follows the problem in the prompt; the default is the paper's."},
    )
    max_prompt_length: int | None = field(
        default=1024, metadata={"help": "Problems with longer prompts, in tokens, are left out."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template instead of the model's own: a Jinja file, or `chatml_think`, which comes with this "
            "package and opens <think> for ChatML models. It is saved with the model."
        },
    )

    def __post_init__(self) -> None:
        if self.dataset_name is None:
            raise ValueError("`dataset_name` is missing. Set it to a file, or to a data set of the Hub.")
        check_on_bad_gold(self.on_bad_gold, "`on_bad_gold`")
        if self.dataset_streaming:
            raise ValueError(
                "`dataset_streaming` is not supported, because all gold answers are read before training. Remove it."
            )
        if self.ignore_bias_buffers:
            raise ValueError("`ignore_bias_buffers` is not supported. Remove it.")
        if self.eval_dataset_name and is_task(self.eval_dataset_name) != is_task(self.dataset_name):
            raise ValueError(
                "Only one of `dataset_name` and `eval_dataset_name` is a task of reasoning-gym. Their rewards differ: "
                f"give two tasks ({PREFIX}TASK?seed=1), or none."
            )

    @property
    def reward(self) -> AnswerReward:
        """The reward that fits the problems."""
        assert self.dataset_name is not None
        reward = TaskReward if is_task(self.dataset_name) else MathReward
        return reward(on_bad_gold=self.on_bad_gold)

    @property
    def sources(self) -> "list[Source]":
        """Where the training problems are, and the problems to evaluate on if there are any."""
        assert self.dataset_name is not None
        sources = [Source(self.dataset_name, self.dataset_config, self.dataset_train_split)]
        if self.eval_dataset_name:
            sources.append(Source(self.eval_dataset_name, None, self.dataset_test_split))
        # A benchmark has a split of its own, and a task has none
        return [
            replace(source, split=None)
            if (find_benchmark(source.name) or is_task(source.name)) and source.split == default
            else source
            for source, default in zip(
                sources, (DataArguments.dataset_train_split, DataArguments.dataset_test_split), strict=False
            )
        ]


@dataclass(frozen=True)
class Source:
    """
    Where problems are; see [`~trl_anytime.data.problems.read_rows`].

    Args:
        name (`str`):
            A benchmark, a task of reasoning-gym, a file or a data set of the Hub.
        config, split (`str`, *optional*):
            Configuration and split of a data set of the Hub.
    """

    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        return self.name if is_file(self.name) or self.split is None else f"{self.name} ({self.split})"

    def read(self, data_args: DataArguments) -> ProblemRows:
        """Read the rows as they are stored."""
        return read_rows(self.name, self.config, self.split, data_args.problem_column, data_args.answer_column)


def name_in_card(dataset_name: str) -> str:
    """A dataset's name for the model card: of a local file without its folders, which are nobody's business."""
    return Path(dataset_name).name if is_file(dataset_name) else dataset_name


def to_prompts(problems: ProblemRows, data_args: DataArguments, reward: AnswerReward) -> Dataset:
    """
    Make prompts of problems.

    Args:
        problems ([`ProblemRows`]):
            The rows.
        data_args ([`DataArguments`]):
            System prompt and instruction.
        reward ([`AnswerReward`]):
            Checks the gold answers, and says what becomes of those that cannot be used.

    Returns:
        `Dataset`: rows with the columns `prompt`, a conversation, and `answer`; of a task also `entry`.

    Raises:
        `ValueError`: If a row has no problem, or a gold answer cannot be used.
    """
    problems.check_problems()
    # Before anything is renamed, so that an error names row and column as the data has them
    gold_column = ENTRY_COLUMN if problems.has_entries else problems.answer_column
    problems = replace(problems, rows=replace(reward, answer_columns=(gold_column,)).check_dataset(problems.rows))
    system = [] if data_args.system_prompt is None else [{"role": "system", "content": data_args.system_prompt}]

    columns = (problems.problem_column, problems.answer_column)

    def to_prompt(row: dict) -> dict:
        as_columns = {name: [value] for name, value in row.items()}
        (problem,), (answer,) = (column_values(as_columns, column, list(row)) for column in columns)
        content = f"{problem_text(problem)} {data_args.instruction}".strip()
        return {"prompt": [*system, {"role": "user", "content": content}], "answer": answer}

    kept = [ENTRY_COLUMN] if problems.has_entries else []
    return problems.rows.map(
        to_prompt, remove_columns=[name for name in problems.rows.column_names if name not in kept]
    )


def without_shared(train_dataset: Dataset, eval_dataset: Dataset) -> Dataset:
    """
    Leave the problems of a task out of training that are evaluated, too: by chance, different seeds may make the same.

    Args:
        train_dataset, eval_dataset (`Dataset`):
            Rows of [`to_prompts`]. Those of other data than tasks are returned as they are.

    Raises:
        `ValueError`: If nothing is left.
    """
    if ENTRY_COLUMN not in train_dataset.column_names:
        return train_dataset
    evaluated = {prompt[-1]["content"] for prompt in eval_dataset["prompt"]}
    kept = [i for i, prompt in enumerate(train_dataset["prompt"]) if prompt[-1]["content"] not in evaluated]
    if not kept:
        raise ValueError(
            "Every problem of `dataset_name` is evaluated, too. Give `eval_dataset_name` another `seed`, or the task "
            "settings with more problems."
        )
    if shared := len(train_dataset) - len(kept):
        warnings.warn(
            f"Left out {shared:,} of {len(train_dataset):,} problems to train on, which are evaluated.", stacklevel=2
        )
        return train_dataset.select(kept)
    return train_dataset


def drop_long_prompts(dataset: Dataset, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The rows whose prompts have at most `max_prompt_length` tokens."""
    limit = data_args.max_prompt_length
    if limit is None:
        return dataset

    def is_short(prompt: list[dict]) -> bool:
        return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) <= limit

    return dataset.filter(is_short, input_columns="prompt")


def load_prompts(
    source: Source, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, reward: AnswerReward
) -> Dataset:
    """Read a data set; returns the rows of [`to_prompts`] without those that are too long."""
    return drop_long_prompts(to_prompts(source.read(data_args), data_args, reward), data_args, tokenizer)


def model_init_kwargs(training_args: BRPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """How the model is loaded."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **cast(dict[str, Any], training_args.model_init_kwargs or {}),
    }


def packaged_file(folder: str, name: str | Path) -> Path:
    """
    Return a file that is given by its path, or by the name of one that comes with this package.

    Args:
        folder (`str`):
            Folder of the package: `"recipes"`, `"accelerate_configs"` or `"chat_templates"`.
        name (`str` or `Path`):
            A path, or the name of a file of that folder, without its ending.

    Raises:
        `ValueError`: If there is neither; the message names the files of the folder.
    """
    files = {path.stem: path for path in sorted((Path(__file__).parents[1] / folder).iterdir())}
    if str(name) in files:
        return files[str(name)]
    if not Path(name).exists():
        raise ValueError(
            f"There is no file {name}.{did_you_mean(str(name), [*files])} Give the path of a file, or one of these "
            f"names: {', '.join(files)}."
        )
    return Path(name)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> None:
    """
    Give a tokenizer another chat template.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model, which is changed.
        path (`str`, *optional*):
            A Jinja file, or the name of one of this package's chat templates. `None` leaves the model's own.

    Raises:
        `ValueError`: If there is no such file, or a folder in its place.
    """
    if path is None:
        return
    file = packaged_file("chat_templates", path)
    try:
        tokenizer.chat_template = read_text(file, MEBIBYTE)
    except ValueError as error:
        raise ValueError(
            f"`chat_template_path` must be a Jinja file: {error} To take the template of another model, with its "
            "tokens, use TRL's `clone_chat_template` before."
        ) from error


def parse_recipe(words: Sequence[str]) -> tuple[DataArguments, BRPOConfig, ModelConfig]:
    """
    Parse the command line of a training.

    Args:
        words (`Sequence[str]`):
            `--name value` for each setting; `--config` takes a YAML file, or the name of a recipe of this package.

    Returns:
        `tuple`: the settings of the data, of the training and of the model.

    Raises:
        `ValueError`: If there is no such file or setting, or a setting does not fit; the message says what to set.
    """
    recipe, others = _recipe_and_others(words)
    if recipe:
        _read_content(Path(recipe[1]))
    _, unknown = recipe_parser().parse_known_args(others)
    if unknown:
        _check_names([unknown[0].partition("=")[0].lstrip("-").replace("-", "_")], "command line")
        raise ValueError(f"{unknown[0]!r} does not belong to a setting. Write `--name value` for each.")
    settings = recipe_parser().parse_args_and_config([*recipe, *others])
    if settings[2].model_name_or_path is None:
        raise ValueError("`model_name_or_path` is missing. Set it to a folder, or to a model of the Hub.")
    return settings  # type: ignore[return-value]


def _recipe_and_others(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into `--config` with the path of the recipe, if it is there, and the other words."""
    others = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in others:
        return [], others
    place = others.index("--config")
    if place + 1 == len(others):
        raise ValueError("--config is not followed by anything. Give a file, or the name of a recipe.")
    path = packaged_file("recipes", others[place + 1])
    return ["--config", str(path)], others[:place] + others[place + 2 :]


def launch_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """
    Sort the words of `trl-anytime train`.

    Args:
        words (`Sequence[str]`):
            Settings, and options of `accelerate launch`. `--accelerate_config` is its `--config_file`, and takes the
            name of a file of this package, too.

    Returns:
        `tuple[list[str], list[str]]`: the words for `accelerate launch`, and those for the training.

    Raises:
        `ValueError`: If there is no such recipe or file.
    """
    recipe, others = _recipe_and_others(words)
    _, launch = recipe_parser().parse_known_args(others)
    rest, settings = list(launch), []
    for word in others:
        if rest and word == rest[0]:
            rest.pop(0)
        else:
            settings.append(word)
    for spelling in ("--accelerate_config", "--accelerate-config"):
        if spelling in launch[:-1]:
            place = launch.index(spelling)
            launch[place : place + 2] = ["--config_file", str(packaged_file("accelerate_configs", launch[place + 1]))]
    return launch, [*recipe, *settings]


def recipe_parser() -> TrlParser:
    """Return a parser of all settings. `--config` changes a parser's defaults for good, so each use needs its own."""
    return TrlParser(cast(Any, (DataArguments, BRPOConfig, ModelConfig)))


def read_recipe(
    path: Path, changes: Mapping[str, str], num_processes: int
) -> tuple[DataArguments, BRPOConfig, ModelConfig]:
    """
    The settings in a file, as `trl-anytime train --config` takes it.

    Args:
        path (`Path`):
            A YAML file, or the name of one of this package's recipes.
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
        path = packaged_file("recipes", path)
    except ValueError as error:
        raise UnreadableRecipe(str(error)) from error
    content = _read_content(path)
    _check_names(changes, str(path))

    # BRPOConfig as it comes out on that many ranks
    planned = type(
        "BRPOConfig", (BRPOConfig,), {"__doc__": BRPOConfig.__doc__, "world_size": property(lambda _: num_processes)}
    )
    classes = (DataArguments, planned, ModelConfig)
    for name in ("dataset_name", "model_name_or_path"):
        if name not in content and name not in changes:
            raise UnreadableRecipe(f"{path}: `{name}` is missing.")

    parser = TrlParser(cast(Any, classes))
    parser.error = _refuse  # type: ignore[method-assign]  # argparse would print hundreds of options and exit
    words = [word for name, value in changes.items() for word in (f"--{name}", *value.split())]
    return parser.parse_args_and_config(["--config", str(path), *words])  # type: ignore[return-value]


def _read_content(path: Path) -> dict[str, Any]:
    """Return the settings in a file as it has them, with names that all exist."""
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
    _check_names([name for name in content if name != "env"], str(path))
    return content


def _check_names(names: Iterable[str], where: str) -> None:
    known = {f.name for one in (DataArguments, BRPOConfig, ModelConfig) for f in fields(one) if f.init}
    for name in names:
        if name not in known:
            raise UnreadableRecipe(
                f"{where}: there is no setting `{name}`.{did_you_mean(str(name), sorted(known), most=1)}"
            )


class UnreadableRecipe(ValueError):
    """A file of settings that says nothing a check could look at."""


def _refuse(message: str) -> NoReturn:
    raise UnreadableRecipe(f"{message[0].upper()}{message[1:]}.")
