"""`trl-anytime doctor`: check a training recipe before it runs."""

import argparse
from pathlib import Path

from .common import FAILED, Commands, say


def add_to(commands: Commands) -> None:
    command = commands.add(
        "doctor",
        run,
        "check a training recipe before it runs",
        "  trl-anytime doctor 8k_anytime_uniform --processes 8 --gpu-memory 80\n"
        "  trl-anytime doctor mine.yaml --accelerate-config fsdp2\n"
        "  trl-anytime doctor mine.yaml --set budgets='1000 2000' --set model_name_or_path=outputs/sft --json",
    )
    command.add_argument("recipe", type=Path, nargs="?", help="file or name of a recipe, as for `train --config`")
    command.add_argument("--config", type=Path, metavar="RECIPE", help="the same, written as for `train`")
    command.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        type=_parse_change,
        metavar="NAME=VALUE",
        help="a setting, instead of what the file says; can be repeated",
    )
    command.add_argument("--settings-only", action="store_true", help="skip checks that need the model or the data")
    command.add_argument(
        "--load-model", action="store_true", help="load a large model, too, to measure tree attention"
    )
    command.add_argument("--assume-vllm", action="store_true", help="the machine of the run has vLLM")
    command.add_argument("--json", action="store_true", help="print JSON")
    launch = command.add_argument_group("GPUs of the planned run")
    launch.add_argument("--accelerate-config", type=Path, metavar="FILE", help="as for `train --accelerate_config`")
    launch.add_argument(
        "--processes", type=int, metavar="N", help="number of GPUs (default: of that file, else of this machine)"
    )
    launch.add_argument("--sharding", choices=["none", "fsdp", "zero2", "zero3"], help="(default: of that file)")
    launch.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU (default: this machine's)")


def run(options: argparse.Namespace) -> int:
    from ..checks.doctor import check_recipe, read_launch
    from ..checks.finding import as_json, as_text

    if (options.recipe is None) == (options.config is None):
        raise ValueError("Give one recipe: a file, or the name of one.")
    report = check_recipe(
        options.recipe or options.config,
        dict(options.changes),
        read_launch(options.accelerate_config, options.processes, options.sharding),
        None if options.gpu_memory is None else int(options.gpu_memory * 2**30),
        options.settings_only,
        options.load_model,
        options.assume_vllm,
    )
    findings, tables = report.findings, report.tables
    say((as_json if options.json else as_text)(findings, tables))
    return 0 if report.passed else FAILED


def _parse_change(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting. Write NAME=VALUE.")
    return name.removeprefix("--"), value
