"""Encode texts and prompts as token ids. Where a tokenizer or template fails, the error says what to do."""

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .markers import render_prompt


def encode(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    """
    Return the token ids of a text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        text (`str`):
            The text.
        add_special_tokens (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer adds the special tokens that surround every text.

    Raises:
        `ValueError`: If the tokenizer cannot encode a part of the text and has no token for unknown text.
    """
    try:
        token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:  # tokenizers written in Rust raise nothing more specific
        raise ValueError(
            f"The tokenizer cannot encode {_excerpt(text)}: {error}. Use only words that are in its vocabulary."
        ) from error
    if not token_ids:
        raise ValueError(
            f"The tokenizer makes no token of {_excerpt(text)}. Use only words that are in its vocabulary."
        )
    return token_ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> list[int]:
    """
    Return the token ids of a prompt, rendered as in training.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            Text, which is used unchanged, or a conversation.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.

    Raises:
        `ValueError`: If the chat template fails or is missing for a conversation, or if the tokenizer cannot encode
        the result.
    """
    try:
        text, _ = render_prompt(tokenizer, prompt, chat_template_kwargs)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"The chat template fails on {_excerpt(str(prompt))}: {error!r}. Correct the prompt, the template or "
            "`chat_template_kwargs`."
        ) from error
    # A template has already written its special tokens
    return encode(tokenizer, text, add_special_tokens=isinstance(prompt, str))


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}[…]"
