"""Names of tasks with their settings, and of their problems. Nothing here needs the library."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, version
from urllib.parse import quote, unquote

PREFIX = "reasoning_gym:"
MOST_PROBLEMS = 1_000_000
"""Problems of one seed, which have as many seeds of the library for themselves."""
_MOST_SEEDS = 2**32 // MOST_PROBLEMS  # the library's seeds are below 2^32
_DEFAULT_SIZE, _DEFAULT_SEED = 500, 0
_UNQUOTED = "[]()\"',:.+-*/ "
_ENTRY = re.compile(r"(?P<source>[^#]+)#(?P<index>\d{1,7}):(?P<digest>[0-9a-f]{12})")

REFUSED = {
    "boxnet": "the library has no answer of its own, against which its scorer could be checked",
    "coin_flip": "its scorer gives 1 to the wrong answer 0",
    "complex_arithmetic": "its scorer gives 1 to the wrong answer nan",
    "composite": "it is made of other tasks; name one of them",
    "futoshiki": "its answers have empty lines, and an empty line ends the final answer",
    "game_of_life_halting": "its scorer gives 1 to any text",
    "puzzle24": "its scorer gives 1 to any four numbers that make 24, whatever the problem",
    "rush_hour": "the library has no answer of its own, against which its scorer could be checked",
}
"""Tasks of the library that cannot be used, with the reason."""


@dataclass(frozen=True)
class TaskSource:
    """
    A task with its configuration, the number of its problems, and the seed that they are made from.

    Args:
        task (`str`):
            Name of the task in reasoning-gym.
        settings (`Mapping[str, str]`, *optional*):
            Settings of the task's configuration as text, read as YAML.
        size (`int`, *optional*, defaults to `500`):
            How many problems there are.
        seed (`int`, *optional*, defaults to `0`):
            What they are made from. Sets with different seeds share no seed of the library.
    """

    task: str
    settings: Mapping[str, str] = field(default_factory=dict)
    size: int = _DEFAULT_SIZE
    seed: int = _DEFAULT_SEED

    @classmethod
    def parse(cls, text: str) -> "TaskSource":
        """
        Read `reasoning_gym:TASK?setting=value&size=500&seed=0`.

        Raises:
            `ValueError`: If it is not of this form, or size or seed are out of range.
        """
        task, _, behind = text.removeprefix(PREFIX).partition("?")
        settings: dict[str, str] = {}
        for part in filter(None, behind.split("&")):
            name, separator, value = (unquote(piece) for piece in part.partition("="))
            if not separator or not name or not value:
                raise ValueError(f"{text!r}: {part!r} is not of the form setting=value. Join several by `&`.")
            if name in settings:
                raise ValueError(f"{text!r} sets {name!r} twice. Remove one.")
            settings[name] = value
        if not task:
            raise ValueError(f"{text!r} names no task. Write {PREFIX}TASK, such as {PREFIX}chain_sum.")
        numbers = {}
        for name, default, least, most in (
            ("size", _DEFAULT_SIZE, 1, MOST_PROBLEMS),
            ("seed", _DEFAULT_SEED, 0, _MOST_SEEDS - 1),
        ):
            value = settings.pop(name, str(default))
            if not re.fullmatch(r"\d{1,10}", value) or not least <= int(value) <= most:
                raise ValueError(
                    f"{text!r}: `{name}` must be a whole number from {least} to {most:,}, not {value!r}. Change it."
                )
            numbers[name] = int(value)
        return cls(task, settings, **numbers)

    def __str__(self) -> str:
        values = {**dict(sorted(self.settings.items())), "size": str(self.size), "seed": str(self.seed)}
        settings = "&".join(f"{quote(name)}={quote(value, safe=_UNQUOTED)}" for name, value in values.items())
        return f"{PREFIX}{self.task}?{settings}"

    @property
    def library_seed(self) -> int:
        """Seed of the library for the first problem; the library adds the number of each."""
        return self.seed * MOST_PROBLEMS


def is_task(source: str) -> bool:
    """Whether a data set is given as a task."""
    return source.startswith(PREFIX)


def entry_id(source: TaskSource, index: int, digest: str) -> str:
    """Return the name of a problem: its source, its number, and a digest of its question and answer."""
    return f"{source}#{index}:{digest}"


def split_entry_id(entry: object) -> tuple[str, int, str] | None:
    """Return source, number and digest of a problem; `None` for what names none."""
    match = _ENTRY.fullmatch(entry) if isinstance(entry, str) and is_task(entry) else None
    return None if match is None else (match["source"], int(match["index"]), match["digest"])


def library_version() -> str:
    """
    Return the version of reasoning-gym that is installed.

    Raises:
        `ValueError`: If there is none.
    """
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        raise ValueError(
            "reasoning-gym is not installed, which makes and scores the problems of its tasks. Run "
            "`pip install 'trl-anytime[tasks]'`."
        ) from None


def library_licence() -> str:
    """Return the licence of reasoning-gym as it is installed, under which its problems come."""
    return metadata("reasoning-gym")["License-Expression"] or "licence not given"
