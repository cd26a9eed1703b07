"""Command lines whose parser says in one line what is wrong, and suggests the word that was probably meant."""

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .display import did_you_mean

# Exit codes
FAILED, BAD_INPUT, SERVER_FAILED, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141

_NEAREST: Any = {"most": 2, "cutoff": 0.6}
_CHOICES = re.compile(r"invalid choice: '(.*?)' \(choose from (.*?)\)")


class CommandParser(argparse.ArgumentParser):
    """
    [`argparse.ArgumentParser`] whose errors take one line.

    argparse prints all options before an error. It also reports unknown options of a command through the parent
    parser, which does not know the command's own options.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            hint = did_you_mean(options[0], self._option_string_actions, **_NEAREST) if options else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line that says what is wrong."""
        message = message.rstrip(".")
        if found := _CHOICES.search(message):
            choices = re.split(r", ", found[2].replace("'", ""))
            message += f".{did_you_mean(found[1], choices, **_NEAREST)}".rstrip(".")
        ending = "" if message.endswith(("?", "!")) else "."
        self.exit(BAD_INPUT, f"{self.prog}: {message}{ending} `{self.prog} --help` lists what there is.\n")


class PrintCompletion(argparse.Action):
    """Print a script, made by shtab, that completes commands, options and files in a shell."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> NoReturn:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.error("shtab is missing. Run `pip install 'trl-anytime[completion]'`")
        for action in _all_actions(parser._actions):
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(parser, shell=values))
        parser.exit()


def _all_actions(actions: Sequence[argparse.Action]) -> Iterable[argparse.Action]:
    for action in actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _all_actions(command._actions)
