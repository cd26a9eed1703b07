"""Facts of a model card, collected from the trainer of the model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import SchedulerType
from trl.data_utils import is_conversational

from ..brpo_config import BRPOConfig
from ..inference.anytime_config import AnytimeConfig
from ..inference.serving import reasoning_parser
from ..outside.versions import installed_versions
from ..rewards import AnswerReward, TaskReward
from ..rewards.tasks.source import library_licence, library_version
from .learning_curves import Curve, before_and_after, evaluations, training_curves
from .recipe_names import recipe_name

_LIBRARIES = ("trl", "transformers", "torch", "accelerate", "datasets", "tokenizers", "huggingface_hub")
_ADAPTERS = {"LORA": "LoRA"}  # spelling in text
# A file of a data set on the Hub, as `datasets` records its downloads
_HUB_FILE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]+)/")
_BADGE = re.compile(r"^(\[<img [^<>]*>\])\((https?://.*)\)", flags=re.MULTILINE)


@dataclass(frozen=True)
class DataSet:
    """
    Source of problems.

    Args:
        name (`str`):
            Id on the Hub, or any text.
        on_hub (`bool`, *optional*, defaults to `False`):
            Whether the name is an id on the Hub.
        num_rows (`int`, *optional*):
            Number of problems. `None` for a stream.
        config, split, revision (`str`, *optional*):
            Configuration, split and revision of the data set.
        task (`str`, *optional*, defaults to `"default"`):
            Name of the task, if the data set is a benchmark on the Hub.
    """

    name: str
    on_hub: bool = False
    num_rows: int | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    task: str = "default"


@dataclass(frozen=True)
class CardFacts:
    """
    Facts that a card is built from.

    Args:
        name (`str`):
            Name of the model.
        model_id (`str`, *optional*):
            Id on the Hub from which it is loaded. `None` for a folder.
        base_model (`str`, *optional*):
            Id on the Hub of the model that training started from. `None` if not known.
        architecture (`str`):
            Model type in the model's config.
        adapter (`str`, *optional*):
            Kind of adapter that was trained, such as `"LoRA"`. `None` for a whole model.
        tags (`list[str]`):
            Tags on the Hub.
        links (`list[str]`):
            Links to the run in trackers, as Markdown.
        anytime_config ([`AnytimeConfig`]):
            Anytime config of the model.
        recipe (`str`):
            See [`~trl_anytime.reporting.recipe_names.recipe_name`].
        metric (`str`):
            Name of the mean reward of an evaluation: `"accuracy"` or `"mean_reward"`.
        dataset ([`DataSet`]):
            Training data.
        eval_datasets (`dict[str, DataSet]`):
            Evaluation data by the names of the sets. A single set has the name `""`.
        num_generations_eval (`int`):
            Traces for each problem in an evaluation.
        log_history (`list[dict]`):
            Logs of the run.
        step, num_steps (`int`):
            Optimiser steps that these weights were trained for, and planned steps.
        settings (`dict[str, str]`):
            Rows of the table of settings.
        question (`str` or `list[dict]`):
            Prompt in the example code.
        versions (`dict[str, str]`):
            Versions of the libraries.
        paper (`dict[str, str]`):
            Title, id (arXiv) and citation (BibTeX) of the method.
        license (`str`, *optional*):
            Licence of the weights. `None` if it is not stated.
        reasoning_parser (`str`, *optional*):
            See [`~trl_anytime.inference.serving.reasoning_parser`].
    """

    name: str
    model_id: str | None
    base_model: str | None
    architecture: str
    adapter: str | None
    tags: list[str]
    links: list[str]
    anytime_config: AnytimeConfig
    recipe: str
    metric: str
    dataset: DataSet
    eval_datasets: dict[str, DataSet]
    num_generations_eval: int
    log_history: list[dict[str, Any]]
    step: int
    num_steps: int
    settings: dict[str, str]
    question: Any
    versions: dict[str, str]
    paper: dict[str, str]
    license: str | None = None
    reasoning_parser: str | None = None

    @property
    def location(self) -> str:
        """Return what to load the model from: its id on the Hub, or the folder of the card."""
        return " ".join(self.model_id.split()) if self.model_id else "."

    @property
    def metric_name(self) -> str:
        """Return the name of what the curves show."""
        return self.metric.replace("_", " ") if self.results else "mean reward"

    @property
    def results(self) -> list[tuple[DataSet, Curve, Curve | None]]:
        """Return each evaluation set with its first evaluation, and the last one if it has more steps."""
        found = []
        for name, curves in evaluations(self.log_history).items():
            before, after = before_and_after(curves, self.step)
            if before is not None:
                found.append((self.eval_datasets.get(name, DataSet(name)), before, after))
        return found

    @property
    def measured(self) -> list[tuple[DataSet, Curve]]:
        """Return the evaluations of exactly these weights."""
        return [
            (dataset, curve)
            for dataset, before, after in self.results
            if (curve := before if after is None else after).step == self.step
        ]

    @property
    def curves(self) -> list[tuple[DataSet | None, dict[str, Curve]]]:
        """
        Return the curves of each evaluation set by their labels.

        Without an evaluation, they are those of the training samples.
        """
        if results := self.results:
            return [(dataset, _labelled(before, after)) for dataset, before, after in results]
        first, last = training_curves(self.log_history)
        return [] if first is None else [(None, _labelled(first, last))]


def _labelled(before: Curve, after: Curve | None) -> dict[str, Curve]:
    """Return curves by their labels, which say how long the model was trained."""
    return {_label(curve): curve for curve in (before, after) if curve is not None}


def _label(curve: Curve) -> str:
    if curve.first_step is None:
        return "before training" if curve.step == 0 else f"after step {curve.step}"
    return f"steps {curve.first_step} to {curve.step}" if curve.first_step < curve.step else f"step {curve.step}"


def card_facts(
    trainer: Any,
    anytime_config: AnytimeConfig,
    paper: dict[str, str],
    prompt: Any,
    card_of_trl: ModelCard,
    model_name: str | None = None,
    dataset_name: str | None = None,
) -> CardFacts:
    """
    Collect the facts of a card.

    Args:
        trainer ([`BRPOTrainer`]):
            The trainer, before, during or after training.
        anytime_config ([`AnytimeConfig`]):
            Anytime config of the model.
        paper (`dict[str, str]`):
            Title, id and citation of the method.
        prompt (`str` or `list[dict]`):
            A prompt of the training data. It decides whether the example is a conversation.
        card_of_trl ([`~huggingface_hub.ModelCard`]):
            TRL's card, for its tags and its links to trackers.
        model_name (`str`, *optional*):
            Name of the model. Defaults to that of the output folder.
        dataset_name (`str`, *optional*):
            Name of the training data. Defaults to `card_dataset`, or to where the data was loaded from.
    """
    args: BRPOConfig = trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = next(iter(model.peft_config.values())) if is_peft_model(model) else None
    question = args.card_question or "What is 2 + 2?"
    uses_tasks = any(isinstance(func, TaskReward) for func in trainer.reward_funcs)
    libraries = [*_LIBRARIES, *(["peft"] if adapter else []), *(["vllm"] if args.use_vllm else [])]
    return CardFacts(
        name=model_name or Path(str(args.output_dir)).absolute().name,
        model_id=trainer.hub_model_id,
        base_model=args.card_base_model or _loaded_from(model.config._name_or_path),
        architecture=model.config.model_type,
        adapter=None if adapter is None else _ADAPTERS.get(adapter.peft_type.value, adapter.peft_type.value),
        tags=card_of_trl.data["tags"],
        links=links_to_trackers(card_of_trl.text),
        anytime_config=anytime_config,
        recipe=_recipe(args),
        metric=args.card_metric or ("accuracy" if _is_accuracy(trainer) else "mean_reward"),
        dataset=_describe(trainer.train_dataset, dataset_name or args.card_dataset, "unnamed data"),
        eval_datasets=_eval_datasets(trainer.eval_dataset, args.card_eval_dataset),
        num_generations_eval=trainer.num_generations_eval,
        log_history=trainer.state.log_history,
        step=_step_of_weights(trainer),
        num_steps=max(trainer.state.max_steps, args.max_steps, 0),
        settings=_settings(trainer, anytime_config, adapter),
        question=anytime_config.conversation(question) if is_conversational({"prompt": prompt}) else question,
        versions={
            **installed_versions(["trl_anytime", *libraries]),
            **({"reasoning-gym": f"{library_version()} ({library_licence()})"} if uses_tasks else {}),
        },
        paper=paper,
        license=args.card_license,
        reasoning_parser=reasoning_parser(anytime_config, trainer.processing_class),
    )


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of an id on the Hub, `name` or `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name)


def links_to_trackers(text: str) -> list[str]:
    """
    Find the badges in TRL's card that lead to the run in its trackers.

    Args:
        text (`str`):
            TRL's card, with names of runs in its addresses as they are.

    Returns:
        `list[str]`: the badges as Markdown.
    """
    return [f"{badge}({quote(address, safe='/:?&=%#+,;@~')})" for badge, address in _BADGE.findall(text)]


def _loaded_from(name_or_path: str | None) -> str | None:
    """Return the id of a model that was loaded from the Hub, or `None` for any other."""
    name = name_or_path or ""
    return name if is_hub_id(name) and not Path(name).exists() else None


def _recipe(args: BRPOConfig) -> str:
    if args.summary_reward is not None:  # in none of the papers
        return "custom"
    return recipe_name(
        args.budgets,
        args.prior,
        args.num_summaries,
        args.max_summary_length,
        args.baseline,
        args.progress_decay,
        args.summary_policy,
        args.summary_weight,
    )


def _is_accuracy(trainer: Any) -> bool:
    """
    Return whether the mean reward is certainly an accuracy.

    It is, if the only reward is one of our verifiers that give 0 or 1.
    """
    weighted = [
        (func, weight)
        for func, weight in zip(trainer.reward_funcs, trainer.reward_weights.tolist(), strict=True)
        if weight != 0
    ]
    if len(weighted) != 1:
        return False
    ((func, weight),) = weighted
    gives_parts = isinstance(func, TaskReward)  # some scorers, for an answer that is nearly right
    return weight == 1 and isinstance(func, AnswerReward) and not gives_parts


def _step_of_weights(trainer: Any) -> int:
    state = trainer.state
    if trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_global_step:
        return state.best_global_step
    return state.global_step


def _eval_datasets(datasets: Any, given: str | None) -> dict[str, DataSet]:
    if datasets is None:
        return {"": DataSet(given or "the evaluation set")}
    if not isinstance(datasets, dict):
        return {"": _describe(datasets, given, "the evaluation set")}
    return {name: _describe(dataset, None, name) for name, dataset in datasets.items()}


def _describe(dataset: Dataset | IterableDataset, given: str | None, otherwise: str) -> DataSet:
    """
    Describe a data set.

    Its name is `given` (`owner/name:task` or any text), or its id if it was loaded from the Hub, or `otherwise`.
    """
    num_rows = None if isinstance(dataset, IterableDataset) else len(dataset)
    split = None if dataset.split is None else str(dataset.split)
    files = dataset.info.download_checksums or {}
    sources = {match.groups() for file in files if (match := _HUB_FILE.match(str(file)))}
    loaded, revision = sources.pop() if len(sources) == 1 else (None, None)
    name, _, task = (given or loaded or "").partition(":")
    if "/" in name and is_hub_id(name) and not Path(name).exists():
        config = dataset.info.config_name if name == loaded else None
        return DataSet(
            name,
            on_hub=True,
            num_rows=num_rows,
            config=config,
            split=split,
            revision=revision if name == loaded else None,
            task=task or config or "default",
        )
    return DataSet(given or otherwise, num_rows=num_rows, split=split)


def _settings(trainer: Any, config: AnytimeConfig, adapter: Any) -> dict[str, str]:
    args: BRPOConfig = trainer.args
    weights = zip(config.budgets, config.prior, strict=True)
    rewards = list(zip(trainer.reward_func_names, trainer.reward_weights.tolist(), strict=True))
    if args.summary_reward is not None:  # the functions grade evaluations only
        rewards = [(f"{args.summary_reward} of the reference answer, without sampled summaries", 1.0)]
    is_stream = isinstance(trainer.train_dataset, IterableDataset)
    baseline = {"v1": f"v1, λ = {args.progress_decay:g}", "brpo": f"brpo, λ = {args.progress_decay:g}"}
    scheduler = SchedulerType(args.lr_scheduler_type).value
    settings = {
        "recipe": _recipe(args),
        "thinking budgets (weight of each)": ", ".join(f"{budget} ({weight:.3g})" for budget, weight in weights),
        "prior": args.prior if isinstance(args.prior, str) else "list of weights",
        "baseline": baseline.get(args.baseline, args.baseline),
        "summaries per trace and budget": f"{args.num_summaries}, {args.summary_policy}",
        "weight of a summary": str(args.summary_weight),
        "tokens of a summary": f"at most {args.max_summary_length}",
        "traces per problem": str(trainer.num_generations),
        "problems": "a stream" if is_stream else f"{len(trainer.train_dataset):,}",
        "traces per optimiser step": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "rewards (weight of each)": ", ".join(f"{name} ({weight:g})" for name, weight in rewards),
        "learning rate": f"{args.learning_rate:g}, {scheduler}",
        "loss": f"{args.loss_type}, clipped at {args.epsilon:g}, KL coefficient {args.beta:g}",
        "iterations per generation batch": str(args.num_iterations),
        "temperature": f"{args.temperature:g}",
        "seed": str(args.seed),
    }
    if adapter is not None:
        modules = adapter.target_modules or ()
        names = {modules} if isinstance(modules, str) else {module.split(".")[-1] for module in modules}
        rank = f"r = {adapter.r}, alpha = {adapter.lora_alpha}, " if adapter.peft_type == "LORA" else ""
        settings["adapter"] = f"{rank}on {', '.join(sorted(names))}"
    return settings
