"""One evaluation of `trl-anytime eval`: from options to samples, results, files and pictures."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..outside.display import for_shell
from ..outside.files import write_whole
from .common import say
from .loading import checksum_of_weights, load_model, load_tokenizer_and_config

if TYPE_CHECKING:
    from ..evaluation.evaluate import Evaluation
    from ..evaluation.problems import ProblemSet

FILES = "results.json, samples.jsonl, samples.parquet, answers.parquet, curve.png, questions.png, settling.png"


@dataclass(frozen=True)
class Measurement:
    """
    What the evaluations of one command have in common.

    Args:
        problem_sets (`list[ProblemSet]`):
            Problems.
        reward (`Callable`, *optional*):
            Reward of the user.
        baseline (`dict`, *optional*):
            Results to compare with.
    """

    problem_sets: "list[ProblemSet]"
    reward: Callable[..., Any] | None
    baseline: dict[str, Any] | None

    @classmethod
    def of(cls, options: argparse.Namespace, reward: Callable[..., Any] | None) -> "Measurement":
        """Read what the options name, but for the model."""
        if not math.isfinite(options.right_at):
            raise ValueError(f"--right-at must be a number, got {options.right_at}. Set a reward, such as 0.5.")
        from ..data.problems import as_flag
        from ..evaluation.problems import load_problems
        from ..evaluation.results import load_results

        baseline = None if options.baseline is None else load_results(options.baseline)
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
        return cls(problem_sets, reward, baseline)

    def evaluation(self, options: argparse.Namespace, run: Path | None = None) -> "Evaluation":
        """
        Return the evaluation of `options.model`, without the model itself, and refuse what does not fit.

        Args:
            options (`Namespace`):
                Options of the command.
            run (`Path`, *optional*):
                Folder of the run, if the model is a checkpoint of it.
        """
        from ..evaluation.evaluate import INSTRUCTION, Evaluation
        from ..evaluation.protocol import NOT_COMPARED, differences

        tokenizer, config = load_tokenizer_and_config(options, run)
        evaluation = Evaluation(
            None,
            tokenizer,
            config,
            self.problem_sets,
            options.model,
            num_samples=1 if options.samples is None else options.samples,
            num_summaries=options.summaries,
            instruction=INSTRUCTION if options.instruction is None else options.instruction,
            reward=self.reward,
            batch_size=options.batch_size,
            seed=options.seed,
            max_cached_tokens=options.max_cached_tokens,
            weights=None if options.base_url else checksum_of_weights(options.model),
        )
        # Before sampling, which may take hours
        if self.baseline is not None:
            found = differences(evaluation.protocol.as_dict(), self.baseline["protocol"], NOT_COMPARED)
            if found:
                raise ValueError(
                    f"{options.baseline} has another protocol: {'; '.join(found)}. Use the same settings."
                )
        self._frontiers(evaluation, options)
        return evaluation

    def _frontiers(self, evaluation: "Evaluation", options: argparse.Namespace) -> dict[str, Any]:
        from ..evaluation.frontier import load_frontiers
        from ..evaluation.results import curve_names

        if options.frontier is None:
            return {}
        names = curve_names(problems.name for problems in self.problem_sets)
        return load_frontiers(options.frontier, names, evaluation.config.budgets)

    def measure(self, evaluation: "Evaluation", options: argparse.Namespace, output: Path) -> dict[str, Any]:
        """
        Draw the samples that are missing, and write results, tables and pictures.

        The model is loaded only if samples are missing, and not kept.

        Args:
            evaluation ([`Evaluation`]):
                What [`evaluation`] returned.
            options (`Namespace`):
                Options of the command.
            output (`Path`):
                Folder of the results.
        """
        from ..evaluation.results import comparison, results_of, save_answers, save_samples

        journal = output / "samples.jsonl"
        records = evaluation.finished(journal)
        if records is None:
            records = replace(evaluation, model=load_model(options)).run(journal)
        results = results_of(evaluation.protocol, records, options.right_at, self._frontiers(evaluation, options))
        if self.baseline is not None:
            results["baseline"] = comparison(results, self.baseline)
        write_whole(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        save_samples(records, self.problem_sets, output / "samples.parquet", options.right_at)
        save_answers(records, self.problem_sets, output / "answers.parquet", options.right_at)
        draw([results] if self.baseline is None else [self.baseline, results], output)
        return results


def print_results(results: dict[str, Any], as_json: bool) -> None:
    """Print the results of one model, and what stands out in them."""
    from ..evaluation.results import table
    from ..evaluation.settling import settling_table

    tables = filter(None, (table(results), settling_table(results)))
    say(json.dumps(results, indent=1) if as_json else "\n\n".join(tables))
    print_notes(results)


def print_notes(results: dict[str, Any]) -> None:
    """Print what stands out in results, to stderr."""
    from ..evaluation.results import limited_answers
    from ..evaluation.zeros import explain_zeros

    for said in filter(None, (*explain_zeros(results), limited_answers(results))):
        say(f"\n{said}", sys.stderr)


def draw(results: list[dict[str, Any]], output: Path) -> None:
    """Draw curves, and questions and early stops of the last results. Without matplotlib, say so."""
    try:
        from ..reporting.evaluation_plots import plot_questions
        from ..reporting.plots import plot_results
        from ..reporting.settling_plot import plot_settling
    except ModuleNotFoundError as error:
        say_not_drawn(error, output)
        return
    plot_results(results, output / "curve.png")
    plot_questions(results[-1], output / "questions.png")
    settling = results[-1]["settling"]
    if any(group["points"] for group in settling["groups"].values()):
        plot_settling(settling, output / "settling.png")


def say_not_drawn(error: ModuleNotFoundError, output: Path) -> None:
    """Say that the pictures of a folder are not drawn, and what to do."""
    say(
        f"The pictures in {output} are not drawn, because {error.name} is missing. Run `pip install "
        f"'trl-anytime[plot]'`, then `trl-anytime plot {for_shell(str(output))}`.",
        sys.stderr,
    )
