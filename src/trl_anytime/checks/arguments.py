"""Checks of what a trainer is made with: arguments, columns of the data, gold answers, parameters, tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig
from trl.data_utils import is_conversational

from ..brpo_config import BRPOConfig
from ..rewards import AnswerReward
from ..rollout.markers import ThinkingMarkers
from ..rollout.types import SUMMARY_FACTS
from ..training.references import encode_reference, reference_texts

logger = get_logger(__name__)

# Arguments of a reward function that are not columns of the data
_REWARD_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    *SUMMARY_FACTS,
)


def check_arguments(args: Any, train_dataset: Any, others: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """
    Refuse arguments that the trainer cannot work with.

    Raises:
        `ValueError`: Names the argument, and what to pass instead.
    """
    if not isinstance(args, BRPOConfig):
        if isinstance(args, GRPOConfig):
            raise ValueError("`args` is a `GRPOConfig`. Use `trl_anytime.BRPOConfig`, which takes the same settings.")
        raise ValueError(
            f"The second argument must be `args`, a `BRPOConfig`, got {type(args).__name__}. Pass reward functions "
            "by keyword: `BRPOTrainer(model, args, train_dataset, reward_funcs=...)`."
        )
    if others:
        raise ValueError(
            f"Only `model`, `args` and `train_dataset` can be given by position, got {len(others)} more. Pass the "
            "others by keyword, such as `reward_funcs=...`."
        )
    for name in ("tools", "rollout_func", "environment_factory"):
        if kwargs.get(name):
            raise ValueError(f"`{name}` is not supported, because BRPO has its own rollout. Remove it.")
    if args.card_eval_dataset is not None and isinstance(kwargs.get("eval_dataset"), dict):
        raise ValueError(
            "`card_eval_dataset` names one evaluation set, but `eval_dataset` has several with their own names. "
            "Remove `card_eval_dataset`."
        )
    if getattr(kwargs.get("peft_config"), "is_prompt_learning", False):
        raise ValueError(
            "Prompt learning (prefix, prompt and p-tuning) is not supported, because packed rows cannot hold its "
            "virtual tokens. Use LoRA in `peft_config`."
        )
    if train_dataset is None:
        raise ValueError("`train_dataset` is missing. Pass a `datasets.Dataset` or an `IterableDataset`.")
    check_dataset("train_dataset", train_dataset)
    eval_dataset = kwargs.get("eval_dataset")
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            check_dataset(f"eval_dataset[{name!r}]", dataset)
    elif eval_dataset is not None:
        check_dataset("eval_dataset", eval_dataset)


def check_dataset(name: str, dataset: Any) -> None:
    """
    Refuse a data set on which training or evaluation would fail hours later.

    Args:
        name (`str`):
            Name of the data set in messages.
        dataset:
            The data. For a stream, only the columns are checked.

    Raises:
        `ValueError`: Names the column or row, and what to do.
    """
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__} with the splits {splits}. Pass one of them, such as "
            f"`dataset[{next(iter(dataset), 'train')!r}]`."
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}. Pass a `datasets.Dataset` (`Dataset.from_list` makes one from "
            "a list of rows), or an `IterableDataset`."
        )
    columns = dataset.column_names
    if columns is None:  # a stream that has not been opened
        columns = list(next(iter(dataset), {"prompt": None}))  # an empty stream is refused later
    for column in ("image", "images"):
        if column in columns:
            raise ValueError(f"`{name}` has a column '{column}', but BRPO needs text. Drop it with `remove_columns`.")
    if "prompt" not in columns:
        raise ValueError(f"`{name}` has no column 'prompt'. It has {columns}. Rename one with `rename_column`.")
    taken = sorted(set(columns) & set(_REWARD_ARGUMENTS))
    if taken:
        raise ValueError(
            f"`{name}` has columns named {taken}, which are names of other arguments of reward functions. Rename "
            "them with `rename_column`, or drop them."
        )
    if isinstance(dataset, Dataset):
        if not len(dataset):
            raise ValueError(f"`{name}` is empty. Pass at least one row.")
        for row, prompt in enumerate(dataset["prompt"]):
            if not (prompt.strip() if isinstance(prompt, str) else prompt and is_conversational({"prompt": prompt})):
                raise ValueError(
                    f"Row {row} of `{name}` has the prompt {prompt!r}. A prompt must be a text or a conversation, "
                    "and not empty. Fix or drop such rows."
                )


def check_trainable(model: PreTrainedModel) -> None:
    """
    Refuse a model without trainable parameters.

    Raises:
        `ValueError`: Says how to make its parameters trainable.
    """
    adapters = set(getattr(model, "peft_config", ()))
    idle = adapters.difference(cast(Any, model).active_adapters) if adapters else adapters
    if any(
        parameter.requires_grad and idle.isdisjoint(name.split(".")) for name, parameter in model.named_parameters()
    ):
        return
    if adapters:
        raise ValueError(
            f"No parameter of the active adapters {sorted(adapters - idle)} is trainable. Load them with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`, or make a trainable one active with `set_adapter`."
        )
    raise ValueError("No parameter of the model is trainable. Set `requires_grad` on those that should be trained.")


def check_tokens(
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    eos_token_ids: Sequence[int | None],
    markers: ThinkingMarkers,
    prompt_ids: Sequence[Sequence[int]],
) -> None:
    """
    Refuse tokens that do not fit the model.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        model ([`~transformers.PreTrainedModel`]):
            The model in training.
        eos_token_ids (`Sequence[int]`):
            Tokens that end a summary.
        markers ([`ThinkingMarkers`]):
            Markers and bridges, which are spliced in.
        prompt_ids (`Sequence[Sequence[int]]`):
            Some prompts.

    Raises:
        `ValueError`: Names the token that does not fit.
    """
    if None in eos_token_ids:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so a summary could not end. Set "
            "`processing_class.eos_token` to the token that ends the model's answers."
        )
    for name, ids in (
        ("the padding token", [tokenizer.pad_token_id]),
        ("the end-of-sequence token", eos_token_ids),
        ("the end of the thinking", markers.think_end_ids),
        ("`truncation_bridge`", markers.truncation_bridge_ids),
        ("`answer_bridge`", markers.answer_bridge_ids),
    ):
        _check_embedded(model, ids, name)
    check_prompt_tokens(model, prompt_ids)


def check_prompt_tokens(model: PreTrainedModel, prompt_ids: Iterable[Sequence[int]]) -> None:
    """
    Refuse prompts without tokens, or with tokens that the model does not have.

    Raises:
        `ValueError`: Says which of the two is wrong.
    """
    for ids in prompt_ids:
        if not ids:
            raise ValueError(
                "A rendered prompt has no tokens. Drop empty prompts, or check what the chat template and the "
                "tokenizer turn them into."
            )
        _check_embedded(model, ids, "a prompt")


def _check_embedded(model: PreTrainedModel, token_ids: Iterable[Any], name: str) -> None:
    size, largest = model.config.get_text_config().vocab_size, max(token_ids)
    if largest >= size:
        raise ValueError(
            f"The tokenizer does not fit the model: {name} has token {largest}, but the model has only {size} tokens. "
            "Use the model's own tokenizer, or add embeddings with `model.resize_token_embeddings(len(tokenizer))`."
        )


def check_answers(reward: AnswerReward, dataset: Any) -> Any:
    """Check the gold answers of a data set or of several, as [`~trl_anytime.rewards.AnswerReward`] does."""
    if isinstance(dataset, dict):
        return type(dataset)({name: reward.check_dataset(part) for name, part in dataset.items()})
    return None if dataset is None else reward.check_dataset(dataset)


def check_reward_funcs(args: BRPOConfig, reward_funcs: Any, eval_dataset: Any) -> None:
    """
    Refuse reward functions that would never be called.

    Raises:
        `ValueError`: If the likelihood is the reward of training and there is nothing to evaluate on.
    """
    if args.summary_reward is not None and reward_funcs is not None and eval_dataset is None:
        raise ValueError(
            "`reward_funcs` would never be called: with `summary_reward` they grade evaluations only. Pass an "
            "`eval_dataset`, or remove them."
        )


def check_references(
    train_dataset: Any, args: BRPOConfig, tokenizer: PreTrainedTokenizerBase, markers: ThinkingMarkers
) -> None:
    """
    Refuse reference answers that cannot be scored, and warn of those that melt into the bridge.

    Args:
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data. Of a stream only the first row is looked at.
        args ([`BRPOConfig`]):
            The settings, with `summary_reward`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        markers ([`ThinkingMarkers`]):
            Its bridges.

    Raises:
        `ValueError`: If an answer is missing, one of several, or longer than `max_summary_length`.
    """
    rows = train_dataset
    if isinstance(rows, IterableDataset):
        rows = {name: [value] for name, value in next(iter(rows)).items()}
    texts = reference_texts(rows, args.reference_template)
    eos_token_id = cast(int, tokenizer.eos_token_id)
    encoded = [encode_reference(text, tokenizer, markers, eos_token_id) for text in texts]
    longest, row = max((len(ids), row) for row, (ids, _) in enumerate(encoded))
    if longest > args.max_summary_length:
        raise ValueError(
            f"The reference answer of row {row} has {longest} tokens, and `max_summary_length` is "
            f"{args.max_summary_length}. Raise it to {longest}, or drop such rows."
        )
    melting = [row for row, (_, melts) in enumerate(encoded) if melts]
    if melting:
        logger.warning(
            f"{len(melting)} of {len(encoded)} reference answers would share a token with the bridge before them. The "
            f"first is in row {melting[0]}: {texts[melting[0]]!r} behind {markers.answer_bridge!r}. The model would "
            "write other tokens than those that are scored. End `answer_bridge` with a line break."
        )
