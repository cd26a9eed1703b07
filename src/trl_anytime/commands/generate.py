"""`trl-anytime generate`: answer a question at thinking budgets."""

import argparse
import sys

from .common import SYSTEM_PROMPT, Commands, add_model, add_sampling
from .loading import check_machine, load_model, load_tokenizer_and_config


def add_to(commands: Commands) -> None:
    command = commands.add(
        "generate",
        run,
        "answer a question at thinking budgets, and print tokens as they come",
        '  trl-anytime generate outputs/model "What is 2 + 2?" --budgets 100,1000\n'
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


def run(options: argparse.Namespace) -> int:
    from ..inference.generate import context_length
    from ..inference.streaming import stream_answers, streaming_sampler

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
    sample = streaming_sampler(model, tokenizer, config.sampling, options.seed)
    stream_answers(sample, tokenizer, config, prompt, context_length(model))
    return 0


def _check_interactive(options: argparse.Namespace) -> None:
    """Refuse what an interactive session has no use for, before anything is loaded."""
    from ..inference.interactive import check_terminal

    if options.question == "-":
        raise ValueError("--interactive reads keys from standard input. Give the question as a word of the command.")
    if options.budgets is not None:
        raise ValueError("--interactive answers when you press Enter. Leave out --budgets, or --interactive.")
    check_terminal()
