"""Escape text of models, servers and files for the place where it is shown: terminal, shell, figure, Markdown."""

import html
import json
import re
import shlex
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

# Cc: control characters, which begin a terminal's commands. Cf: characters without a shape, which hide among others or
# change their order. Zl, Zp: line breaks that few programs know. Cs: halves of surrogate pairs, which cannot be
# written.
_UNSEEN = ("Cc", "Cf", "Zl", "Zp", "Cs")
# These two join letters and emoji. Some languages cannot be written without them.
_JOINERS = "\u200c\u200d"
_LONGEST_LABEL = 80
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def for_terminal(text: str, one_line: bool = False) -> str:
    r"""
    Write out the control characters of a text, such as `\u001b` for ESC.

    Args:
        text (`str`):
            Any text.
        one_line (`bool`, *optional*, defaults to `False`):
            Whether to write out line breaks and tabs as well.
    """
    if text.isascii() and text.isprintable():  # most text
        return text
    kept = _JOINERS if one_line else _JOINERS + "\n\t"
    return "".join(
        character if character in kept or unicodedata.category(character) not in _UNSEEN else _written_out(character)
        for character in text.replace("\r\n", "\n")
    )


def _written_out(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"


def for_json(value: Any, indent: int | None = None) -> str:
    """
    Return a value as JSON, with invisible characters written out and all others unchanged.

    Args:
        value (`Any`):
            Text, or lists and dictionaries of text.
        indent (`int`, *optional*):
            Spaces per level of indentation. One line if not set.
    """
    written = json.dumps(value, ensure_ascii=False, indent=indent)
    # JSON needs its own escapes, since those of for_terminal are not JSON beyond 16 bits. They leave DEL to
    # for_terminal.
    return written if for_terminal(written) == written else for_terminal(json.dumps(value, indent=indent))


def for_shell(text: str) -> str:
    r"""
    Return a text as one word of a shell's command line.

    When the line is pasted, control characters would reach the terminal, quoted or not. A text with any is written in
    the form `$'…'`, which bash, zsh and ksh read. Line breaks can stay.
    """
    if "\t" not in text and for_terminal(text) == text:
        return shlex.quote(text)
    return "$'" + "".join(map(_byte, text.encode(errors="surrogateescape"))) + "'"


def _byte(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 and chr(byte) not in "'\\!" else f"\\x{byte:02x}"


def for_plot(text: str) -> str:
    r"""
    Return a text as a label of matplotlib: one short line, with `$` as a plain character.

    matplotlib leaves labels that begin with `_` out of the legend, so a space goes before it.
    """
    text = for_terminal(text, one_line=True)
    if len(text) > _LONGEST_LABEL:
        text = f"{text[:_LONGEST_LABEL]} […]"
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def for_html(text: str) -> str:
    """Return a text that HTML shows as it is, with its line breaks."""
    return html.escape(for_terminal(text)).replace("\n", "<br>")


def for_markdown(text: str) -> str:
    """
    Return a text that Markdown and HTML show literally in a table's cell.

    It makes no link, image or tag.

    Punctuation becomes HTML entities, which no dialect of Markdown reads as its own. Line breaks become `<br>`.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    return "<br>".join(
        _PUNCTUATION.sub(lambda match: f"&#{ord(match[0])};", for_terminal(line, one_line=True)) for line in lines
    )


def did_you_mean(name: str, known: Iterable[str], most: int = 3, cutoff: float = 0.5) -> str:
    """
    Return the question "Did you mean …?" with the nearest names and a leading space, or `""`.

    Args:
        name (`str`):
            The unknown name.
        known (`Iterable[str]`):
            The known names.
        most (`int`, *optional*, defaults to `3`):
            Most names to suggest.
        cutoff (`float`, *optional*, defaults to `0.5`):
            Least similarity of a suggestion, from 0 to 1.
    """
    near = get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f" Did you mean {' or '.join(near)}?" if near else ""
