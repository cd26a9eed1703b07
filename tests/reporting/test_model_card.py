"""The card of a model: what it says, what its metadata say, and that its code runs."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import jinja2
import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset, NamedSplit
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import ROOT
from tests.support.cards import curve_tables, metrics_of_headings
from tests.support.tiny import graded_trainer, make_config, make_dataset, make_model, make_tokenizer, parity_reward
from trl_anytime import AnytimeConfig
from trl_anytime.inference.serving import deployment, reasoning_parser
from trl_anytime.reporting.card_facts import CardFacts, DataSet, links_to_trackers
from trl_anytime.reporting.learning_curves import before_and_after, evaluations, training_curves
from trl_anytime.reporting.model_card import (
    BUDGET_PICTURE,
    CARD,
    TRAINING_PICTURE,
    build_card,
    eval_result_files,
    write_card,
)
from trl_anytime.reporting.recipe_names import recipe_name

CONFIGS = ROOT / "examples" / "configs"


# Names of recipes


@pytest.mark.parametrize(
    ("config", "recipe"),
    [
        ("8k_grpo", "GRPO"),
        ("8k_anytime_linear", "AnytimeReasoner-linear"),
        ("8k_anytime_uniform", "AnytimeReasoner-uniform"),
        ("8k_anytime_base", "AnytimeReasoner-base"),
        ("8k_grpo_linear", "GRPO+linear"),
        ("8k_grpo_decouple", "GRPO+decouple"),
        ("8k_grpo_vr", "GRPO+vr"),
        ("16k_anytime_uniform", "AnytimeReasoner-uniform"),
        ("elastic_reasoning", "Elastic Reasoning"),
        ("mrt", "custom"),
        ("reo_rl", "custom"),
    ],
)
def test_recipes_of_the_papers(config, recipe):
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())
    names = ("budgets", "prior", "num_summaries", "max_summary_length", "baseline", "summary_policy")
    assert recipe_name(**{name: settings[name] for name in names}, progress_decay=0.5) == recipe


UNIFORM = {
    "budgets": [1, 3],
    "prior": "uniform",
    "num_summaries": 4,
    "max_summary_length": 2,
    "baseline": "brpo",
    "progress_decay": 0.5,
    "summary_policy": "decoupled",
}


@pytest.mark.parametrize(
    ("change", "recipe"),
    [
        ({"prior": [2, 2]}, "AnytimeReasoner-uniform"),
        ({"prior": [1, 3]}, "AnytimeReasoner-linear"),
        ({"prior": [0, 5]}, "AnytimeReasoner-base"),
        ({"prior": [2, 1]}, "custom"),
        ({"baseline": "adaptive"}, "custom"),
        ({"baseline": "v1"}, "custom"),
        ({"progress_decay": 0.9}, "custom"),
        ({"num_summaries": 1}, "custom"),
        ({"summary_policy": "final"}, "custom"),
        ({"summary_weight": "objective"}, "custom"),
        ({"budgets": [3], "num_summaries": 1}, "GRPO"),
        ({"budgets": [3], "num_summaries": 1, "baseline": "none"}, "custom"),
        ({"budgets": [3]}, "custom"),
    ],
)
def test_recipe_of_other_settings(change, recipe):
    assert recipe_name(**{**UNIFORM, **change}) == recipe


# Curves in the log


def evaluation(step, *rewards, name="", **more):
    """A log as transformers and TRL write it; budgets are 2, 4, 6."""
    prefix = f"eval_{name}" if name else "eval"
    curve = {f"eval_anytime/reward@{2 + 2 * j}": reward for j, reward in enumerate(rewards)}
    return {f"{prefix}_loss": 0.0, f"{prefix}_runtime": 1.0, **curve, **more, "step": step}


def training(step, *rewards):
    curve = {f"anytime/reward@{2 + 2 * j}": reward for j, reward in enumerate(rewards)}
    return {"loss": 0.0, **curve, "thinking/mean_length": 5.0 + step, "step": step}


LOG = [
    evaluation(0, 0.1, 0.2, 0.3),
    training(1, 0.1, 0.2, 0.3),
    training(2, 0.3, 0.4, 0.5),
    evaluation(2, 0.4, 0.5, 0.6),
    training(3, 0.2, 0.4, None),
    training(4, 0.6, 0.8, 1.0),
    evaluation(4, 0.7, 0.8, 0.9),
]


def test_before_and_after():
    curves = evaluations(LOG)[""]
    assert [curve.step for curve in curves] == [0, 2, 4]
    assert [curve.step for curve in before_and_after(curves, 4)] == [0, 4]
    assert [curve.step for curve in before_and_after(curves, 3)] == [0, 2]  # weights of step 3
    assert before_and_after(curves, 0) == (curves[0], None)
    assert [curve.step for curve in before_and_after(curves[1:], 4)] == [2, 4]  # none at step 0
    assert before_and_after([], 4) == (None, None)
    again = [*curves, evaluations([evaluation(4, 0.0, 0.0, 0.0)])[""][0]]
    assert before_and_after(again, 4)[1].rewards == {2: 0, 4: 0, 6: 0}  # the last of several


def test_several_sets_and_what_is_not_a_number():
    log = [
        evaluation(1, 0.5, None, name="math"),
        evaluation(1, float("nan"), 0.25, name="owner/set"),
        evaluation(2, None, None, name="math"),
        {"loss": 1.0, "step": 2},
    ]
    sets = evaluations(log)
    assert {name: [(curve.step, curve.rewards) for curve in curves] for name, curves in sets.items()} == {
        "math": [(1, {2: 0.5})],
        "owner/set": [(1, {4: 0.25})],
    }


def test_training_curves():
    first, last = training_curves(LOG)  # two logs at either end
    assert (first.first_step, first.step, last.first_step, last.step) == (1, 2, 3, 4)
    assert first.rewards == pytest.approx({2: 0.2, 4: 0.3, 6: 0.4})
    assert last.rewards == pytest.approx({2: 0.4, 4: 0.6, 6: 1.0})  # at 6 one of the two was not scored
    assert training_curves(LOG[1:2])[1] is None and training_curves([]) == (None, None)


# From facts to the card


def make_facts(**changes):
    config = AnytimeConfig.from_tokenizer(make_tokenizer(), truncation_bridge="so </think>", answer_bridge="answer")
    facts = {
        "name": "a model",
        "model_id": None,
        "base_model": "owner/base",
        "architecture": "qwen3",
        "adapter": None,
        "tags": ["trl", "brpo"],
        "links": [],
        "anytime_config": config,
        "recipe": "AnytimeReasoner-uniform",
        "metric": "accuracy",
        "dataset": DataSet("owner/problems", on_hub=True, num_rows=8),
        "eval_datasets": {"": DataSet("owner/bench", on_hub=True, num_rows=30, split="test", revision="abc")},
        "num_generations_eval": 1,
        "log_history": LOG,
        "step": 4,
        "num_steps": 4,
        "settings": {"recipe": "AnytimeReasoner-uniform"},
        "question": [{"role": "user", "content": "1 2"}],
        "versions": {"trl": "1.16.0"},
        "paper": {"title": "Optimizing", "id": "2505.13438", "citation": "@misc{x}"},
    }
    return CardFacts(**{**facts, **changes})


def test_card_before_and_after():
    card = build_card(make_facts(), [BUDGET_PICTURE, TRAINING_PICTURE])
    assert metrics_of_headings(card) == {"accuracy"}
    rows = {2: ["0.100", "0.700"], 4: ["0.200", "0.800"], 6: ["0.300", "0.900"]}
    assert curve_tables(card) == [([[], [4]], rows)]  # before training, and after step 4
    assert "[owner/bench](https://huggingface.co/datasets/owner/bench) (30 " in card.text
    assert "[owner/base](https://huggingface.co/owner/base)" in card.text
    assert "huggingface.co/papers/2505.13438" in card.text and "BRPO" in card.text
    assert f"]({BUDGET_PICTURE})" in card.text and f"]({TRAINING_PICTURE})" in card.text
    assert "max_new_tokens" not in card.text and "None" not in card.text

    data = card.data
    assert (data["base_model"], data["base_model_relation"], data["datasets"]) == (
        "owner/base",
        "finetune",
        ["owner/problems"],
    )
    assert data.pipeline_tag == "text-generation" and data.library_name == "transformers"
    assert data.model_name == "a model"
    assert [(r.metric_args["thinking_budget"], r.metric_value) for r in data.eval_results] == [
        (2, 0.7),
        (4, 0.8),
        (6, 0.9),
    ]
    (place,) = {(r.task_type, r.dataset_type, r.dataset_split, r.dataset_revision) for r in data.eval_results}
    assert place == ("text-generation", "owner/bench", "test", "abc")


def test_escapes_before_and_after():
    """A share for each budget at which traces were cut."""
    before, after = ({"eval_summary/escape_ratio@2": value} for value in (0.5, 0.125))
    log = [evaluation(0, 0.1, 0.2, 0.3, **before), evaluation(4, 0.7, 0.8, 0.9, **after)]
    lines = build_card(make_facts(log_history=log)).text.splitlines()
    (start,) = (i for i, line in enumerate(lines) if "resume the reasoning" in line)
    assert [line.strip("| ").split(" | ") for line in lines[start + 4 : start + 7]] == [
        ["2", "0.500", "0.125"],
        ["4", "–", "–"],
        ["6", "–", "–"],
    ]
    assert "resume the reasoning" not in build_card(make_facts()).text
    (first, last) = evaluations(log)[""]
    assert (first.escapes, last.escapes) == ({2: 0.5}, {2: 0.125})


def test_eval_result_files():
    files = eval_result_files(make_facts())
    assert list(files) == [f".eval_results/anytime_owner-bench_{budget}.yaml" for budget in (2, 4, 6)]
    assert [entries[0].value for entries in files.values()] == [70.0, 80.0, 90.0]
    assert [re.findall(r"\d+", entries[0].notes)[0] for entries in files.values()] == ["2", "4", "6"]
    assert eval_result_files(make_facts(metric="mean_reward")) == {}  # a reward is no result of a benchmark
    assert eval_result_files(make_facts(eval_datasets={"": DataSet("problems.jsonl")})) == {}


def test_an_evaluation_of_earlier_weights():
    """It is shown and said; what claims to be a result of these weights is left out."""
    card = build_card(make_facts(step=3))
    ((steps, _),) = curve_tables(card)
    assert steps == [[], [2]]
    assert re.search(r"\bstep 2\b.*\bstep 3\b", card.text)
    assert not re.search(r"\bstep 3\b", build_card(make_facts()).text)
    assert not card.data.eval_results and eval_result_files(make_facts(step=3)) == {}


def test_a_single_evaluation():
    card = build_card(make_facts(log_history=LOG[:1], step=0))
    assert [steps for steps, _ in curve_tables(card)] == [[[]]] and len(card.data.eval_results) == 3
    card = build_card(make_facts(log_history=LOG[3:4], step=2))
    assert [steps for steps, _ in curve_tables(card)] == [[[2]]]


def test_no_evaluation():
    logs = [log for log in LOG if "loss" in log]
    card = build_card(make_facts(log_history=logs), [BUDGET_PICTURE])
    assert metrics_of_headings(card) == {"mean reward"}
    ((steps, rows),) = curve_tables(card)
    assert steps == [[1, 2], [3, 4]] and rows[6] == ["0.400", "1.000"]
    assert not card.data.eval_results and "model-index" not in card.content

    untrained = build_card(make_facts(log_history=[], step=0))
    assert metrics_of_headings(untrained) == set() and curve_tables(untrained) == []
    assert "anytime_generate" in untrained.text


def test_several_evaluation_sets(tmp_path):
    log = [
        evaluation(step, 0.1 * step, 0.2 * step, None if name == "b" else 0.0, name=name)
        for step in (0, 4)
        for name in ("a", "b")
    ]
    sets = {"a": DataSet("a"), "b": DataSet("owner/b", on_hub=True)}
    facts = make_facts(log_history=log, eval_datasets=sets)
    write_card(facts, tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    (_, rows_of_a), (_, rows_of_b) = curve_tables(card)
    assert rows_of_a.keys() == {2, 4, 6}
    assert rows_of_b == {2: ["0.000", "0.400"], 4: ["0.000", "0.800"]}  # no value at 6
    assert [(r.dataset_name, r.metric_args["thinking_budget"]) for r in card.data.eval_results] == [
        *[("a", budget) for budget in (2, 4, 6)],
        *[("owner/b", budget) for budget in (2, 4)],
    ]
    assert sorted(path.name for path in (tmp_path / ".eval_results").iterdir()) == [
        f"anytime_owner-b_{budget}.yaml" for budget in (2, 4)
    ]


def test_a_dollar_is_no_formula_in_a_picture(tmp_path):
    log = [evaluation(0, 0.1, name="$x^$"), *LOG[1:3]]
    write_card(make_facts(log_history=log, eval_datasets={"$x^$": DataSet("$x^$")}), tmp_path)
    assert (tmp_path / BUDGET_PICTURE).exists() and (tmp_path / TRAINING_PICTURE).exists()


def test_ungraded_answers_are_mentioned():
    log = [evaluation(4, 0.7, 0.8, 0.9, **{"eval_anytime/unscored_ratio": 0.125})]
    assert "12.5%" in build_card(make_facts(log_history=log)).text
    graded = [evaluation(4, 0.7, 0.8, 0.9, **{"eval_anytime/unscored_ratio": 0.0})]
    assert "%" not in build_card(make_facts(log_history=graded)).text


def structure(card):
    """The card as Markdown: the types of its elements in order, where its links and pictures lead, its heading."""
    kinds, addresses, heading = [], [], None
    for block in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text):
        for token in [block, *(block.children or ())]:
            kinds.append(token.type)
            addresses += [token.attrs[name] for name in ("href", "src") if name in token.attrs]
            if heading is None and token.type == "inline":
                heading = "".join(child.content for child in token.children)
    return kinds, addresses, heading


def hostile_facts(text, config, **changes):
    """Facts in which everything that comes from outside is this text."""
    return make_facts(
        **{
            "name": text,
            "model_id": text,
            "base_model": text,
            "architecture": text,
            "tags": [text],
            "anytime_config": replace(
                config,
                markers=replace(config.markers, think_end=text, truncation_bridge=text, answer_bridge=text),
                chat_template_kwargs={text: text},
            ),
            "dataset": DataSet(text),
            "eval_datasets": {"": DataSet(text, config=text, split=text)},
            "log_history": [*LOG[:-1], evaluation(4, 0.7, 0.8, 0.9)],
            "settings": {"recipe": text, "adapter": text},
            "question": [{"role": "user", "content": text}],
            **changes,
        }
    )


@pytest.mark.parametrize("changes", [{}, {"adapter": "LoRA"}, {"question": None}, {"on_hub": True}], ids=str)
@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "a: b #c",
        "- x\n---\n# y\n",
        "\"quoted\" 'too'",
        "{{ facts.name }} {% raw %} {# x",
        "ö → 日本 🙂",
        "![x](https://evil.example/a.png)",
        "](https://evil.example) ![x",
        "[x]: https://evil.example",
        "<img src=https://evil.example/a.png> <!-- <script>",
        "&lt;img&gt; &#33;",
        "a | b \\| c",
        "x\n\n| a | b |\n| --- | --- |\n| c | d |\n",
        "*y* **y** _y_ ~~y~~ `z` ``z`` \\",
        "```\n\n# y\n\n```\n![x](a.png)",
        "END\n```\n# y\r\n\r\n# z",
        "$x^$ $$y$$",
        "x'; echo evil > file; '",
        "\x1b[31mred\x07 \x85 \u2028",
    ],
)
def test_text_from_outside_is_inert(tmp_path, text, changes):
    """A card of hostile names is built as one of plain names, and its data and code hold the names as given."""
    config = make_facts().anytime_config
    cards = []
    for word in (text, "plain"):
        given = dict(changes)
        if given.pop("on_hub", False):
            dataset = DataSet(word, on_hub=True, revision=word)
            given |= {"dataset": dataset, "eval_datasets": {"": dataset}}
        if "question" in given:
            given["question"] = word  # no chat
        build_card(hostile_facts(word, config, **given)).save(tmp_path / CARD)
        cards.append(ModelCard.load(tmp_path / CARD))
    card, plain = cards

    (kinds, addresses, heading), (kinds_of_plain, addresses_of_plain, _) = map(structure, cards)
    assert kinds == kinds_of_plain
    assert [address.replace(quote(text), "plain") for address in addresses] == addresses_of_plain
    assert heading == " ".join(text.split()).replace("\x1b", r"\u001b").replace("\x07", r"\u0007")

    assert card.data.to_dict().keys() == plain.data.to_dict().keys()
    assert (card.data.model_name, card.data.base_model, text in card.data.tags) == (text, text, True)
    assert {result.dataset_name for result in card.data.eval_results} == {text}
    code = blocks(card, "python")
    assignments = dict(line.split(" = ", 1) for line in code[0].split("\n") if " = " in line)
    question = ast.literal_eval(assignments["question"])
    assert text == (question if isinstance(question, str) else question[0]["content"])
    assert ast.literal_eval(assignments["model_id"].removesuffix("  # or a folder")) == " ".join(text.split())
    if "question" not in changes:
        serve, request = blocks(card, "bash")
        served = subprocess.run(
            ["bash", "-c", f'vllm() {{ printf %s "$2"; }}; {serve}'], capture_output=True, check=True
        )
        assert served.stdout.decode() == ("merged" if "adapter" in changes else " ".join(text.split()))
        body = json.loads(request.split("<<'END'\n")[1].removesuffix("\nEND"))
        assert body["messages"] == [{"role": "user", "content": text}]
        assert body["chat_template_kwargs"] == {text: text}


def test_a_name_that_utf_8_cannot_write(tmp_path):
    """As that of a folder may be; ids on the Hub are ASCII."""
    name = "models/\udcff"
    facts = make_facts(name=name, dataset=DataSet(name), question=[{"role": "user", "content": name}])
    build_card(facts).save(tmp_path / CARD)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.model_name == name and structure(card)[2] == r"models/\udcff"
    (question,) = re.findall("^question = (.*)", card.text, flags=re.MULTILINE)
    assert ast.literal_eval(question)[0]["content"] == name


def test_licence_limits_and_use_without_a_budget():
    for license in (None, "apache-2.0"):
        card = build_card(make_facts(license=license, step=4))
        assert card.data.to_dict().get("license") == license
        sections = dict(re.findall(r"^## (.+)\n((?:(?!^## ).*\n)*)", f"{card.text}\n", re.MULTILINE))
        assert ("apache-2.0" in sections["Licence"]) == (license is not None)
        assert "(https://huggingface.co/owner/base)" in sections["Licence"]
        assert "118 tokens" in sections["Limits"] and "owner/problems" in sections["Limits"]
        assert "8000 thinking tokens" in sections["Use at any thinking budget"].split("**Without a budget**")[1]
        assert "8000 thinking tokens" not in build_card(make_facts(question="1 2")).text  # no server is shown


def test_the_system_prompt_is_in_the_card():
    config = replace(make_facts().anytime_config, system_prompt="Think `hard`.")
    facts = make_facts(anytime_config=config, question=config.conversation("1 2"))
    assert "``'Think `hard`.'``" in build_card(facts).text
    assert "system message" not in build_card(make_facts()).text


def test_the_template_is_given_all_that_it_names(monkeypatch):
    """Jinja writes nothing, without a word, for a name that it does not know."""
    given = {}
    monkeypatch.setattr(ModelCard, "from_template", lambda data, path, **values: given.update(values, path=path))
    for changes in ({}, {"adapter": "LoRA", "question": "1 2"}, {"log_history": LOG[1:3]}, {"base_model": None}):
        build_card(make_facts(**changes), [BUDGET_PICTURE, TRAINING_PICTURE])
        template = jinja2.Template(Path(given["path"]).read_text(), undefined=jinja2.StrictUndefined)
        assert template.render(card_data="", **given)


def test_bridges_with_backticks():
    config = AnytimeConfig.from_tokenizer(
        make_tokenizer(extra_words=("``",)), truncation_bridge="`` </think>", answer_bridge="answer"
    )
    assert "```'`` </think>'```" in build_card(make_facts(anytime_config=config)).text


def test_recipes_in_the_text():
    assert "**GRPO+vr**" in build_card(make_facts(recipe="GRPO+vr")).text
    assert "listed below" in build_card(make_facts(recipe="custom")).text
    assert "papers/2505.05315" in build_card(make_facts(recipe="Elastic Reasoning")).text


def test_files_of_an_earlier_card_are_removed(tmp_path):
    (tmp_path / ".eval_results").mkdir()
    own = tmp_path / ".eval_results" / "somebody_else.yaml"
    own.write_text("")
    write_card(make_facts(), tmp_path)
    assert (tmp_path / BUDGET_PICTURE).exists() and len(list((tmp_path / ".eval_results").iterdir())) == 4
    for path in (tmp_path / ".eval_results").glob("anytime_*"):
        (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        assert entry.dataset_id == "owner/bench" and entry.dataset_revision == "abc"
    write_card(make_facts(log_history=[], step=0), tmp_path)
    assert not (tmp_path / BUDGET_PICTURE).exists() and not (tmp_path / TRAINING_PICTURE).exists()
    assert list((tmp_path / ".eval_results").iterdir()) == [own]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert importlib.util.find_spec("matplotlib") is None
    write_card(make_facts(), tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "| 2 | 0.100 | 0.700 |" in text and "![" not in text and not list(tmp_path.glob("*.png"))


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"card_base_model": "./models/base"}, r"`card_base_model`.*'\./models/base'"),
        ({"card_base_model": "/models/base"}, "`card_base_model`.*'/models/base'"),
        ({"card_base_model": "a/b/c"}, "`card_base_model`.*'a/b/c'"),
        ({"card_metric": "f1"}, "`card_metric`.*accuracy.*mean_reward.*'f1'"),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


# From a trainer


@pytest.fixture(scope="module", params=["full", "LoRA"])
def trained(request, tmp_path_factory):
    """A run from a local base model with an evaluation before and after: the trainer and its last checkpoint."""
    directory = tmp_path_factory.mktemp("cards")
    make_model(vocab_size=30).save_pretrained(directory / "base")
    lora = LoraConfig(r=4, target_modules="all-linear") if request.param == "LoRA" else None
    trainer = graded_trainer(
        directory / "out",
        str(directory / "base"),
        peft_config=lora,
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        card_base_model="tiny/base",
        card_question="1 2",
    )
    trainer.evaluate()
    trainer.train()
    return trainer, directory / "out" / "checkpoint-1"


def test_card_of_a_checkpoint(trained):
    trainer, folder = trained
    card = ModelCard.load(folder / CARD)
    assert card.content == ModelCard.load(Path(trainer.args.output_dir) / CARD).content
    assert card.data["base_model"] == "tiny/base" and [steps for steps, _ in curve_tables(card)] == [[[], [1]]]
    assert metrics_of_headings(card) == {"accuracy"} and str(folder.parent.parent) not in card.content
    assert {result.metric_type for result in card.data.eval_results} == {"accuracy"}
    logs = [log for log in trainer.state.log_history if "eval_anytime/reward@2" in log]
    assert [log["step"] for log in logs] == [0, 1]
    for budget, result in zip([2, 4], card.data.eval_results, strict=True):
        assert result.metric_value == round(logs[1][f"eval_anytime/reward@{budget}"], 4)
    whole = json.loads((folder / "manifest.json").read_text())["files"]
    assert {CARD, BUDGET_PICTURE, TRAINING_PICTURE} <= set(whole)
    is_lora = "adapter_config.json" in whole
    assert card.data.library_name == ("peft" if is_lora else "transformers")
    introduction = card.text.split("[tiny/base]")[0]
    assert ("LoRA" in introduction) == is_lora and ("lora" in card.data.tags) == is_lora


def blocks(card, language):
    return re.findall(rf"```{language}\n(.*?)\n```", card.text, flags=re.DOTALL)


def test_the_code_of_the_card_runs(trained, tmp_path, monkeypatch, capsys):
    _, folder = trained
    card = ModelCard.load(folder / CARD)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "base").symlink_to(folder.parent.parent / "base")
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)  # "the folder of this card"; the base model is found as it would be on the Hub
    names = {}
    for code in blocks(card, "python"):
        exec(code, names)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [int(line[0]) for line in printed] == [3, 6, 9]
    assert all(int(thinking) <= int(budget) for budget, thinking, *_ in printed)
    bridges = {tuple(bridge) for bridge in names["output"].rollout.bridges}
    config = AnytimeConfig.from_pretrained(folder)
    markers = config.markers
    assert bridges <= {markers.truncation_bridge_ids + markers.answer_bridge_ids, markers.answer_bridge_ids}

    serve, request = blocks(card, "bash")
    if (tmp_path / "adapter_config.json").exists():
        assert serve.startswith("vllm serve merged ")
        assert AnytimeConfig.from_pretrained("merged") == config
        assert AutoTokenizer.from_pretrained("merged").get_vocab() == names["tokenizer"].get_vocab()
        merged = AutoModelForCausalLM.from_pretrained("merged")
        tokens = torch.tensor([[6, 8, 9, 3]])
        with torch.no_grad():
            torch.testing.assert_close(merged(tokens).logits, trained[0].model(tokens).logits, rtol=1e-4, atol=1e-5)
    parser = reasoning_parser(config, names["tokenizer"])
    server = deployment("merged" if "merged" in serve else ".", config, 9, parser=parser)
    assert serve == server.command_line() and "--reasoning-parser" in serve
    body = json.loads(request.split("<<'END'\n")[1].removesuffix("\nEND"))
    assert body == {**server.requests[0].body, "messages": [{"role": "user", "content": "1 2"}]}
    assert body["vllm_xargs"] == {"thinking_budget": 9}


def test_saving_again(trained, tmp_path):
    """PEFT's own card names the local folder of the base model."""
    trainer, folder = trained
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / CARD).read_text() == (Path(trainer.args.output_dir) / CARD).read_text()
    assert str(folder.parent.parent / "base") not in (tmp_path / "saved" / CARD).read_text()


def test_a_local_model_without_a_name(tmp_path):
    make_model(vocab_size=30).save_pretrained(tmp_path / "base")
    trainer = graded_trainer(tmp_path / "out", str(tmp_path / "base"), reward_funcs=parity_reward)
    trainer.create_model_card(dataset_name="owner/problems", tags="mine")
    card = ModelCard.load(tmp_path / "out" / CARD)
    assert card.data.base_model is None and str(tmp_path) not in card.content and "None" not in card.text
    assert "qwen3" in card.text.split("[owner/problems]")[0] and card.data.datasets == ["owner/problems"]
    assert card.data.model_name == "out" and "mine" in card.data.tags
    assert "parity\\_reward (1)" in card.text


def test_other_ranks_write_nothing(tmp_path):
    trainer = graded_trainer(tmp_path / "out")
    trainer.is_world_process_zero = lambda: False
    trainer.create_model_card()
    assert not (tmp_path / "out" / CARD).exists()


def test_one_name_for_several_sets_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`card_eval_dataset`"):
        graded_trainer(tmp_path, eval_dataset={"a": make_dataset(2)}, card_eval_dataset="owner/bench")


def from_hub(dataset):
    """As `load_dataset` leaves it."""
    dataset.info.download_checksums = {"hf://datasets/owner/problems@0a1b2c/data/train-0.parquet": {"num_bytes": 1}}
    dataset.info.config_name = "main"
    return Dataset(dataset.data, info=dataset.info, split=NamedSplit("test"))


def test_where_the_data_come_from(tmp_path):
    dataset = from_hub(make_dataset(8)).map(lambda row: row)  # survives what users do to it
    trainer = graded_trainer(tmp_path, train_dataset=dataset, eval_dataset=dataset, max_steps=1)
    trainer.evaluate()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.datasets == ["owner/problems"]
    (place,) = {
        (r.dataset_type, r.dataset_config, r.dataset_split, r.dataset_revision) for r in card.data.eval_results
    }
    assert place == ("owner/problems", "main", "test", "0a1b2c")
    assert len(list((tmp_path / ".eval_results").iterdir())) == 2


def test_streams_and_several_sets(tmp_path):
    opened = []

    def rows():
        opened.append(True)
        yield from make_dataset(8)

    trainer = graded_trainer(
        tmp_path,
        train_dataset=IterableDataset.from_generator(rows),
        eval_dataset={"one": make_dataset(2), "two": make_dataset(3)},
        reward_funcs=parity_reward,
    )
    trainer.evaluate()
    before = len(opened)
    trainer.create_model_card()
    assert len(opened) == before  # a stream may be far away
    card = ModelCard.load(tmp_path / CARD)
    assert "| problems | a stream |" in card.text and card.data.datasets is None
    assert re.search(r"\bone \(2\b", card.text) and re.search(r"\btwo \(3\b", card.text)
    assert {(r.dataset_name, r.metric_type) for r in card.data.eval_results} == {
        ("one", "mean_reward"),
        ("two", "mean_reward"),
    }


def test_names_that_trl_s_card_would_take_as_they_are(tmp_path):
    trainer = graded_trainer(tmp_path)
    hostile = "x\n[<img src=https://evil.example/a.png>](https://evil.example)\n"
    trainer.create_model_card(hostile, hostile, tags=["mine"])
    card = ModelCard.load(tmp_path / CARD)
    kinds, addresses, _ = structure(card)
    assert not {kind for kind in kinds if kind.startswith("html") or kind == "image"}
    assert not [address for address in addresses if "evil" in address]
    assert (card.data.model_name, "mine" in card.data.tags) == (hostile, True)


def test_links_to_trackers():
    """TRL writes a run's name into an address as it is."""
    badge = '[<img src="https://example.com/badge.png" alt="Trackio" width="150" height="24"/>]'
    text = f"# x\n\n{badge}(https://space?project=p&runs=my run (2)&sidebar=collapsed)\n{badge}(javascript:x)\n"
    (link,) = links_to_trackers(text)
    assert link == f"{badge}(https://space?project=p&runs=my%20run%20%282%29&sidebar=collapsed)"


def test_the_best_checkpoint(tmp_path):
    """What is loaded at the end is what the card describes."""
    trainer = graded_trainer(
        tmp_path,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="entropy",
        greater_is_better=True,
        learning_rate=0.1,
    )
    trainer.train()
    best = trainer.state.best_global_step
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / CARD)
    assert re.search(rf"\bstep {best} of 2\b", card.text)
    logged = {log["step"]: log for log in trainer.state.log_history if "eval_anytime/reward@2" in log}
    assert card.data.eval_results[0].metric_value == round(logged[best]["eval_anytime/reward@2"], 4)
