"""`trl-anytime plot`: draw curves of results, or of a training run."""

import argparse
from pathlib import Path

from .common import Commands, say


def add_to(commands: Commands) -> None:
    command = commands.add(
        "plot",
        run,
        "plot curves of results, or of a training run over its steps",
        "  trl-anytime plot base trained --labels before after --output curves.png\n"
        "  trl-anytime plot outputs/model --output training.png",
    )
    command.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="results.json files or their folders; or one trainer_state.json, checkpoint or folder of checkpoints",
    )
    command.add_argument("--labels", nargs="+", metavar="TEXT", help="names of the curves (default: of the models)")
    command.add_argument("--output", type=Path, default=Path("curves.png"), help="default: curves.png")


def run(options: argparse.Namespace) -> int:
    from ..evaluation.results import load_results
    from ..reporting.learning_curves import load_log_history

    try:
        from ..reporting.plots import plot_results, plot_training
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing. Run `pip install 'trl-anytime[plot]'`.") from error

    sources = [_source_of_curves(path) for path in options.sources]
    if sources[0].name == "trainer_state.json":
        if len(sources) > 1 or options.labels:
            raise ValueError("A training run is plotted alone. Give one source, without --labels.")
        plot_training(load_log_history(sources[0]), options.output)
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
    checkpoints = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda file: (len(str(file)), file))
    for file in (path / "results.json", path / "trainer_state.json", *reversed(checkpoints)):
        if file.is_file():
            return file
    raise ValueError(
        f"{path} has neither results.json, nor trainer_state.json, nor a checkpoint. Give another folder."
    )
