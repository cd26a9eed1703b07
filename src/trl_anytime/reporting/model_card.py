"""
Files of a model card: `README.md` from the template `model_card.md`, its pictures, and `.eval_results`.

The files depend on facts only, which `card_facts.py` collects. Nothing here asks the Hub, a trainer or a model.
"""

import importlib.util
import re
import shutil
from collections.abc import Container, Mapping
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..inference.anytime_config import ANYTIME_CONFIG_NAME
from ..inference.serving import deployment
from ..outside.display import for_json, for_shell, for_terminal
from .card_facts import CardFacts
from .learning_curves import Curve, training_curves

CARD, BUDGET_PICTURE, TRAINING_PICTURE = "README.md", "anytime_curve.png", "training_curves.png"
_TEMPLATE = Path(__file__).with_name("model_card.md")
_EVAL_RESULTS = ".eval_results"
_FILES = (CARD, BUDGET_PICTURE, TRAINING_PICTURE, f"{_EVAL_RESULTS}/anytime_*.yaml")  # patterns of a card


# Files


def write_card(facts: CardFacts, folder: Path) -> None:
    """
    Write the card with its pictures and `.eval_results` into a folder.

    Files of an earlier card are removed. Without matplotlib (the extra `plot`), the card has no pictures.

    Args:
        facts ([`~trl_anytime.reporting.card_facts.CardFacts`]):
            Facts of the card.
        folder (`Path`):
            Folder of the model.
    """
    pictures = [] if importlib.util.find_spec("matplotlib") is None else _draw(facts, folder)
    build_card(facts, pictures).save(folder / CARD)
    results = eval_result_files(facts)
    for name, entries in results.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
    _remove_others(folder, [CARD, *pictures, *results])


def copy_card(source: Path, target: Path) -> None:
    """Copy a card with its pictures and `.eval_results` from one folder to another."""
    if source.samefile(target):
        return
    names = _files(source)
    for name in names:
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy)
    _remove_others(target, names)


def _files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for pattern in _FILES for path in folder.glob(pattern)]


def _remove_others(folder: Path, names: Container[str]) -> None:
    """
    Remove files of other cards.

    Call this after the new files are written, because a push of the folder may be in progress.
    """
    for name in _files(folder):
        if name not in names:
            (folder / name).unlink()


def _draw(facts: CardFacts, folder: Path) -> list[str]:
    from .plots import plot_change, plot_training  # needs matplotlib

    pictures = []
    panels = {"training samples" if dataset is None else dataset.name: curves for dataset, curves in facts.curves}
    if panels:
        plot_change(panels, facts.metric_name, folder / BUDGET_PICTURE)
        pictures.append(BUDGET_PICTURE)
    if training_curves(facts.log_history)[0] is not None:
        plot_training(facts.log_history, folder / TRAINING_PICTURE)
        pictures.append(TRAINING_PICTURE)
    return pictures


def eval_result_files(facts: CardFacts) -> dict[str, list[EvalResultEntry]]:
    """
    Return what the Hub reads from `.eval_results/*.yaml`, with one file per budget.

    They have only accuracies of exactly these weights on data sets of the Hub, in percent.

    Args:
        facts ([`~trl_anytime.reporting.card_facts.CardFacts`]):
            Facts of the card.

    Returns:
        `dict[str, list[EvalResultEntry]]`: entries by file.
    """
    return {
        f"{_EVAL_RESULTS}/anytime_{_slug(dataset.name)}_{budget}.yaml": [
            EvalResultEntry(
                dataset_id=dataset.name,
                task_id=dataset.task,
                value=round(100 * accuracy, 2),
                dataset_revision=dataset.revision,
                notes=f"thinking budget of {budget} tokens, "
                f"temperature {facts.anytime_config.sampling.temperature:g}, mean of {facts.num_generations_eval}",
            )
        ]
        for dataset, curve in facts.measured
        if dataset.on_hub and facts.metric == "accuracy"
        for budget, accuracy in curve.rewards.items()
    }


# Card


def build_card(facts: CardFacts, pictures: Container[str] = ()) -> ModelCard:
    """
    Build the card from the template `model_card.md`.

    Args:
        facts ([`~trl_anytime.reporting.card_facts.CardFacts`]):
            Facts of the card.
        pictures (`Container[str]`, *optional*):
            Pictures beside the card, out of `BUDGET_PICTURE` and `TRAINING_PICTURE`.
    """
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation=None if facts.base_model is None else "adapter" if facts.adapter else "finetune",
        datasets=[facts.dataset.name] if facts.dataset.on_hub else None,
        license=facts.license,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({*facts.tags, *([facts.adapter.lower()] if facts.adapter else [])}),
        model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )
    config = facts.anytime_config
    served = "merged" if facts.adapter else facts.location
    server = deployment(served, config, config.budgets[-1], parser=facts.reasoning_parser)
    *most, last = map(str, config.budgets)
    return ModelCard.from_template(
        data,
        str(_TEMPLATE),
        facts=facts,
        config=config,
        config_file=ANYTIME_CONFIG_NAME,
        budgets=f"{', '.join(most)} or {last}" if most else f"at most {last}",
        sampling=", ".join(f"{name} {value:g}" for name, value in config.sampling.vllm().items()),
        title=f"{facts.metric_name} against thinking budget".capitalize(),
        budget_picture=BUDGET_PICTURE if BUDGET_PICTURE in pictures else None,
        training_picture=TRAINING_PICTURE if TRAINING_PICTURE in pictures else None,
        served=served,
        server=server,
        request=for_json({**server.requests[0].body, "messages": facts.question}, indent=2),
        evaluated_budgets=_evaluated_budgets,
        text=_text,
        code=_code,
        literal=for_json,
        shell_word=for_shell,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Return the entries of the `model-index`, one per budget. They are of exactly these weights."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset.name if dataset.on_hub else _slug(dataset.name),
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            dataset_split=dataset.split,
            dataset_revision=dataset.revision,
            metric_type=facts.metric,
            metric_name=f"{facts.metric_name} with a thinking budget of {budget} tokens",
            metric_value=round(reward, 4),
            metric_args={"thinking_budget": budget},
        )
        for dataset, curve in facts.measured
        for budget, reward in curve.rewards.items()
    ]


def _evaluated_budgets(curves: Mapping[str, Curve]) -> list[int]:
    return sorted({budget for curve in curves.values() for budget in curve.rewards})


# Text from outside, escaped for its place in the card


def _text(text: str) -> str:
    """Return text as one line of prose, in which nothing acts as Markdown, HTML or a formula."""
    return re.sub(r"([\\`*_\[\]<>|#~$&])", r"\\\1", for_terminal(" ".join(text.split()), one_line=True))


def _code(text: str) -> str:
    """Return text as a code span, between more backticks than there are in it."""
    line = for_terminal(text.replace("\n", " "), one_line=True)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "unnamed"
