"""`trl-anytime train`: train by a recipe."""

import argparse
from typing import NoReturn

from .common import Commands, say


def add_to(commands: Commands) -> None:
    command = commands.add(
        "train",
        run,
        "train by a recipe",
        "  trl-anytime train --config 8k_anytime_uniform --num_processes 8\n"
        "  trl-anytime train --config mine.yaml --accelerate_config zero2 --learning_rate 2e-6\n"
        "  accelerate launch -m trl_anytime.train --config mine.yaml",
        prefix_chars="\0",  # all words are passed on
        add_help=False,
    )
    command.add_argument(
        "words",
        nargs="*",
        metavar="--NAME VALUE",
        help="--config takes a YAML file, or the name of a recipe. --accelerate_config takes a file of `accelerate "
        "config`, or one of fsdp2, multi_gpu, single_gpu, zero2, zero3. Options of `accelerate launch` work, too. "
        "All other settings override those of the recipe (`python -m trl_anytime.train --help` lists them).",
    )
    command.set_defaults(help_of_train=command.format_help)


def run(options: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(options.words):
        say(options.help_of_train())
        return 0
    import logging
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from ..data.recipe import launch_words, refuse_word

    launch, settings = launch_words(options.words)
    parser = launch_command_parser()
    parser.error = _refuse_option  # argparse would print all options before
    parsed, unknown = parser.parse_known_args([*launch, "-m", "trl_anytime.train", *settings])
    if unknown:
        refuse_word(unknown[0], (option.lstrip("-") for option in parser._option_string_actions))
    logging.getLogger("accelerate.commands.launch").setLevel(logging.ERROR)  # it would list the defaults it takes
    try:
        launch_command(parsed)
    except subprocess.CalledProcessError as error:  # the training has printed its error
        return error.returncode
    except ChildFailedError as error:  # of several processes
        _, failure = error.get_first_failure()
        return failure.exitcode
    return 0


def _refuse_option(message: str) -> NoReturn:
    raise ValueError(f"accelerate launch: {message.rstrip('.')}.")
