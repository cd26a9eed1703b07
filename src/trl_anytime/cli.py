"""The command `trl-anytime`. Each subcommand imports the libraries that it needs, so that help is fast."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

from . import __version__
from .commands import doctor, eval, generate, plot, probe, serve_command, train
from .commands.common import BAD_INPUT, EXIT_CODES, INTERRUPTED, PIPE_CLOSED, SERVER_FAILED, Commands, say
from .outside.command_line import CommandParser, PrintCompletion


def make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trl-anytime",
        description="Evaluate, use and deploy reasoning models at any thinking budget.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        help="print a script for tab completion in that shell (needs the extra `completion`)",
    )
    commands = Commands(parser)
    for command in (doctor, train, eval, generate, probe, serve_command, plot):
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    options = argparse.Namespace()
    try:
        try:
            options = make_parser().parse_args(arguments)
            if options.command != "train":  # that does so itself, and its help needs no library
                from .outside.progress import hide_host_bars_in_pipe

                hide_host_bars_in_pipe()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of other libraries
                return options.run(options)
        finally:
            sys.stdout.flush()  # here, so that a closed pipe is caught below
    except BrokenPipeError:
        # The rest of the buffer would raise again when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ConnectionError as error:
        say(f"trl-anytime: {error}", sys.stderr)
        return SERVER_FAILED
    except (ValueError, OSError) as error:
        say(f"trl-anytime: {error}", sys.stderr)
        return BAD_INPUT
    except ImportError as error:
        if sys.platform == "linux":
            raise
        say(f"trl-anytime: {error}", sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        say("trl-anytime: interrupted", sys.stderr)
        if vars(options).get("base_url"):  # threads may be waiting for the server. Finished samples are on the disk.
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
