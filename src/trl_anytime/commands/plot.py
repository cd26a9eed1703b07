"""`trl-anytime plot`: draw curves of results, of a run's evaluated checkpoints, or of its training."""

import argparse
from pathlib import Path

from .common import Commands, say


def add_to(commands: Commands) -> None:
    command = commands.add(
        "plot",
        run,
        "plot curves of results, of evaluated checkpoints, or of a training run over its steps",
        "  trl-anytime plot base trained --labels before after --output curves.png\n"
        "  trl-anytime plot outputs/eval/model --questions --output questions.png\n"
        "  trl-anytime plot outputs/model --output training.png",
    )
    command.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="results.json files or their folders; or one folder of `eval --checkpoints`; or one trainer_state.json, "
        "checkpoint or folder of checkpoints",
    )
    command.add_argument("--labels", nargs="+", metavar="TEXT", help="names of the curves (default: of the models)")
    command.add_argument(
        "--questions", action="store_true", help="which questions are right at which budget, of one result"
    )
    command.add_argument("--output", type=Path, default=Path("curves.png"), help="default: curves.png")


def run(options: argparse.Namespace) -> int:
    from ..evaluation.results import load_results
    from ..reporting.learning_curves import load_log_history
    from .checkpoints import load_evaluated

    try:
        from ..reporting.evaluation_plots import plot_checkpoints, plot_questions
        from ..reporting.plots import plot_results, plot_training
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing. Run `pip install 'trl-anytime[plot]'`.") from error

    alone = len(options.sources) == 1 and not options.labels
    first = options.sources[0]
    evaluated = load_evaluated(first) if first.is_dir() and not (first / "results.json").is_file() else {}
    sources = [] if evaluated else [_source_of_curves(path) for path in options.sources]
    is_training = any(source.name == "trainer_state.json" for source in sources)
    if options.questions and (not alone or evaluated or is_training):
        raise ValueError("--questions draws one evaluation. Give one results.json or its folder, without --labels.")
    if (evaluated or is_training) and not alone:
        raise ValueError("A training run is plotted alone. Give one source, without --labels.")
    if evaluated:
        plot_checkpoints(evaluated, options.output)
    elif is_training:
        plot_training(load_log_history(sources[0]), options.output)
    elif options.questions:
        plot_questions(load_results(sources[0]), options.output)
    else:
        plot_results([load_results(path) for path in sources], options.output, options.labels)
    say(str(options.output))
    return 0


def _source_of_curves(path: Path) -> Path:
    """
    Return the file with curves in a folder.

    The folder may be that of an evaluation, of a checkpoint, or of a run, whose last checkpoint is used.
    """
    if not path.is_dir():
        return path
    from ..training.checkpoint import checkpoints_of

    checkpoints = [folder / "trainer_state.json" for _, folder in reversed(checkpoints_of(path))]
    for file in (path / "results.json", path / "trainer_state.json", *checkpoints):
        if file.is_file():
            return file
    raise ValueError(
        f"{path} has neither results.json, nor trainer_state.json, nor a checkpoint. Give another folder."
    )
