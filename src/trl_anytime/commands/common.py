"""What several commands share: exit codes, options, output."""

import argparse
import os
from itertools import pairwise
from typing import Any, TextIO

from ..outside.command_line import BAD_INPUT, FAILED, INTERRUPTED, PIPE_CLOSED, SERVER_FAILED
from ..outside.display import for_terminal

EXIT_CODES = f"""exit codes:
  0  done
  {FAILED}  a check failed (doctor, probe)
  {BAD_INPUT}  bad input; stderr says what is wrong and what to do
  {SERVER_FAILED}  a server or the Hub failed for too long; repeat the command to continue where it stopped
  {INTERRUPTED}  interrupted; repeat the command to continue where it stopped
  {PIPE_CLOSED}  the reader of the output has gone"""

SYSTEM_PROMPT = "system message before each question, '' for none (default: that of the model's anytime config)"


class Commands:
    """The commands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(self, name: str, run: Any, help: str, examples: str, **kwargs: Any) -> argparse.ArgumentParser:
        """Add a command that `run` executes, with examples below its help."""
        command = self._subparsers.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"examples:\n{examples}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        command.set_defaults(run=run)
        return command


def parse_budgets(text: str) -> list[int]:
    """Parse budgets from `250:8000:250` (first, last and step) or `250,1000,8000`."""
    return _parse_increasing(text, "budgets", 1, "250,1000,8000, or 250:8000:250")


def parse_steps(text: str) -> list[int]:
    """Parse the steps of checkpoints from `100:1000:100` (first, last and step) or `100,200`."""
    return _parse_increasing(text, "steps", 0, "100,200, or 100:1000:100")


def _parse_increasing(text: str, what: str, least: int, example: str) -> list[int]:
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            numbers = list(range(first, last + 1, step))
        else:
            numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least or any(a >= b for a, b in pairwise(numbers)):
        in_order = ",".join(map(str, sorted({number for number in numbers if number >= least})))
        fix = f"Give {in_order}." if in_order else f"Give {example} (first:last:step)."
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of increasing {what}. {fix}")
    return numbers


def add_model(
    parser: argparse.ArgumentParser, with_backend: bool, with_server: bool = True, base_url_required: bool = False
) -> None:
    parser.add_argument("model", help="folder or Hub id; for a server, only tokenizer and anytime config are used")
    parser.add_argument(
        "--think-end", metavar="TEXT", help="text that ends the thinking, for models without anytime_config.json"
    )
    parser.add_argument("--truncation-bridge", metavar="TEXT", help="text that closes a cut trace, for such models")
    parser.add_argument("--answer-bridge", metavar="TEXT", help="text before the answer, for such models")
    if not with_server:
        return
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", required=base_url_required, help="an OpenAI-compatible server")
    server.add_argument(
        "--served-name", metavar="NAME", help="name of the model there (default: MODEL, else the first)"
    )
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    server.add_argument(
        "--timeout", type=float, default=600.0, help="most seconds for a whole answer (default: %(default)g)"
    )
    # A check is for a server that runs. What takes hours waits until one does again.
    patience = 10.0 if base_url_required else 900.0
    server.add_argument(
        "--patience", type=float, default=patience, help="most seconds of retrying one request (default: %(default)g)"
    )
    if base_url_required:
        return
    server.add_argument("--concurrency", type=int, default=32, help="requests at a time (default: %(default)s)")
    local = parser.add_argument_group("local model")
    if with_backend:
        local.add_argument("--backend", choices=["transformers", "vllm"], default="transformers")
        local.add_argument(
            "--max-cached-tokens", type=int, metavar="N", help="most tokens in the cache at a time, with transformers"
        )
        local.add_argument(
            "--max-model-len", type=int, metavar="N", help="tokens of the context, with vLLM (default: the model's)"
        )
    local.add_argument("--dtype", default="auto", help="bfloat16, float32, … (default: as in the checkpoint)")
    local.add_argument("--device", help="cuda, cpu, … (default: cuda if available, else cpu)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("budgets and sampling (default: from the model's anytime config)")
    sampling.add_argument("--budgets", type=parse_budgets, help="250,1000,8000 or 250:8000:250 (first:last:step)")
    sampling.add_argument("--max-summary-length", type=int, metavar="TOKENS", help="most tokens of an answer")
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--min-p", type=float)


def say(text: str, file: TextIO | None = None) -> None:
    """Print a command's output, with control characters of models, servers and files escaped."""
    print(for_terminal(text), file=file)
