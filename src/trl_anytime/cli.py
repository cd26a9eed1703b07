"""The command `trl-anytime`. Libraries are imported by the subcommand that needs them, so that help comes at once."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__
from .outside.command_line import CommandParser, PrintCompletion
from .outside.display import for_shell, for_terminal

if TYPE_CHECKING:
    from .inference.anytime_config import AnytimeConfig

# Exit codes
FAILED, BAD_INPUT, SERVER_FAILED, INTERRUPTED, PIPE_CLOSED = 1, 2, 3, 130, 141
_EXIT_CODES = f"""exit codes:
  0  done
  {FAILED}  a check failed (doctor, probe)
  {BAD_INPUT}  bad input: what is wrong and what to do is said on stderr
  {SERVER_FAILED}  a server or the Hub failed for too long; the same command goes on where it stopped
  {INTERRUPTED}  interrupted; likewise
  {PIPE_CLOSED}  nobody reads what is printed any more"""

# `None` leaves what the model's anytime config says
_PRESETS: dict[str, dict[str, Any]] = {
    # The paper's evaluation: the settings of its released scripts, and the data sets of its figures
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


def parse_budgets(text: str) -> list[int]:
    """Budgets from `250:8000:250` (first, last and step) or `250,1000,8000`."""
    try:
        if ":" in text:
            first, last, step = (int(part) for part in text.split(":"))
            budgets = list(range(first, last + 1, step))
        else:
            budgets = [int(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or budgets[0] < 1 or any(a >= b for a, b in zip(budgets, budgets[1:], strict=False)):
        in_order = ",".join(map(str, sorted({budget for budget in budgets if budget > 0})))
        fix = f"Give {in_order}." if in_order else "Give 250,1000,8000, or 250:8000:250 (first:last:step)."
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of increasing budgets. {fix}")
    return budgets


def _parse_change(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    return name.removeprefix("--"), value


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="trl-anytime",
        description="Evaluate, use and deploy reasoning models at any thinking budget.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=["bash", "zsh", "tcsh"],
        help="print a script for tab completion in that shell (needs the extra `completion`)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Any, help: str, examples: str, **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=f"examples:\n{examples}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )
        command.set_defaults(run=run)
        return command

    doctor = add(
        "doctor",
        _doctor,
        "check a training recipe before it runs",
        "  trl-anytime doctor 8k_anytime_uniform --processes 8 --gpu-memory 80\n"
        "  trl-anytime doctor mine.yaml --accelerate-config fsdp2\n"
        "  trl-anytime doctor mine.yaml --set budgets='1000 2000' --set model_name_or_path=outputs/sft --json",
    )
    doctor.add_argument("config", type=Path, help="file that `train --config` takes, or the name of a recipe")
    doctor.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        type=_parse_change,
        metavar="NAME=VALUE",
        help="a setting, instead of what the file says; can be repeated",
    )
    doctor.add_argument("--settings-only", action="store_true", help="leave out what needs the model or the data")
    doctor.add_argument("--load-model", action="store_true", help="measure tree attention on large weights too")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    launch = doctor.add_argument_group("GPUs that the run is going to have")
    launch.add_argument("--accelerate-config", type=Path, metavar="FILE", help="as of `train`")
    launch.add_argument(
        "--processes", type=int, metavar="N", help="how many (default: of the file, else this machine's)"
    )
    launch.add_argument("--sharding", choices=["none", "fsdp", "zero2", "zero3"], help="(default: of the file)")
    launch.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU (default: of this machine's)")

    train = add(
        "train",
        _train,
        "train by a recipe",
        "  trl-anytime train --config 8k_anytime_uniform --num_processes 8\n"
        "  trl-anytime train --config mine.yaml --accelerate_config zero2 --learning_rate 2e-6\n"
        "  accelerate launch -m trl_anytime.train --config mine.yaml",
        prefix_chars="\0",  # every word is passed on
        add_help=False,
    )
    train.add_argument(
        "words",
        nargs="*",
        metavar="--NAME VALUE",
        help="--config: a YAML file, or the name of a recipe; --accelerate_config: a file of `accelerate config`, or "
        "one of fsdp2, multi_gpu, single_gpu, zero2, zero3; options of `accelerate launch`; any other setting, which "
        "overrides the recipe's (`python -m trl_anytime.train --help` lists them)",
    )
    train.set_defaults(help_of_train=train.format_help)

    evaluate = add(
        "eval",
        _eval,
        "measure a whole accuracy-versus-budget curve",
        "  trl-anytime eval outputs/model --dataset aime24 --budgets 250:8000:250 --samples 16\n"
        "  trl-anytime eval outputs/model --dataset mine.jsonl --answer-column truth --limit 100\n"
        "  trl-anytime eval deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --preset paper --backend vllm --output base\n"
        "  trl-anytime eval outputs/model --preset paper --backend vllm --baseline base/results.json\n"
        "  trl-anytime eval outputs/model --dataset math500 --base-url http://localhost:8000 --concurrency 64",
    )
    _add_model(evaluate, with_backend=True)
    _add_sampling(evaluate)
    problems = evaluate.add_argument_group("problems")
    problems.add_argument(
        "--dataset-name",
        "--dataset",
        dest="datasets",
        action="append",
        metavar="NAME",
        help="aime24, aime25, amc, math500, minerva, olympiadbench, a Hub id (owner/name[:config]), a json, jsonl, "
        "parquet or csv file, or reasoning_gym:TASK?setting=value&size=500&seed=0; NAME=SOURCE names it; can be "
        "repeated",
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
        help="rows without a usable gold answer: an error (default), or leave them out",
    )
    problems.add_argument(
        "--system-prompt", metavar="TEXT", help="system message before each question (default: none)"
    )
    problems.add_argument("--instruction", help="text behind each question (default: the paper's)")
    measure = evaluate.add_argument_group("measurement")
    measure.add_argument("--preset", choices=sorted(_PRESETS), help="settings of a protocol; options override them")
    measure.add_argument("--samples", type=int, metavar="N", help="traces for each question (default: 1)")
    measure.add_argument("--summaries", type=int, default=1, metavar="N", help="answers at each cut (default: 1)")
    measure.add_argument(
        "--reward",
        metavar="FILE.py:NAME",
        help="a reward function as TRL's (default: this package's maths verifier, and a task's own scorer)",
    )
    measure.add_argument("--seed", type=int, default=0)
    measure.add_argument("--baseline", type=Path, metavar="RESULTS", help="results.json to compare with")
    measure.add_argument("--batch-size", type=int, metavar="N", help="samples that are computed together")
    measure.add_argument("--output", type=Path, help="folder of the results (default: outputs/eval/MODEL)")
    evaluate.add_argument("--json", action="store_true", help="print the results as JSON")

    generate = add(
        "generate",
        _generate,
        "answer a question at thinking budgets, as the tokens come",
        '  trl-anytime generate outputs/model "What is 2 + 2?" --budgets 100,1000\n'
        '  trl-anytime generate outputs/model "What is 2 + 2?" --base-url http://localhost:8000',
    )
    _add_model(generate, with_backend=False)
    generate.add_argument("question", help="the question; - reads it from standard input")
    generate.add_argument("--system-prompt", metavar="TEXT", help="system message (default: none)")
    generate.add_argument("--instruction", default="", help="text behind the question (default: none)")
    generate.add_argument("--seed", type=int)
    _add_sampling(generate)

    probe = add(
        "probe",
        _probe,
        "check that a server keeps to thinking budgets and uses the trained markers",
        "  trl-anytime probe outputs/model --base-url http://localhost:8000 --budgets 32,128,512\n"
        "  trl-anytime probe outputs/model --base-url http://localhost:8000 --budget-field thinking_token_budget",
    )
    _add_model(probe, with_backend=False, base_url_required=True)
    probe.add_argument("--budgets", type=parse_budgets, default=[32, 128, 512], help="default: 32,128,512")
    probe.add_argument(
        "--budget-field",
        metavar="FIELD",
        help="field of the request, dots lead into objects (default: vllm_xargs.thinking_budget, which a server of "
        "`serve-command` takes; vLLM's own is thinking_token_budget)",
    )
    probe.add_argument("--question", help="what to ask: something that takes long to think about")
    probe.add_argument("--json", action="store_true", help="print JSON")

    serve = add(
        "serve-command",
        _serve_command,
        "print how to serve a model as it was trained",
        "  trl-anytime serve-command outputs/model",
    )
    _add_model(serve, with_backend=False, with_server=False)
    serve.add_argument("--budget", type=int, metavar="TOKENS", help="of the requests (default: the largest trained)")
    serve.add_argument("--json", action="store_true", help="print JSON")

    plot = add(
        "plot",
        _plot,
        "draw curves of results, or of a training run over its steps",
        "  trl-anytime plot base trained --labels before after --output curves.png\n"
        "  trl-anytime plot outputs/model --output training.png",
    )
    plot.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="results.json files or their folders; or one trainer_state.json, checkpoint or folder of checkpoints",
    )
    plot.add_argument("--labels", nargs="+", metavar="TEXT", help="names of the curves (default: of the models)")
    plot.add_argument("--output", type=Path, default=Path("curves.png"), help="default: curves.png")
    return parser


def _add_model(
    parser: argparse.ArgumentParser, with_backend: bool, with_server: bool = True, base_url_required: bool = False
) -> None:
    parser.add_argument("model", help="folder or Hub id; of a served model too, for its tokenizer and anytime config")
    parser.add_argument(
        "--think-end", metavar="TEXT", help="text that ends the thinking, for models without anytime_config.json"
    )
    parser.add_argument("--truncation-bridge", metavar="TEXT", help="likewise, the text that closes a cut trace")
    parser.add_argument("--answer-bridge", metavar="TEXT", help="likewise, the text before the answer")
    if not with_server:
        return
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", required=base_url_required, help="an OpenAI-compatible server")
    server.add_argument("--served-name", metavar="NAME", help="name of the model there (default: the first one)")
    server.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="default: $OPENAI_API_KEY")
    server.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for a whole answer (default: %(default)g)"
    )
    server.add_argument(
        "--patience", type=float, default=900.0, help="seconds of trying one request again (default: %(default)g)"
    )
    if base_url_required:
        return
    server.add_argument("--concurrency", type=int, default=32, help="requests at a time (default: %(default)s)")
    local = parser.add_argument_group("local model")
    if with_backend:
        local.add_argument("--backend", choices=["transformers", "vllm"], default="transformers")
        local.add_argument(
            "--max-cached-tokens", type=int, metavar="N", help="transformers: tokens held in a cache at a time"
        )
        local.add_argument(
            "--max-model-len", type=int, metavar="N", help="vLLM: tokens of its context (default: the model's)"
        )
    local.add_argument("--dtype", default="auto", help="bfloat16, float32, … (default: that of the checkpoint)")
    local.add_argument("--device", help="default: cuda if there is one, else cpu")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    sampling = parser.add_argument_group("budgets and sampling (default: those of the model's anytime config)")
    sampling.add_argument("--budgets", type=parse_budgets, help="250,1000,8000 or 250:8000:250 (first:last:step)")
    sampling.add_argument("--max-summary-length", type=int, metavar="TOKENS", help="most tokens of an answer")
    sampling.add_argument("--temperature", type=float)
    sampling.add_argument("--top-p", type=float)
    sampling.add_argument("--top-k", type=int)
    sampling.add_argument("--min-p", type=float)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = argparse.Namespace()
    try:
        try:
            options = _parser().parse_args(arguments)
            if not sys.stderr.isatty():
                _hide_progress_bars()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
                return options.run(options)
        finally:
            sys.stdout.flush()  # here, where a closed pipe can be told
    except BrokenPipeError:
        # What is left in the buffer would be an error once more when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except ConnectionError as error:
        _print(f"trl-anytime: {error}", sys.stderr)
        return SERVER_FAILED
    except (ValueError, OSError) as error:
        _print(f"trl-anytime: {error}", sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        _print("trl-anytime: interrupted", sys.stderr)
        if vars(options).get("base_url"):  # threads may be waiting for the server, and what is finished is on the disk
            sys.stdout.flush()
            os._exit(INTERRUPTED)
        return INTERRUPTED


def _print(text: str, file: TextIO | None = None) -> None:
    """What a command says; there may be text of models, servers and files in it."""
    print(for_terminal(text), file=file)


def _hide_progress_bars() -> None:
    """Those of the libraries; ours hide themselves in a pipe."""
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _tokenizer_and_config(options: argparse.Namespace) -> "tuple[Any, AnytimeConfig]":
    """Return the model's tokenizer and anytime config, with the options for budgets and sampling in it."""
    from dataclasses import replace

    from transformers import AutoTokenizer

    from .inference.anytime_config import AnytimeConfig

    tokenizer = _loaded("tokenizer", options.model, AutoTokenizer.from_pretrained)
    config = AnytimeConfig.from_pretrained(
        options.model,
        tokenizer,
        think_end=options.think_end,
        truncation_bridge=options.truncation_bridge,
        answer_bridge=options.answer_bridge,
    )
    given = vars(options)
    sampling = {
        name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None
    }
    changes = {name: given[name] for name in ("budgets", "max_summary_length") if given.get(name) is not None}
    return tokenizer, replace(config, sampling=replace(config.sampling, **sampling), **changes)


def _client(options: argparse.Namespace) -> Any:
    from .rollout.http_backend import CompletionClient

    return CompletionClient(
        options.base_url,
        options.served_name,
        options.api_key,
        options.timeout,
        options.patience,
        concurrency=vars(options).get("concurrency", 1),
    )


def _load_model(options: argparse.Namespace) -> Any:
    """A server's client, an engine, or a model."""
    if options.base_url:
        return _client(options)
    if vars(options).get("backend") == "vllm":
        return _vllm()(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            generation_config="vllm",
            enable_prefix_caching=True,
        )
    from transformers import AutoModelForCausalLM

    device = _device(options.device)
    model = _loaded("weights", options.model, AutoModelForCausalLM.from_pretrained, dtype=options.dtype)
    return model.to(device)


def _check_machine(options: argparse.Namespace) -> None:
    """Refuse a library or a device that this machine lacks, before anything is loaded."""
    if options.base_url:
        return
    if vars(options).get("backend") == "vllm":
        _vllm()
    else:
        _device(options.device)


def _vllm() -> Any:
    """Return vLLM's engine."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"vLLM cannot be imported ({error}). Run `pip install 'trl-anytime[vllm]'`, or leave out --backend vllm."
        ) from error
    return LLM


def _device(name: str | None) -> str:
    """Return a device that can be used, by default a GPU if there is one."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used ({reason}). Leave it out, or give cpu.") from error
    return device


def _loaded(what: str, model: str, load: Callable[..., Any], **kwargs: Any) -> Any:
    """What transformers loads from a model's folder, or one line about why it cannot."""
    from .outside.validation import check_folder

    if Path(model).is_dir():
        check_folder(Path(model))
    try:
        return load(model, **kwargs)
    except ConnectionError:
        raise
    except Exception as error:  # a damaged file ends in any error of those who read it
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"The {what} of {model} cannot be loaded: {said[:500]}") from error


def _doctor(options: argparse.Namespace) -> int:
    from .checks.doctor import check_recipe, read_launch
    from .checks.finding import as_json, as_text

    report = check_recipe(
        options.config,
        dict(options.changes),
        read_launch(options.accelerate_config, options.processes, options.sharding),
        None if options.gpu_memory is None else int(options.gpu_memory * 2**30),
        options.settings_only,
        options.load_model,
    )
    findings, tables = report.findings, report.tables
    _print((as_json if options.json else as_text)(findings, tables))
    return 0 if report.passed else FAILED


def _train(options: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(options.words):
        _print(options.help_of_train())
        return 0
    import subprocess

    from accelerate.commands.launch import launch_command, launch_command_parser

    from .data.recipe import launch_words

    launch, settings = launch_words(options.words)
    try:
        launch_command(launch_command_parser().parse_args([*launch, "-m", "trl_anytime.train", *settings]))
    except subprocess.CalledProcessError as error:  # what went wrong stands above
        return error.returncode
    return 0


def _eval(options: argparse.Namespace) -> int:
    from .data.problems import as_flag
    from .evaluation.evaluate import (
        INSTRUCTION,
        Evaluation,
        comparison,
        differences,
        limited_answers,
        load_results,
        results_of,
        save_samples,
        table,
    )
    from .evaluation.evaluate import NOT_COMPARED as not_compared
    from .evaluation.problems import load_problems

    for name, value in _PRESETS.get(options.preset, {}).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not options.datasets:
        raise ValueError("There is nothing to evaluate on: set --dataset (such as --dataset aime24) or --preset.")
    _check_machine(options)
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
    tokenizer, config = _tokenizer_and_config(options)
    output = options.output or Path("outputs", "eval", Path(options.model).name)
    evaluation = Evaluation(
        _load_model(options),
        tokenizer,
        config,
        problem_sets,
        options.model,
        num_samples=1 if options.samples is None else options.samples,
        num_summaries=options.summaries,
        instruction=INSTRUCTION if options.instruction is None else options.instruction,
        system_prompt=options.system_prompt,
        reward=reward,
        batch_size=options.batch_size,
        seed=options.seed,
        max_cached_tokens=options.max_cached_tokens,
    )
    if baseline is not None:  # before hours are spent
        found = differences(evaluation.protocol.as_dict(), baseline["protocol"], not_compared)
        if found:
            raise ValueError(f"{options.baseline} comes from another protocol: {'; '.join(found)}.")
    records = evaluation.run(output / "samples.jsonl")
    results = results_of(evaluation.protocol, records)
    if baseline is not None:
        results["baseline"] = comparison(results, baseline)
    _write(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    save_samples(records, problem_sets, output / "samples.parquet")
    _draw([results] if baseline is None else [baseline, results], output / "curve.png")
    _print(json.dumps(results, indent=1) if options.json else table(results))
    if said := limited_answers(results):
        _print(f"\n{said}", sys.stderr)
    _print(f"\nIn {output}: results.json, samples.jsonl, samples.parquet, curve.png", sys.stderr)
    return 0


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _draw(results: list[dict[str, Any]], path: Path) -> None:
    try:
        from .reporting.plots import plot_results
    except ModuleNotFoundError as error:
        _print(
            f"No {path.name}, because {error.name} is missing: pip install 'trl-anytime[plot]', then trl-anytime plot "
            f"{for_shell(str(path.with_name('results.json')))}",
            sys.stderr,
        )
        return
    plot_results(results, path)


def _load_function(text: str) -> Any:
    """A function given as FILE.py:NAME."""
    from importlib.util import module_from_spec, spec_from_file_location

    path, _, name = text.rpartition(":")
    spec = spec_from_file_location(Path(path).stem, path) if Path(path).is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"A reward is given as FILE.py:NAME, and there is no such file: {text!r}.")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise ValueError(f"There is no function {name!r} in {path}.")
    return getattr(module, name)


def _generate(options: argparse.Namespace) -> int:
    from .inference.generate import context_length
    from .inference.streaming import stream_answers, streaming_sampler

    _check_machine(options)
    tokenizer, config = _tokenizer_and_config(options)
    model = _load_model(options)
    question = sys.stdin.read() if options.question == "-" else options.question
    prompt = config.question(tokenizer, f"{question} {options.instruction}".strip(), options.system_prompt)
    sample = streaming_sampler(model, tokenizer, config.sampling, options.seed)
    stream_answers(sample, tokenizer, config, prompt, context_length(model))
    return 0


def _probe(options: argparse.Namespace) -> int:
    from .inference.probe import OWN_FIELD, QUESTION, probe, results_table, verdict

    field = options.budget_field or OWN_FIELD
    budgets, options.budgets = options.budgets, None  # those of the config stay
    tokenizer, config = _tokenizer_and_config(options)
    results = probe(_client(options), config, tokenizer, budgets, field, options.question or QUESTION)
    wrong = verdict(results, field)
    if options.json:
        _print(json.dumps({"results": [asdict(result) for result in results], "wrong": wrong}, indent=1))
    else:
        _print(results_table(results))
        _print(f"\n{wrong or 'The server keeps to thinking budgets, with the trained markers.'}")
    return FAILED if wrong else 0


def _serve_command(options: argparse.Namespace) -> int:
    from .inference.serving import deployment, find_adapter, reasoning_parser

    tokenizer, config = _tokenizer_and_config(options)
    budget = config.budgets[-1] if options.budget is None else options.budget
    adapter, parser = find_adapter(options.model), reasoning_parser(config, tokenizer)
    how = deployment(options.model, config, budget, adapter, parser)
    _print(json.dumps(asdict(how), indent=1) if options.json else how.text())
    return 0


def _plot(options: argparse.Namespace) -> int:
    from .evaluation.evaluate import load_results
    from .reporting.learning_curves import load_log_history

    try:
        from .reporting.plots import plot_results, plot_training
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'trl-anytime[plot]'.") from error

    sources = [_source_of_curves(path) for path in options.sources]
    if sources[0].name == "trainer_state.json":
        if len(sources) > 1 or options.labels:
            raise ValueError("A training run is drawn alone and without --labels: give one source.")
        plot_training(load_log_history(sources[0]), options.output)
    else:
        plot_results([load_results(path) for path in sources], options.output, options.labels)
    _print(str(options.output))
    return 0


def _source_of_curves(path: Path) -> Path:
    """Return the file with curves in a folder: of an evaluation, of a checkpoint, or of the last of a run's."""
    if not path.is_dir():
        return path
    checkpoints = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: (len(str(file)), file))
    for file in (path / "results.json", path / "trainer_state.json", *reversed(checkpoints)):
        if file.is_file():
            return file
    raise ValueError(
        f"{path} holds no file results.json or trainer_state.json, and no checkpoint. Give another folder."
    )


if __name__ == "__main__":
    sys.exit(main())
