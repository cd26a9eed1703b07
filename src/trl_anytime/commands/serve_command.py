"""`trl-anytime serve-command`: print how to serve a model as it was trained."""

import argparse
import json
from dataclasses import asdict

from .common import Commands, add_model, say
from .loading import load_tokenizer_and_config


def add_to(commands: Commands) -> None:
    command = commands.add(
        "serve-command",
        run,
        "print the command and requests to serve a model as it was trained",
        "  trl-anytime serve-command outputs/model",
    )
    add_model(command, with_backend=False, with_server=False)
    command.add_argument("--budget", type=int, metavar="TOKENS", help="budget of requests (default: largest trained)")
    command.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    from ..inference.serving import deployment, find_adapter, reasoning_parser

    tokenizer, config = load_tokenizer_and_config(options)
    budget = config.budgets[-1] if options.budget is None else options.budget
    adapter, parser = find_adapter(options.model), reasoning_parser(config, tokenizer)
    how = deployment(options.model, config, budget, adapter, parser)
    say(json.dumps(asdict(how), indent=1) if options.json else how.text())
    return 0
