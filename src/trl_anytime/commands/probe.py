"""`trl-anytime probe`: check what a server does with thinking budgets."""

import argparse
import json
from dataclasses import asdict

from .common import FAILED, Commands, add_model, parse_budgets, say
from .loading import load_tokenizer_and_config, make_client


def add_to(commands: Commands) -> None:
    command = commands.add(
        "probe",
        run,
        "check that a server keeps to thinking budgets and uses the trained markers",
        "  trl-anytime probe outputs/model --base-url http://localhost:8000 --budgets 32,128,512\n"
        "  trl-anytime probe outputs/model --base-url http://localhost:8000 --budget-field thinking_token_budget",
    )
    add_model(command, with_backend=False, base_url_required=True)
    command.add_argument(
        "--budgets",
        type=parse_budgets,
        help="default: 32,128,512, none of them beyond the last budget of the anytime config",
    )
    command.add_argument(
        "--budget-field",
        metavar="FIELD",
        help="field of the request for the budget; dots lead into objects (default: vllm_xargs.thinking_budget, for a "
        "server of `serve-command`; vLLM's own field is thinking_token_budget)",
    )
    command.add_argument("--question", help="question that needs a long thinking trace (default: a hard one)")
    command.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    from ..inference.probe import OWN_FIELD, QUESTION, escapes, probe, results_table, verdict

    field = options.budget_field or OWN_FIELD
    budgets, options.budgets = options.budgets, None  # keep those of the config
    tokenizer, config = load_tokenizer_and_config(options)
    if budgets is None:  # what the model was trained at fits into its context
        budgets = sorted({min(budget, config.budgets[-1]) for budget in (32, 128, 512)})
    results = probe(make_client(options), config, tokenizer, budgets, field, options.question or QUESTION)
    wrong = verdict(results, field)
    if options.json:
        say(json.dumps({"results": [asdict(result) for result in results], "wrong": wrong}, indent=1))
    else:
        say(results_table(results))
        for said in filter(None, (escapes(results),)):
            say(f"\n{said}")
        say(f"\n{wrong or 'The server keeps to thinking budgets, with the trained markers.'}")
    return FAILED if wrong else 0
