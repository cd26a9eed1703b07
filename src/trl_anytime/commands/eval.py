"""`trl-anytime eval`: measure a whole accuracy-versus-budget curve."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..outside.display import for_shell
from .common import SYSTEM_PROMPT, Commands, add_model, add_sampling, say
from .loading import check_machine, load_model, load_tokenizer_and_config

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
    measure.add_argument("--batch-size", type=int, metavar="N", help="samples that are computed together")
    measure.add_argument("--output", type=Path, help="folder of the results (default: outputs/eval/MODEL)")
    command.add_argument("--json", action="store_true", help="print the results as JSON")


def run(options: argparse.Namespace) -> int:
    from ..data.problems import as_flag
    from ..evaluation.evaluate import INSTRUCTION, Evaluation
    from ..evaluation.problems import load_problems
    from ..evaluation.protocol import NOT_COMPARED as not_compared
    from ..evaluation.protocol import differences
    from ..evaluation.results import (
        comparison,
        limited_answers,
        load_results,
        results_of,
        save_answers,
        save_samples,
        table,
    )
    from ..evaluation.settling import settling_table
    from ..evaluation.zeros import explain_zeros

    for name, value in _PRESETS.get(options.preset, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.datasets:
        raise ValueError("There is no data set to evaluate on. Set --dataset (such as --dataset aime24) or --preset.")
    check_machine(options)
    baseline = None if options.baseline is None else load_results(options.baseline)
    reward = None if options.reward is None else _load_function(options.reward)
    problem_sets = [
        load_problems(
            source,
            options.problem_column,
            options.answer_column,
            options.split,
            options.limit,
            options.on_bad_gold,
            any_text=reward is not None,
            spell=as_flag,
        )
        for source in options.datasets
    ]
    tokenizer, config = load_tokenizer_and_config(options)
    output = options.output or Path("outputs", "eval", Path(options.model).name)
    evaluation = Evaluation(
        load_model(options),
        tokenizer,
        config,
        problem_sets,
        options.model,
        num_samples=1 if options.samples is None else options.samples,
        num_summaries=options.summaries,
        instruction=INSTRUCTION if options.instruction is None else options.instruction,
        reward=reward,
        batch_size=options.batch_size,
        seed=options.seed,
        max_cached_tokens=options.max_cached_tokens,
    )
    if baseline is not None:  # before sampling, which may take hours
        found = differences(evaluation.protocol.as_dict(), baseline["protocol"], not_compared)
        if found:
            raise ValueError(f"{options.baseline} has another protocol: {'; '.join(found)}. Use the same settings.")
    records = evaluation.run(output / "samples.jsonl")
    results = results_of(evaluation.protocol, records)
    if baseline is not None:
        results["baseline"] = comparison(results, baseline)
    _write(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    save_samples(records, problem_sets, output / "samples.parquet")
    save_answers(records, problem_sets, output / "answers.parquet")
    _draw([results] if baseline is None else [baseline, results], output / "curve.png")
    _draw_settling(results, output / "settling.png")
    tables = filter(None, (table(results), settling_table(results)))
    say(json.dumps(results, indent=1) if options.json else "\n\n".join(tables))
    for said in filter(None, (*explain_zeros(results), limited_answers(results))):
        say(f"\n{said}", sys.stderr)
    say(
        f"\nIn {output}: results.json, samples.jsonl, samples.parquet, answers.parquet, curve.png, settling.png",
        sys.stderr,
    )
    return 0


def _write(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    try:
        from ..reporting.plots import plot_results
    except ModuleNotFoundError as error:
        say(
            f"{path.name} is not drawn, because {error.name} is missing. Run `pip install 'trl-anytime[plot]'`, then "
            f"`trl-anytime plot {for_shell(str(path.with_name('results.json')))}`.",
            sys.stderr,
        )
        return
    plot_results(results, path)


def _draw_settling(results: dict[str, Any], path: Path) -> None:
    """Draw what stopping early saves and loses, if there is a setting to try and matplotlib is installed."""
    try:
        from ..reporting.settling_plot import plot_settling
    except ModuleNotFoundError:  # `_draw` has said so
        return
    groups = results["settling"]["groups"]
    if any(group["points"] for group in groups.values()):
        plot_settling(results["settling"], path)


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
