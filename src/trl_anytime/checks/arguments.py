"""What a trainer is made with: arguments, columns of the data, gold answers, parameters, tokens."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
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


def check_arguments(args: Any, train_dataset: Any, kwargs: dict[str, Any]) -> None:
    """
    Refuse what the trainer cannot work with, by name.

    Raises:
        `ValueError`: With what to pass or to remove instead.
    """
    if not isinstance(args, BRPOConfig):
        if isinstance(args, GRPOConfig):
            raise ValueError("`args` is a `GRPOConfig`: use `trl_anytime.BRPOConfig`, which takes the same settings.")
        raise ValueError(
            f"The second argument is `args`, a `BRPOConfig`, got {type(args).__name__}. Reward functions are passed "
            "by keyword: `BRPOTrainer(model, args, train_dataset, reward_funcs=...)`."
        )
    for name in ("tools", "rollout_func", "environment_factory"):
        if kwargs.get(name):
            raise ValueError(f"`{name}` is not supported: BRPO has its own rollout, a single thinking that is cut.")
    if args.card_eval_dataset is not None and isinstance(kwargs.get("eval_dataset"), dict):
        raise ValueError(
            "`card_eval_dataset` names one set, and `eval_dataset` holds several, by names of their own: remove it."
        )
    if getattr(kwargs.get("peft_config"), "is_prompt_learning", False):
        raise ValueError(
            "Prompt learning (prefix, prompt and p-tuning) is not supported: its virtual tokens are not part of the "
            "packed rows. Use LoRA."
        )
    if train_dataset is None:
        raise ValueError("`train_dataset` is required.")
    check_dataset("train_dataset", train_dataset)
    eval_dataset = kwargs.get("eval_dataset")
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            check_dataset(f"eval_dataset[{name!r}]", dataset)
    elif eval_dataset is not None:
        check_dataset("eval_dataset", eval_dataset)


def check_dataset(name: str, dataset: Any) -> None:
    """
    Refuse a data set that training or evaluation would fail on, hours later.

    Args:
        name (`str`):
            What it is called in messages.
        dataset:
            The data. Of a stream only the columns are looked at.

    Raises:
        `ValueError`: With the column or row, and what to do.
    """
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(
            f"`{name}` is a {type(dataset).__name__}: pass a `datasets.Dataset`, which `Dataset.from_list` makes of a "
            "list of rows, or an `IterableDataset`."
        )
    columns = dataset.column_names
    if columns is None:  # a stream that has not been opened
        columns = list(next(iter(dataset), {"prompt": None}))  # an empty one is found later
    for column in ("image", "images"):
        if column in columns:
            raise ValueError(f"`{name}` has a column '{column}': BRPO trains on text. Drop it with `remove_columns`.")
    if "prompt" not in columns:
        raise ValueError(f"`{name}` needs a column 'prompt', it has {columns}.")
    taken = sorted(set(columns) & set(_REWARD_ARGUMENTS))
    if taken:
        raise ValueError(
            f"`{name}` has columns named {taken}: reward functions get arguments of these names, which are not the "
            "data's. Rename them with `rename_column`, or drop them."
        )
    if isinstance(dataset, Dataset):
        if not len(dataset):
            raise ValueError(f"`{name}` is empty.")
        for row, prompt in enumerate(dataset["prompt"]):
            if not (prompt.strip() if isinstance(prompt, str) else prompt and is_conversational({"prompt": prompt})):
                raise ValueError(
                    f"Row {row} of `{name}` has the prompt {prompt!r}: it must be a text or a conversation, and not "
                    "empty. Mend or drop such rows."
                )


def check_trainable(model: PreTrainedModel) -> None:
    """
    Refuse a model of which nothing would be trained.

    Raises:
        `ValueError`: With how to make its parameters trainable.
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
    raise ValueError("No parameter of the model is trainable. Set `requires_grad` on those that should be.")


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
            What is spliced in.
        prompt_ids (`Sequence[Sequence[int]]`):
            Some prompts.

    Raises:
        `ValueError`: Names what does not fit.
    """
    if None in eos_token_ids:
        raise ValueError(
            "The tokenizer has no end-of-sequence token, so that no summary could end. Set "
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
        `ValueError`: Says which of both.
    """
    for ids in prompt_ids:
        if not ids:
            raise ValueError(
                "A prompt has no tokens once it is rendered. Drop empty prompts, or see what the chat template and "
                "the tokenizer make of them."
            )
        _check_embedded(model, ids, "a prompt")


def _check_embedded(model: PreTrainedModel, token_ids: Iterable[Any], name: str) -> None:
    size, largest = model.config.get_text_config().vocab_size, max(token_ids)
    if largest >= size:
        raise ValueError(
            f"The tokenizer does not fit the model: {name} has the token {largest}, and the model has {size} tokens. "
            "Use the model's own tokenizer, or make room with `model.resize_token_embeddings(len(tokenizer))`."
        )


def check_answers(reward: AnswerReward, dataset: Any) -> Any:
    """Leave bad gold answers out of a data set, or of several by name, see [`~trl_anytime.rewards.AnswerReward`]."""
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
