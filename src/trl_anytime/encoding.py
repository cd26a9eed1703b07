"""From texts and prompts to token ids, with an error that a reader can act on where a tokenizer or template fails."""

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
            Whether the tokenizer adds those that stand around every text.

    Raises:
        `ValueError`: If the tokenizer has no token for a part of the text, and none for what is unknown.
    """
    try:
        token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    except Exception as error:  # tokenizers written in Rust raise nothing more special
        raise ValueError(
            f"The tokenizer cannot encode {_excerpt(text)}: {error}. Use only words that it was made for."
        ) from error
    if not token_ids:
        raise ValueError(f"The tokenizer makes no token of {_excerpt(text)}. Use words that it was made for.")
    return token_ids


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Any, chat_template_kwargs: Mapping[str, Any]
) -> list[int]:
    """
    Return the token ids of a prompt, as training renders it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            A text, which is taken as it is, or a conversation.
        chat_template_kwargs (`Mapping[str, Any]`):
            Arguments of the chat template.

    Raises:
        `ValueError`: If the chat template fails, there is none for a conversation, or the tokenizer cannot encode what
            it makes.
    """
    try:
        text, _ = render_prompt(tokenizer, prompt, chat_template_kwargs)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"The chat template fails on {_excerpt(str(prompt))}: {error!r}.") from error
    # A template has written its special tokens itself
    return encode(tokenizer, text, add_special_tokens=isinstance(prompt, str))


def _excerpt(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}[…]"
