"""`trl-anytime eval`: measure a whole accuracy-versus-budget curve, of a model or of each checkpoint of a run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from . import checkpoints
from .common import SYSTEM_PROMPT, Commands, add_model, add_sampling, parse_steps, say
from .loading import check_machine
from .measurement import FILES, Measurement, print_results

# `None` keeps the value of the model's anytime config
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's evaluation, with the settings of its released scripts and the data sets of its figures
    "paper": {
        "datasets": ["amc", "aime24", "math500", "minerva", "olympiadbench"],
        "budgets": list(range(250, 8001, 250)),
        "temperature": 0.6,
        "top_p": 1.0,
        "top_k": 0,
        "max_summary_length": 118,
        "samples": 1,
    }
}


def add_to(commands: Commands) -> None:
    command = commands.add(
        "eval",
        run,
        "measure a whole accuracy-versus-budget curve",
        "  trl-anytime eval outputs/model --dataset aime24 --budgets 250:8000:250 --samples 16\n"
        "  trl-anytime eval outputs/model --dataset mine.jsonl --answer-column truth --limit 100\n"
        "  trl-anytime eval deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --preset paper --backend vllm --output base\n"
        "  trl-anytime eval outputs/model --preset paper --backend vllm --baseline base/results.json\n"
        "  trl-anytime eval outputs/model --checkpoints --dataset math500 --budgets 500:8000:500\n"
        "  trl-anytime eval outputs/model --dataset math500 --base-url http://localhost:8000 --concurrency 64",
    )
    add_model(command, with_backend=True)
    add_sampling(command)
    problems = command.add_argument_group("problems")
    problems.add_argument(
        "--dataset-name",
        "--dataset",
        dest="datasets",
        action="append",
        metavar="NAME",
        help="aime24, aime25, amc, math500, minerva, olympiadbench, a Hub id (owner/name[:config]), a json, jsonl, "
        "parquet or csv file, or reasoning_gym:TASK?setting=value&size=500&seed=0; NAME=SOURCE gives it a name; can "
        "be repeated",
    )
    problems.add_argument("--problem-column", metavar="COLUMN", help="(default: problem, question or prompt)")
    problems.add_argument(
        "--answer-column",
        metavar="COLUMN",
        help="(default: answer, solution, reward_model.ground_truth or final_answer)",
    )
    problems.add_argument("--split", help="split of Hub data sets (default: test, else train)")
    problems.add_argument("--limit", type=int, metavar="N", help="only the first N problems of each data set")
    problems.add_argument(
        "--on-bad-gold",
        choices=["raise", "skip"],
        default="raise",
        help="raise an error for rows without a usable gold answer (default), or skip them",
    )
    problems.add_argument("--system-prompt", metavar="TEXT", help=SYSTEM_PROMPT)
    problems.add_argument("--instruction", help="text after each question (default: the paper's)")
    measure = command.add_argument_group("measurement")
    measure.add_argument("--preset", choices=sorted(_PRESETS), help="settings of a protocol; options override them")
    measure.add_argument("--samples", type=int, metavar="N", help="traces for each question (default: 1)")
    measure.add_argument("--summaries", type=int, default=1, metavar="N", help="answers at each cut (default: 1)")
    measure.add_argument(
        "--reward",
        metavar="FILE.py:NAME",
        help="reward function in TRL's form (default: this package's verifier, or a task's own scorer)",
    )
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--baseline", type=Path, metavar="RESULTS", help="results.json to compare with")
    measure.add_argument(
        "--frontier",
        type=Path,
        metavar="FILE",
        help="best known accuracies to measure the gap to: CSV or JSON with budget, accuracy and perhaps dataset",
    )
    measure.add_argument(
        "--right-at",
        type=float,
        default=0.5,
        metavar="REWARD",
        help="least mean reward of a question that counts as right (default: %(default)g)",
    )
    measure.add_argument("--batch-size", type=int, metavar="N", help="samples that are computed together")
    measure.add_argument(
        "--output", type=Path, help="folder of the results (default: outputs/eval/MODEL, or MODEL-checkpoints there)"
    )
    checkpoints = command.add_argument_group("checkpoints")
    checkpoints.add_argument(
        "--checkpoints",
        action="store_true",
        help="evaluate each checkpoint-STEP in the folder MODEL, one after another, into a folder of its own",
    )
    checkpoints.add_argument(
        "--steps", type=parse_steps, help="only these: 100,200 or 100:1000:100 (default: all checkpoints)"
    )
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    for name, value in _PRESETS.get(options.preset, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.datasets:
        raise ValueError("There is no data set to evaluate on. Set --dataset (such as --dataset aime24) or --preset.")
    if options.steps is not None and not options.checkpoints:
        raise ValueError("--steps names checkpoints. Add --checkpoints, or remove it.")
    if options.checkpoints and options.base_url:
        raise ValueError(
            "--checkpoints and --base-url exclude each other, because a server holds one model. Leave out --base-url, "
            "or serve and evaluate each checkpoint by itself."
        )
    found = checkpoints.find(Path(options.model), options.steps) if options.checkpoints else []
    check_machine(options)
    measurement = Measurement.of(options, None if options.reward is None else _load_function(options.reward))
    name = Path(options.model).name + "-checkpoints" * options.checkpoints
    output = options.output or Path("outputs", "eval", name)
    if options.checkpoints:
        return checkpoints.run(options, measurement, found, output)
    results = measurement.measure(measurement.evaluation(options), options, output)
    print_results(results, options.json)
    say(f"\nIn {output}: {FILES}", sys.stderr)
    return 0


def _load_function(text: str) -> Any:
    """Load a function that is given as FILE.py:NAME."""
    from importlib.util import module_from_spec, spec_from_file_location

    path, _, name = text.rpartition(":")
    spec = spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"There is no such file: {text!r}. Give a reward as FILE.py:NAME.")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"There is no function {name!r} in {path}. Give a reward as FILE.py:NAME.")
    return getattr(module, name)
