"""
Validation of files and server answers: their types, bounds and sizes.

A check takes a value and its name. It returns the value, or raises [`Unfit`] with that name. Checks are composed as
the data are: `fields(budgets=list_of(integer(1)))`.
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
# Most characters of a value that an error shows
_SHOWN = 80
# Most levels of lists and objects in a value of free form. Nothing that this package reads comes near it.
_DEEPEST = 32
# Halves of surrogate pairs. JSON can spell them, but neither a terminal nor a tokenizer accepts them.
_SURROGATES = re.compile("[\ud800-\udfff]")


class Unfit(ValueError):
    """Error about data from outside. Its message says in one line what is wrong, and where."""


# Checks


def number(low: float, high: float) -> Check:
    """Return a check for a finite int or float within bounds. `True` and `False` fail it."""

    def check(value: Any, name: str) -> Any:
        # This comparison is False for NaN
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise _unfit(name, f"a number from {low:g} to {high:g}", value)
        return value

    return check


def integer(low: int, high: int = MOST_TOKEN_ID) -> Check:
    """Return a check for an int within bounds. `True` and `False` fail it."""

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
    """Return a check for a text of `least` to `most` characters that can be written as UTF-8."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, str) or not least <= len(value) <= most:
            raise _unfit(name, f"a text of {least} to {most} characters", value)
        if _SURROGATES.search(value):
            raise _unfit(name, "a text without halves of surrogate pairs", value)
        return value

    return check


def list_of(item: Check, least: int = 0, most: int | None = None) -> Check:
    """Return a check for a list of `least` to `most` items that each pass a check."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            count = f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"
            raise _unfit(name, f"a list of {count} items", value)
        for i, one in enumerate(value):
            item(one, f"{name}[{i}]")
        return value

    return check


def mapping_of(item: Check, least: int = 0, most: int | None = None) -> Check:
    """Return a check for an object with `least` to `most` fields of any name that each pass a check."""
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
    """
    Return a check for an object with these fields.

    Further fields are kept unchecked, so nothing may read them.
    """

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
    """Return a check that accepts null and what passes another check."""
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
    """Return a value for an error: one short line without characters that control a terminal."""
    if isinstance(value, list | dict):  # its `repr` may be huge, or nested too deep
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**_SHOWN:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to write the longest ones
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}[…]"
    return repr(value)


# Files


def check_file(path: Path, most_bytes: int) -> None:
    """
    Refuse a path that cannot be read as a file within bounds.

    Reading a pipe or a device could wait forever.

    Raises:
        `Unfit`: If the path is not a regular file, or the file is too large.
        `OSError`: If the file is missing or not readable.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise Unfit(f"{path} is {kind}. Give a file.")
    if found.st_size > most_bytes:
        raise Unfit(f"{path} has {found.st_size} bytes, but at most {most_bytes} bytes are read. Give a smaller file.")


def check_folder(path: Path) -> None:
    """Refuse a model's folder that holds anything but folders and files that [`check_file`] accepts."""
    for entry in path.iterdir():
        if entry.exists() and not entry.is_dir():
            # Tokenizers take tens of MiB, weights any size
            check_file(entry, 2**60 if entry.suffix in (".safetensors", ".bin", ".gguf") else 1024 * MEBIBYTE)


def read_text(path: Path, most_bytes: int) -> str:
    """
    Read a file as UTF-8.

    Raises:
        `Unfit`: If the path is not a regular file, or the file is too large or not UTF-8.
        `OSError`: If the file is missing or not readable.
    """
    with _opened(path, most_bytes) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:  # a file of /proc reports a size of 0
        raise Unfit(f"{path} has more than {most_bytes} bytes, the most that are read. Give a smaller file.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unfit(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def _opened(path: Path, most_bytes: int) -> Any:
    check_file(path, most_bytes)
    # Do not wait for a pipe that has replaced the file since the check
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb")


def parse_json(content: str | bytes, source: Any, check: Check) -> Any:
    """
    Parse JSON and check it.

    Args:
        content (`str` or `bytes`):
            The JSON text.
        source (`Any`):
            Source to name in an error: a file or a server.
        check (`Check`):
            Check of the parsed value.

    Raises:
        `Unfit`: If the text is not JSON, is nested too deep, or fails the check. The message names source and field.
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

    Args:
        path (`Path`):
            The file.
        check (`Check`):
            Check of the parsed value.
        most_bytes (`int`):
            Most bytes of the file.

    Raises:
        `Unfit`: If the file cannot be read within bounds, is not JSON, or fails the check. The message names the file
        and the field.
        `OSError`: If the file is missing or not readable.
    """
    return parse_json(read_text(path, most_bytes), path, check)


def read_lines(path: Path, most_bytes: int, most_bytes_of_line: int) -> Iterator[bytes]:
    """
    Yield the complete lines of a file, without what follows the last line break.

    Args:
        path (`Path`):
            The file.
        most_bytes (`int`):
            Most bytes of the file.
        most_bytes_of_line (`int`):
            Most bytes of one line.

    Raises:
        `Unfit`: If the path is not a regular file, or the file or one of its lines is too large.
    """
    with _opened(path, most_bytes) as file:
        number = 0
        while (line := file.readline(most_bytes_of_line + 1)).endswith(b"\n"):
            number += 1
            yield line
        if len(line) > most_bytes_of_line:
            raise Unfit(f"{path}, line {number + 1} has more than {most_bytes_of_line} bytes, the most that are read.")


def read_yaml(path: Path, most_bytes: int = MEBIBYTE) -> Any:
    """
    Read a YAML file.

    Raises:
        `Unfit`: If the file cannot be read within bounds, or is not YAML.
        `OSError`: If the file is missing or not readable.
    """
    import yaml

    content = read_text(path, most_bytes)
    try:
        return yaml.safe_load(content)
    except RecursionError:
        raise Unfit(f"{path} is nested too deep.") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # the last three from dates and keys
        raise Unfit(f"{path} is not YAML: {' '.join(str(error).split())}") from error


TOKEN_ID = integer(0)
