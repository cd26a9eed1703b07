"""
Search for a text in tokens, although tokenizers write the text in more than one way.

A marker that is not a token of its own melts into its neighbours. With the tokenizers of GPT-4 or Olmo, `.</think>`
becomes `.</`, `think`, `>`. Before a blank line, the last token of `</think>` also holds the line breaks. So the
search looks for the marker's characters, in the bytes that each token adds to the text.
"""

import re
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

# The decoding of a token that holds a part of a character
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BYTES_OF_CHARACTERS = {character: byte for byte, character in bytes_to_unicode().items()}


class TokenBytes:
    """
    Callable that returns the bytes that a token adds to a text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        anchor (`Sequence[int]`):
            Tokens of any text. Each token is decoded after them, because many tokenizers drop the space before the
            first word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, anchor: Sequence[int]):
        self._tokenizer = tokenizer
        self._anchor = list(anchor)
        self._anchor_text = self._decode(self._anchor)
        self._added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}

    def __call__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        text = self._decode([*self._anchor, token_id])
        text = text[len(self._anchor_text) :] if text.startswith(self._anchor_text) else self._decode([token_id])
        if _INCOMPLETE in text:
            piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
            if byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):  # SentencePiece
                return bytes([int(byte[1], 16)])
            if all(character in _BYTES_OF_CHARACTERS for character in piece):  # byte-level BPE
                return bytes(_BYTES_OF_CHARACTERS[character] for character in piece)
        return text.encode()

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))


class TokenSearch:
    """
    Search for a marker that is one token. It has no state.

    Args:
        token_id (`int`):
            The token.
    """

    most_tokens = 1

    def __init__(self, token_id: int):
        self._token_id = token_id

    def first(self, token_ids: Sequence[int], state: int = 0) -> tuple[int | None, int]:
        """Find the first occurrence, see [`TextSearch.first`]."""
        return (token_ids.index(self._token_id) + 1 if self._token_id in token_ids else None), state

    def count(self, token_ids: Sequence[int]) -> int:
        """Count the occurrences."""
        return token_ids.count(self._token_id)


class TextSearch:
    """
    Search for a text in the bytes of tokens. It looks at each token once.

    This is the automaton of Knuth, Morris and Pratt. Its state is the number of bytes of the text that the tokens so
    far end in. Transitions are kept, so each token costs one look-up in a dictionary.

    Args:
        text (`str`):
            The text.
        token_bytes (`Callable[[int], bytes]`):
            The bytes of a token, see [`TokenBytes`].
    """

    def __init__(self, text: str, token_bytes: Callable[[int], bytes]):
        self._text, self._token_bytes = text.encode(), token_bytes
        self._transitions: list[dict[int, tuple[int, int]]] = [{} for _ in self._text]
        self._idle: set[int] = set()  # most tokens, which contain nothing of the text

    @property
    def most_tokens(self) -> int:
        """Return the most tokens that the text may be spread over."""
        return len(self._text)

    def first(self, token_ids: Sequence[int], state: int = 0) -> tuple[int | None, int]:
        """
        Find the first occurrence.

        Args:
            token_ids (`Sequence[int]`):
                Tokens to search.
            state (`int`, *optional*, defaults to `0`):
                State after the tokens before them.

        Returns:
            `tuple`: the index just behind the token that completes the text, or `None`, and the state after the
            tokens.
        """
        idle = self._idle
        for i, token in enumerate(token_ids):
            if not state and token in idle:
                continue
            state, found = self._transitions[state].get(token) or self._transition(state, token)
            if found:
                return i + 1, state
        return None, state

    def count(self, token_ids: Sequence[int]) -> int:
        """Count the occurrences that do not overlap."""
        state, total = 0, 0
        for token in token_ids:
            state, found = self._transitions[state].get(token) or self._transition(state, token)
            total += found
        return total

    def _transition(self, state: int, token: int) -> tuple[int, int]:
        """Return the state after a token, and how often this token completes the text."""
        text = self._text
        *occurrences, rest = (text[:state] + self._token_bytes(token)).split(text)
        longest = min(len(rest), len(text) - 1)
        behind = next(length for length in range(longest, -1, -1) if rest.endswith(text[:length]))
        self._transitions[state][token] = behind, len(occurrences)
        if not state and not behind and not occurrences:
            self._idle.add(token)
        return behind, len(occurrences)
