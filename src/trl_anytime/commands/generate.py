"""`trl-anytime generate`: answer a question at thinking budgets."""

import argparse
import sys
from typing import Any

from .common import SYSTEM_PROMPT, Commands, add_model, add_sampling
from .loading import check_machine, load_model, load_tokenizer_and_config


def add_to(commands: Commands) -> None:
    command = commands.add(
        "generate",
        run,
        "answer a question at thinking budgets, and print tokens as they come",
        '  trl-anytime generate outputs/model "What is 2 + 2?" --budgets 100,1000\n'
        '  trl-anytime generate outputs/model "What is 2 + 2?" --stop-when settled --checks 3\n'
        '  trl-anytime generate outputs/model "What is 2 + 2?" --base-url http://localhost:8000\n'
        '  trl-anytime generate outputs/model "What is 2 + 2?" --interactive',
    )
    add_model(command, with_backend=False)
    command.add_argument("question", help="the question; - reads it from standard input")
    command.add_argument("--system-prompt", metavar="TEXT", help=SYSTEM_PROMPT)
    command.add_argument("--instruction", default="", help="text after the question (default: none)")
    command.add_argument("--seed", type=int)
    command.add_argument(
        "--interactive",
        action="store_true",
        help="think at the terminal until the end; Enter answers at once, q and Enter or Ctrl-D leaves",
    )
    add_sampling(command)
    stop = command.add_argument_group("end of thinking")
    stop.add_argument(
        "--stop-when", choices=["settled"], help="end the thinking when the answers of several checks agree"
    )
    stop.add_argument("--checks", type=int, metavar="K", help="checks in a row that must agree (default: 3)")
    stop.add_argument(
        "--check-every", type=int, metavar="TOKENS", help="between checks (default: 1/16 of the last budget)"
    )
    stop.add_argument("--check-answers", type=int, metavar="N", help="answers of a check (default: 1)")
    stop.add_argument(
        "--agreement", type=float, metavar="SHARE", help="of a check's answers that must be the same (default: 1)"
    )


def run(options: argparse.Namespace) -> int:
    from ..inference.generate import context_length
    from ..inference.streaming import StreamingSampler, stream_answers

    if options.interactive:
        _check_interactive(options)
    check_machine(options)
    tokenizer, config = load_tokenizer_and_config(options)
    model = load_model(options)
    question = sys.stdin.read() if options.question == "-" else options.question
    prompt = config.question(tokenizer, f"{question} {options.instruction}".strip())
    if options.interactive:
        from ..inference.interactive import converse
        from ..inference.session import AnytimeSession

        converse(AnytimeSession(model, tokenizer, prompt, config=config, seed=options.seed), tokenizer)
        return 0
    sample = StreamingSampler(model, tokenizer, config.sampling, options.seed)
    stream_answers(sample, tokenizer, config, prompt, context_length(model), _stop_when(options))
    return 0


def _stop_when(options: argparse.Namespace) -> Any:
    """Return the rule that ends the thinking, with the settings that are given."""
    from ..rollout.settling import Settling

    names = {"checks": "checks", "every": "check_every", "answers": "check_answers", "agreement": "agreement"}
    given = {name: vars(options)[option] for name, option in names.items() if vars(options)[option] is not None}
    if options.stop_when is None:
        if given:
            words = ", ".join(f"--{names[name].replace('_', '-')}" for name in given)
            raise ValueError(f"{words} belongs to a rule that ends the thinking. Add --stop-when settled.")
        return None
    return Settling(**given)


def _check_interactive(options: argparse.Namespace) -> None:
    """Refuse what an interactive session has no use for, before anything is loaded."""
    from ..inference.interactive import check_terminal

    if options.question == "-":
        raise ValueError("--interactive reads keys from standard input. Give the question as a word of the command.")
    if options.budgets is not None:
        raise ValueError("--interactive answers when you press Enter. Leave out --budgets, or --interactive.")
    check_terminal()
