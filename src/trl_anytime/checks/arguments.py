"""What a trainer is made with: arguments, columns of the data, gold answers."""

from typing import Any

from trl import GRPOConfig

from ..brpo_config import BRPOConfig
from ..rewards import AnswerReward


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
    for column in ("image", "images"):
        if column in (train_dataset.column_names or ()):
            raise ValueError(
                f"The dataset has a column '{column}': BRPO trains on text. Drop it with `remove_columns`."
            )
    if "prompt" not in (train_dataset.column_names or ("prompt",)):
        raise ValueError(f"The dataset needs a column 'prompt', it has {train_dataset.column_names}.")


def check_answers(reward: AnswerReward, dataset: Any) -> Any:
    """A data set, or several by name, without bad golds, see [`~trl_anytime.rewards.AnswerReward.check_dataset`]."""
    if isinstance(dataset, dict):
        return type(dataset)({name: reward.check_dataset(part) for name, part in dataset.items()})
    return None if dataset is None else reward.check_dataset(dataset)
