"""
Reads what comes from outside: files and answers of servers, with types, bounds and sizes.

A check takes a value and its name, returns the value, and raises [`Unfit`] with that name if it does not fit. Checks
are put together as the data are: `fields(budgets=list_of(integer(1)))`.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Check = Callable[[Any, str], Any]

MEBIBYTE = 2**20
MOST_TOKEN_ID = 2**31 - 1
# Characters of a value that an error shows
_SHOWN = 80
# Levels of lists and objects in a value of free form. Nothing that this package reads comes near it.
_DEEPEST = 32
# Halves of pairs: JSON can spell them, and neither a terminal nor a tokenizer takes them
_SURROGATES = re.compile("[\ud800-\udfff]")


class Unfit(ValueError):
    """Something from outside is not what it should be. The message names what and where, in one line."""


# Checks


def number(low: float, high: float) -> Check:
    """Check for a finite int or float within bounds; `True` and `False` are none."""

    def check(value: Any, name: str) -> Any:
        # The comparison is False for NaN
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _unfit(name, f"a number from {low:g} to {high:g}", value)
        return value

    return check


def integer(low: int, high: int = MOST_TOKEN_ID) -> Check:
    """Check for an int within bounds; `True` and `False` are none."""

    def check(value: Any, name: str) -> Any:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _unfit(name, f"an integer from {low} to {high}", value)
        return value

    return check


def boolean(value: Any, name: str) -> Any:
    """Check for `True` or `False`."""
    if not isinstance(value, bool):
        raise _unfit(name, "true or false", value)
    return value


def string(most: int = MEBIBYTE, least: int = 0) -> Check:
    """Check for a text of so many characters, all of which can be written as UTF-8."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise _unfit(name, f"a text of {least} to {most} characters", value)
        if _SURROGATES.search(value):
            raise _unfit(name, "a text without halves of surrogate pairs", value)
        return value

    return check


def list_of(item: Check, least: int = 0, most: int | None = None) -> Check:
    """Check for a list of so many items, each of which passes a check."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
            raise _unfit(name, f"a list of {count} items", value)
        for i, one in enumerate(value):
            item(one, f"{name}[{i}]")
        return value

    return check


def mapping_of(item: Check, least: int = 0, most: int | None = None) -> Check:
    """Check for an object with so many fields of any names, each of which passes a check."""
    check_name = string(1000)

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, dict) or len(value) < least or (most is not None and len(value) > most):
            counted = "" if most is None else f" of {least} to {most} fields"
            raise _unfit(name, f"an object{counted or ' that is not empty' * (least > 0)}", value)
        for key, one in value.items():
            check_name(key, f"a field's name in {name}")
            item(one, _field(name, key))
        return value

    return check


def fields(optional: dict[str, Check] | None = None, /, **required: Check) -> Check:
    """Check for an object with these fields. Further fields are left as they are, and nothing may read them."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, dict):
            raise _unfit(name, "an object", value)
        for field, item in required.items():
            if field not in value:
                raise Unfit(f"`{_field(name, field)}` is missing.")
            item(value[field], _field(name, field))
        for field, item in (optional or {}).items():
            if field in value:
                item(value[field], _field(name, field))
        return value

    return check


def or_null(item: Check) -> Check:
    """Check for null, or what passes another check."""
    return lambda value, name: None if value is None else item(value, name)


def free_form(value: Any, name: str) -> Any:
    """Check for any JSON whose texts can be written and whose nesting is bounded."""
    parts = [value]
    for _ in range(_DEEPEST):
        for part in parts:
            if isinstance(part, str):
                string()(part, name)
        parts = [
            inner
            for part in parts
            if isinstance(part, list | dict)
            for inner in ([*part, *part.values()] if isinstance(part, dict) else part)
        ]
        if not parts:
            return value
    raise _unfit(name, f"nested less than {_DEEPEST} levels deep", value)


def _field(name: str, key: str) -> str:
    return f"{name}.{repr(key)[1:-1][:_SHOWN]}".removeprefix(".")


def _unfit(name: str, wanted: str, value: Any) -> Unfit:
    return Unfit(f"{f'`{name}`' if name else 'it'} must be {wanted}, got {_shown(value)}.")


def _shown(value: Any) -> str:
    """A value for an error: in one line, short, and without what moves a terminal."""
    if isinstance(value, list | dict):  # whose `repr` may be huge, or nested too deep
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write the longest ones
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}[…]"
    return repr(value)


# Files


def check_file(path: Path, most_bytes: int) -> None:
    """
    Refuse what cannot be read as a file within bounds. A pipe or a device would be waited for without an end.

    Raises:
        `Unfit`: If it is not a regular file, or too large.
        `OSError`: If it is not there, or may not be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise Unfit(f"{path} is {kind}: give a file.")
    if found.st_size > most_bytes:
        raise Unfit(f"{path} has {found.st_size} bytes, and {most_bytes} are the most that are read.")


def check_folder(path: Path) -> None:
    """Refuse a model's folder that holds anything but folders and files that [`check_file`] accepts."""
    for entry in path.iterdir():
        if entry.exists() and not entry.is_dir():
            # Tokenizers come to tens of MiB, weights to any size
            check_file(entry, 2**60 if entry.suffix in (".safetensors", ".bin", ".gguf") else 1024 * MEBIBYTE)


def read_text(path: Path, most_bytes: int) -> str:
    """
    Read a file as UTF-8.

    Raises:
        `Unfit`: If it is not a regular file, too large, or not UTF-8.
        `OSError`: If it is not there, or may not be read.
    """
    with _opened(path, most_bytes) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # a file of /proc says that it has none
        raise Unfit(f"{path} has more than the {most_bytes} bytes that are read.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unfit(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def _opened(path: Path, most_bytes: int) -> Any:
    check_file(path, most_bytes)
    # Nothing waits for a pipe that has taken the file's place since
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")


def parse_json(content: str | bytes, source: Any, check: Check) -> Any:
    """
    Parse JSON and check it.

    Args:
        content (`str` or `bytes`):
            The JSON.
        source (`Any`):
            What an error names: a file, a server.
        check (`Check`):
            What it must be.

    Raises:
        `Unfit`: If it is no JSON, nested too deep, or fails the check; the message names source and field.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise Unfit(f"{source} is nested too deep.") from None
    except ValueError as error:
        raise Unfit(f"{source} is not JSON: {error}.") from error
    try:
        return check(value, "")
    except Unfit as error:
        raise Unfit(f"{source}: {error}") from error


def read_json(path: Path, check: Check, most_bytes: int) -> Any:
    """
    Read a JSON file and check it.

    Raises:
        `Unfit`: If it cannot be read within bounds, is no JSON, or fails the check; the message names the file
            and the field.
        `OSError`: If it is not there, or may not be read.
    """
    return parse_json(read_text(path, most_bytes), path, check)


def read_lines(path: Path, most_bytes: int, most_bytes_of_line: int) -> Iterator[bytes]:
    """
    The complete lines of a file; what follows the last line break is left out.

    Raises:
        `Unfit`: If it is not a regular file, or it or a line is too large.
    """
    with _opened(path, most_bytes) as file:
        number = 0
        while (line := file.readline(most_bytes_of_line + 1)).endswith(b"\n"):
            number += 1
            yield line
        if len(line) > most_bytes_of_line:
            raise Unfit(f"{path}, line {number + 1} has more than {most_bytes_of_line} bytes.")


def read_yaml(path: Path, most_bytes: int = MEBIBYTE) -> Any:
    """
    Read a YAML file.

    Raises:
        `Unfit`: If it cannot be read within bounds, or is no YAML.
        `OSError`: If it is not there, or may not be read.
    """
    import yaml

    content = read_text(path, most_bytes)
    try:
        return yaml.safe_load(content)
    except RecursionError:
        raise Unfit(f"{path} is nested too deep.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the latter for dates and keys
        raise Unfit(f"{path} is not YAML: {' '.join(str(error).split())}") from error
