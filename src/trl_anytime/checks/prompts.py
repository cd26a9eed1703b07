"""Markers and lengths that the trainer reads off its prompts before it is built."""

from collections.abc import Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..brpo_config import BRPOConfig
from ..rollout.markers import ThinkingMarkers, find_markers
from ..rollout.templates import render_prompt
from .finding import ERROR
from .start_checks import prompt_findings

logger = get_logger(__name__)


def first_prompt(dataset: Any) -> Any:
    """
    Return the first prompt of a dataset. A stream is opened for it.

    Raises:
        `ValueError`: If the dataset is empty.
    """
    example = next(iter(dataset), None)
    if example is None:
        raise ValueError("`train_dataset` is empty. Pass at least one row.")
    return example["prompt"]


def shared_system_prompt(first: Any, dataset: Any) -> str | None:
    """
    Return the system message that all prompts of a dataset begin with; of a stream, that of the first.

    Args:
        first (`str` or `list[dict]`):
            The first prompt.
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data.

    Returns:
        `str` or `None`: `None` if there is none, or not the same everywhere.
    """
    message = first[0] if isinstance(first, list) else {}
    content = message.get("content")
    if message.get("role") != "system" or not isinstance(content, str):
        return None
    prompts = () if isinstance(dataset, IterableDataset) else dataset["prompt"]
    return content if all(prompt[0] == message for prompt in prompts) else None


def checked_markers(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    datasets: Mapping[str, Any],
    args: BRPOConfig,
    chat_template_kwargs: dict[str, Any],
) -> ThinkingMarkers:
    """
    Find markers and bridges from the first prompt.

    Warns if the template treats other prompts differently.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            The first prompt.
        datasets (`Mapping[str, Any]`):
            Training and evaluation data, by the name of the argument.
        args ([`BRPOConfig`]):
            Settings of the markers.
        chat_template_kwargs (`dict[str, Any]`):
            Arguments of the chat template.

    Raises:
        `ValueError`: If there are no markers, or a prompt has closed the thinking.
    """
    rendered, generation_prompt = render_prompt(tokenizer, prompt, chat_template_kwargs)
    markers = find_markers(
        tokenizer,
        rendered,
        generation_prompt,
        think_end=args.think_end,
        truncation_bridge=args.truncation_bridge,
        answer_bridge=args.answer_bridge,
        conversation=prompt,
        chat_template_kwargs=chat_template_kwargs,
    )
    for finding in prompt_findings(tokenizer, datasets, chat_template_kwargs, markers):
        if finding.level == ERROR:
            raise ValueError(f"{finding.message} {finding.fix}")
        logger.warning(str(finding))
    return markers


def shortest_and_longest(dataset: Any, count: int = 16) -> tuple[list[Any], list[Any]]:
    """
    Return the prompts with the shortest and with the longest texts.

    For a stream, both are its first prompt.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The data.
        count (`int`, *optional*, defaults to `16`):
            Prompts of each kind. There are several, because text length predicts token count only roughly.
    """
    if isinstance(dataset, IterableDataset):
        prompts = [example["prompt"] for example in dataset.take(1)]
        return prompts, prompts
    by_length = sorted(dataset["prompt"], key=lambda prompt: len(str(prompt)))
    return by_length[:count], by_length[-count:]
