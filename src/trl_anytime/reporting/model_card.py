"""
The card of a trained model: what it is, how good it is at which thinking budget, how to use it, how it was trained.

A function of facts: nothing here asks the Hub, a trainer or a model. `facts.py` collects them.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from ..inference.anytime_config import CONTRACT_NAME, AnytimeContract
from ..inference.serving import deployment
from .learning_curves import Curve, before_and_after, evaluations, training_curves

CARD, BUDGET_PICTURE, TRAINING_PICTURE = "README.md", "anytime_curve.png", "training_curves.png"
_EVAL_RESULTS = ".eval_results"
_FILES = (CARD, BUDGET_PICTURE, TRAINING_PICTURE, f"{_EVAL_RESULTS}/anytime_*.yaml")  # of a card, as patterns
_TRL_CITATION = """\
@software{vonwerra2020trl,
    title        = {{TRL: Transformers Reinforcement Learning}},
    author       = {Leandro von Werra and others},
    year         = 2020,
    url          = {https://github.com/huggingface/trl},
}"""


@dataclass(frozen=True)
class DataSet:
    """
    Where problems come from.

    Args:
        name (`str`):
            Id on the Hub, or any text.
        on_hub (`bool`, *optional*, defaults to `False`):
            Whether the name is an id on the Hub.
        num_rows (`int`, *optional*):
            Number of problems; a stream has none.
        config, split, revision (`str`, *optional*):
            Which part and state of it.
        task (`str`, *optional*, defaults to `"default"`):
            What the task is called where the data set is a benchmark on the Hub.
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
    What a card says.

    Args:
        name (`str`):
            Name of the model.
        model_id (`str`, *optional*):
            Id on the Hub to load it by. `None` for a folder.
        base_model (`str`, *optional*):
            Id on the Hub of the model that training started from. `None` if it is not known.
        architecture (`str`):
            Model type by its config.
        adapter (`str`, *optional*):
            Kind of adapter that was trained, such as `"LoRA"`; `None` for a whole model.
        tags (`list[str]`):
            Tags on the Hub.
        links (`list[str]`):
            Links to the run in trackers, as Markdown.
        contract ([`AnytimeContract`]):
            How the model is used.
        arm (`str`):
            See [`~trl_anytime.reporting.recipe_names.arm_name`].
        metric (`str`):
            What the mean reward of an evaluation is: `"accuracy"` or `"mean_reward"`.
        dataset ([`DataSet`]):
            Training data.
        eval_datasets (`dict[str, DataSet]`):
            Evaluation data by the names of the sets; a single set has the name `""`.
        num_generations_eval (`int`):
            Thinkings for each problem in an evaluation.
        log_history (`list[dict]`):
            What the run has logged.
        step, num_steps (`int`):
            Optimiser steps that these weights were trained for, and those that were planned.
        settings (`dict[str, str]`):
            Rows of the table of settings.
        question (`str` or `list[dict]`):
            A prompt for the code.
        versions (`dict[str, str]`):
            Versions of the libraries.
        paper (`dict[str, str]`):
            Title, id (arXiv) and citation (BibTeX) of the method.
    """

    name: str
    model_id: str | None
    base_model: str | None
    architecture: str
    adapter: str | None
    tags: list[str]
    links: list[str]
    contract: AnytimeContract
    arm: str
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

    @property
    def location(self) -> str:
        """What loads the model: its id on the Hub, or the folder of the card."""
        return self.model_id or "."

    @property
    def results(self) -> list[tuple[DataSet, Curve, Curve | None]]:
        """Each evaluation set with its first evaluation, and its last one if more steps lie between."""
        found = []
        for name, curves in evaluations(self.log_history).items():
            before, after = before_and_after(curves, self.step)
            if before is not None:
                found.append((self.eval_datasets.get(name, DataSet(name)), before, after))
        return found

    @property
    def measured(self) -> list[tuple[DataSet, Curve]]:
        """The evaluations that are of these very weights."""
        return [
            (dataset, curve)
            for dataset, before, after in self.results
            if (curve := before if after is None else after).step == self.step
        ]


# Files


def write_card(facts: CardFacts, folder: Path) -> None:
    """
    Write the card with its pictures and `.eval_results` into a folder; those of an earlier card are removed.

    Without matplotlib (the extra `plot`) there are no pictures, and the card mentions none.

    Args:
        facts ([`CardFacts`]):
            What the card says.
        folder (`Path`):
            Where the model lies.
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
    """Copy a card with its pictures and `.eval_results` from folder to folder."""
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
    """Afterwards, not before: a push of the folder may be under way."""
    for name in _files(folder):
        if name not in names:
            (folder / name).unlink()


def _draw(facts: CardFacts, folder: Path) -> list[str]:
    from .plots import plot_change, plot_training  # needs matplotlib

    pictures = []
    panels = {dataset.name: _labelled(before, after) for dataset, before, after in facts.results}
    metric = _metric_name(facts)
    first, last = training_curves(facts.log_history)
    if not panels and first is not None:
        panels, metric = {"training samples": _labelled(first, last)}, "mean reward"
    if panels:
        plot_change(panels, metric, folder / BUDGET_PICTURE)
        pictures.append(BUDGET_PICTURE)
    if first is not None:
        plot_training(facts.log_history, folder / TRAINING_PICTURE)
        pictures.append(TRAINING_PICTURE)
    return pictures


def eval_result_files(facts: CardFacts) -> dict[str, list[EvalResultEntry]]:
    """
    What the Hub reads from `.eval_results/*.yaml`: a file for each budget. Accuracies of these very weights on data
    sets of the Hub alone, in percent.

    Args:
        facts ([`CardFacts`]):
            What the card says.

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
                notes=f"thinking budget of {budget} tokens, temperature {facts.contract.sampling.temperature:g}, "
                f"mean of {facts.num_generations_eval}",
            )
        ]
        for dataset, curve in facts.measured
        if dataset.on_hub and facts.metric == "accuracy"
        for budget, accuracy in curve.rewards.items()
    }


# Card


def build_card(facts: CardFacts, pictures: Container[str] = ()) -> ModelCard:
    """
    The card.

    Args:
        facts ([`CardFacts`]):
            What it says.
        pictures (`Container[str]`, *optional*):
            The pictures beside it, of `BUDGET_PICTURE` and `TRAINING_PICTURE`.
    """
    data = ModelCardData(
        base_model=facts.base_model,
        base_model_relation=None if facts.base_model is None else "adapter" if facts.adapter else "finetune",
        datasets=[facts.dataset.name] if facts.dataset.on_hub else None,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=sorted({*facts.tags, *([facts.adapter.lower()] if facts.adapter else [])}),
        model_name=facts.name,
        eval_results=_eval_results(facts) or None,
    )
    sections = [
        f"# {_text(facts.name)}",
        _introduction(facts),
        _curves(facts, pictures),
        _usage(facts),
        _training(facts, pictures),
        "## Versions",
        "\n".join(f"- {name} {version}" for name, version in facts.versions.items()),
        "## Cite",
        f"```bibtex\n{facts.paper['citation']}\n```",
        f"```bibtex\n{_TRL_CITATION}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """The entries of the `model-index`: one for each budget, of these very weights alone."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset.name if dataset.on_hub else _slug(dataset.name),
            dataset_name=dataset.name,
            dataset_config=dataset.config,
            dataset_split=dataset.split,
            dataset_revision=dataset.revision,
            metric_type=facts.metric,
            metric_name=f"{_metric_name(facts)} with a thinking budget of {budget} tokens",
            metric_value=round(reward, 4),
            metric_args={"thinking_budget": budget},
        )
        for dataset, curve in facts.measured
        for budget, reward in curve.rewards.items()
    ]


def _introduction(facts: CardFacts) -> str:
    kind = f"A {facts.adapter} adapter" if facts.adapter else ""
    if facts.base_model is None:
        what = f"{kind} for a local {facts.architecture} model" if kind else f"A {facts.architecture} model"
    else:
        link = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        what = f"{kind} for {link}" if kind else f"A fine-tuned version of {link}"
    paper = f"[{facts.paper['title']}](https://huggingface.co/papers/{facts.paper['id']})"
    arm = {
        "custom": "Its settings are none of the paper's arms; they are listed below.",
        "Elastic Reasoning": "Its settings are those of [Elastic Reasoning](https://huggingface.co/papers/2505.05315).",
    }.get(facts.arm, f"Arm of the paper: **{facts.arm}**.")
    budgets = facts.contract.budgets
    return (
        f"{what}, trained on {_data_name(facts.dataset)} to answer after thinking for {_listed(budgets)} tokens. "
        f"Trained with `BRPOTrainer` of `trl_anytime`, which implements Budget Relative Policy Optimization (BRPO, "
        f"{paper}) on top of [TRL](https://github.com/huggingface/trl). {arm}"
    )


def _data_name(dataset: DataSet) -> str:
    if dataset.on_hub:
        return f"[{dataset.name}](https://huggingface.co/datasets/{dataset.name})"
    return _text(dataset.name) or "data without a name"


def _curves(facts: CardFacts, pictures: Container[str]) -> str:
    results, (first, last) = facts.results, training_curves(facts.log_history)
    if not results and first is None:
        return ""
    title = f"{_metric_name(facts) if results else 'mean reward'} against thinking budget".capitalize()
    parts = [f"## {title}"]
    if BUDGET_PICTURE in pictures:
        parts.append(f"![{title}]({BUDGET_PICTURE})")
    for dataset, before, after in results:
        parts += [_how_measured(facts, dataset, before, after), _curve_table(_labelled(before, after))]
    if not results and first is not None:
        parts.append(
            "There was no evaluation. These are mean rewards of the samples that the model was trained on, not "
            "accuracies on other problems."
        )
        parts.append(_curve_table(_labelled(first, last)))
    return "\n\n".join(parts)


def _labelled(before: Curve, after: Curve | None) -> dict[str, Curve]:
    """Curves by their labels, which say how long the model had been trained."""
    return {_label(curve): curve for curve in (before, after) if curve is not None}


def _label(curve: Curve) -> str:
    if curve.first_step is None:
        return "before training" if curve.step == 0 else f"after step {curve.step}"
    return f"steps {curve.first_step} to {curve.step}" if curve.first_step < curve.step else f"step {curve.step}"


def _curve_table(curves: Mapping[str, Curve]) -> str:
    budgets = sorted({budget for curve in curves.values() for budget in curve.rewards})
    rows = [[str(budget), *(_number(curve.rewards.get(budget)) for curve in curves.values())] for budget in budgets]
    return _table(["thinking budget (tokens)", *curves], rows, numbers=True)


def _number(reward: float | None) -> str:
    return "–" if reward is None else f"{reward:.3f}"


def _how_measured(facts: CardFacts, dataset: DataSet, before: Curve, after: Curve | None) -> str:
    problems = "" if dataset.num_rows is None else f"{dataset.num_rows:,} problems, "
    thinkings = "1 thinking" if facts.num_generations_eval == 1 else f"{facts.num_generations_eval} thinkings"
    sentences = [
        f"{_metric_name(facts).capitalize()} on {_data_name(dataset)} ({problems}{thinkings} each), at temperature "
        f"{facts.contract.sampling.temperature:g}, with one answer per thinking and budget."
    ]
    if facts.metric != "accuracy":
        sentences.append("This is the mean of the reward functions, which need not be an accuracy.")
    last = before if after is None else after
    if last.step != facts.step:
        sentences.append(
            f"The last evaluation was after step {last.step}; the weights here are those of step {facts.step}."
        )
    if last.unscored:
        sentences.append(f"{last.unscored:.1%} of the answers could not be graded and are left out.")
    return " ".join(sentences)


def _usage(facts: CardFacts) -> str:
    contract, markers = facts.contract, facts.contract.markers
    served = "merged" if facts.adapter else facts.location
    sampling = ", ".join(f"{name} {value:g}" for name, value in contract.sampling.vllm().items())
    return "\n\n".join(
        [
            "## Use at any thinking budget",
            f"The model thinks until {_code(markers.think_end)}, or until the budget is used up; then "
            f"{_code(repr(markers.truncation_bridge))} closes its thinking. In both cases "
            f"{_code(repr(markers.answer_bridge))} follows, and then the answer, in training of at most "
            f"{contract.max_summary_length} tokens. It was trained with {sampling}. All of this, with the token ids, "
            f"is in [`{CONTRACT_NAME}`]({CONTRACT_NAME}), which the package `trl-anytime` reads.",
            "### transformers",
            f"```python\n{_transformers_code(facts)}\n```",
            "### vLLM",
            *_vllm(facts, served),
            f"For servers without the package, `trl-anytime serve-command {served}` prints the requests by token ids "
            "that do the same. `trl-anytime probe` tells whether a server keeps to a budget, `trl-anytime eval` "
            "measures the whole curve.",
        ]
    )


def _transformers_code(facts: CardFacts) -> str:
    comment = "  # or a folder" if facts.model_id else "  # the folder of this card"
    generate = f"budgets={facts.contract.budgets}"
    if facts.adapter is None:
        imports = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "from trl_anytime import anytime_generate",
        ]
        load = ['model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto")']
    else:
        imports = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "from trl_anytime import AnytimeContract, anytime_generate",
        ]
        base = _literal(facts.base_model or "path/of/the/base/model")
        load = [
            f'base = AutoModelForCausalLM.from_pretrained({base}, device_map="auto")',
            "model = PeftModel.from_pretrained(base, model_id)",
            "contract = AnytimeContract.load(model_id)",
        ]
        generate += ", contract=contract"
    return "\n".join(
        [
            *imports,
            "",
            f"model_id = {_literal(facts.location)}{comment}",
            "tokenizer = AutoTokenizer.from_pretrained(model_id)",
            *load,
            f"question = {_literal(facts.question)}",
            f"(output,) = anytime_generate(model, tokenizer, [question], {generate})",
            "for answer in output.answers:",
            "    print(answer.budget, answer.thinking_tokens, answer.answers[0])",
        ]
    )


def _vllm(facts: CardFacts, served: str) -> list[str]:
    parts = []
    if facts.adapter is not None:
        merge = [
            "# Goes on from the code above: vLLM serves the adapter as part of its base model",
            f"model.merge_and_unload().save_pretrained({_literal(served)})",
            f"tokenizer.save_pretrained({_literal(served)})",
            f"contract.save({_literal(served)})",
        ]
        parts.append("```python\n" + "\n".join(merge) + "\n```")
    if isinstance(facts.question, str):  # no chat: the engine itself
        engine = [
            "from transformers import AutoTokenizer",
            "from trl_anytime import anytime_generate",
            "from vllm import LLM",
            "",
            f"llm = LLM({_literal(served)}, enable_prefix_caching=True)",
            f"tokenizer = AutoTokenizer.from_pretrained({_literal(served)})",
            f"question = {_literal(facts.question)}",
            f"(output,) = anytime_generate(llm, tokenizer, [question], budgets={facts.contract.budgets})",
        ]
        return [*parts, "```python\n" + "\n".join(engine) + "\n```"]
    server = deployment("vllm", served, facts.contract, facts.contract.budgets[-1])
    chat = server.requests[0]
    body = json.dumps({**chat.body, "messages": facts.question}, indent=2, ensure_ascii=False)
    url = f"http://localhost:8000{chat.path}"
    return [
        *parts,
        f"```bash\n{server.command_line()}\n```",
        "The server needs the package for its logits processor, which enforces the budget of each request:",
        f"```bash\ncurl {url} -H 'Content-Type: application/json' -d @- <<'END'\n{body}\nEND\n```",
    ]


def _training(facts: CardFacts, pictures: Container[str]) -> str:
    parts = ["## Training", f"The weights after step {facts.step} of {facts.num_steps}."]
    if TRAINING_PICTURE in pictures:
        parts.append(f"![Rewards and thinking length over the training steps]({TRAINING_PICTURE})")
    parts += facts.links
    return "\n\n".join(
        [*parts, _table(["setting", "value"], [[name, _text(value)] for name, value in facts.settings.items()])]
    )


# Markdown


def _metric_name(facts: CardFacts) -> str:
    return facts.metric.replace("_", " ")


def _listed(budgets: Sequence[int]) -> str:
    *most, last = map(str, budgets)
    return f"{', '.join(most)} or {last}" if most else f"at most {last}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)] if numbers else ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(text: str) -> str:
    """Text of others on one line, without what Markdown would take for its own."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Text as code, in a fence that does not occur in it."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"


def _literal(value: Any) -> str:
    """Text, or lists and dictionaries of it, as Python and JSON both write it."""
    return json.dumps(value, ensure_ascii=False)


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "unnamed"
