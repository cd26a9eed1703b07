"""A task of reasoning-gym from a recipe to results: checked, trained on, described in a card, evaluated."""

import json
import re

import pytest
import yaml
from datasets import Dataset

import trl_anytime
from tests.support import ROOT, pages
from tests.support.tiny import byte_tokenizer, make_model, make_tokenizer, tiny_trainer
from trl_anytime import BRPOConfig, cli
from trl_anytime.checks.doctor import check_recipe
from trl_anytime.checks.finding import ERROR, OK, WARNING
from trl_anytime.checks.memory import Launch
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.data.problems import read_rows
from trl_anytime.data.recipe import DataArguments, parse_recipe, without_shared
from trl_anytime.evaluation.results import load_results
from trl_anytime.rewards import MathReward, TaskReward
from trl_anytime.rewards.tasks.plain import EXECUTING
from trl_anytime.rewards.tasks.source import REFUSED
from trl_anytime.train import make_trainer, train

pytestmark = pytest.mark.slow  # processes, or a training of its own

TASK = "reasoning_gym:chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1"
TRAIN, EVALUATION = f"{TASK}&size=40&seed=0", f"{TASK}&size=20&seed=1"
OPENED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
RECIPE = {
    "dataset_name": TRAIN,
    "eval_dataset_name": EVALUATION,
    "instruction": "",
    "budgets": [8, 16],
    "num_summaries": 1,
    "max_summary_length": 12,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a recipe."""
    pytest.importorskip("reasoning_gym", reason="the extra `tasks`")
    folder = tmp_path_factory.mktemp("task")
    tokenizer = byte_tokenizer([r"State the final answer to the following arithmetic problem: \boxed{"], 320, OPENED)
    tokenizer.save_pretrained(folder / "model")
    make_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "model")
    recipe = {"model_name_or_path": str(folder / "model"), "output_dir": str(folder / "out"), **RECIPE}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    with pytest.warns(UserWarning, match="problems to train on, which are evaluated"):
        train(make_trainer(*parse_recipe(["--config", str(folder / "recipe.yaml")])))
    return folder / "out"


def found(folder, **changes):
    return check_recipe(folder / "recipe.yaml", changes, Launch(1)).findings


def test_the_reward_follows_the_data():
    assert isinstance(DataArguments(TRAIN).reward, TaskReward)
    assert isinstance(DataArguments("a.jsonl", on_bad_gold="skip").reward, MathReward)
    for other in ({"dataset_name": TRAIN, "eval_dataset_name": "a.jsonl"}, {"dataset_name": "math500"}):
        with pytest.raises(ValueError, match="Only one of `dataset_name` and `eval_dataset_name`"):
            DataArguments(**{"eval_dataset_name": EVALUATION, **other})


def test_no_problem_is_trained_on_and_evaluated():
    def rows(*questions):
        return Dataset.from_list(
            [{"prompt": [{"role": "user", "content": text}], "answer": "1", "entry": text} for text in questions]
        )

    with pytest.warns(UserWarning, match="1 of 3"):
        assert without_shared(rows("a", "b", "c"), rows("b", "d"))["entry"] == ["a", "c"]
    with pytest.raises(ValueError, match="`seed`"):
        without_shared(rows("a"), rows("a"))


def test_a_recipe_is_checked(folder):
    healthy = found(folder)
    assert [finding for finding in healthy if finding.level == ERROR] == []
    assert any(re.search(r"\b\d+ of 40\b", finding.message) for finding in healthy if finding.check == "data")
    sampled = [finding.message for finding in healthy if finding.check == "gold answers" and finding.level == OK]
    assert any(re.match(r"(8|16) sampled\b", message) for message in sampled)


@pytest.mark.parametrize(
    ("changes", "check", "named"),
    [
        ({"dataset_name": TRAIN.replace("chain_sum", "chain_sun")}, "data", "chain_sum"),
        ({"eval_dataset_name": TRAIN}, "data", "`seed`"),
        ({"max_summary_length": "2"}, "gold answers", "`max_summary_length`"),
        ({"dataset_config": "main"}, "data", "main"),
    ],
)
def test_faults_of_a_recipe(folder, changes, check, named):
    faults = [finding for finding in found(folder, **changes) if finding.level in (ERROR, WARNING)]
    assert any(fault.check == check and named in str(fault) for fault in faults if fault.level == ERROR)


def test_a_run_and_its_card(trained):
    card = (trained / "README.md").read_text()
    assert "reasoning-gym 0.1" in card and "Apache-2.0" in card
    assert "chain_sum" in card and "Mean reward on" in card
    rows = json.loads((trained / "eval_results.json").read_text())
    assert 0.0 <= rows["eval_reward"] <= 1.0


def test_the_run_begins_with_no_step_if_answers_do_not_fit(folder, tmp_path):
    settings = parse_recipe(
        [
            "--config",
            str(folder / "recipe.yaml"),
            "--max_summary_length",
            "2",
            "--output_dir",
            str(tmp_path / "out"),
            "--eval_dataset_name",
            EVALUATION.replace("seed=1", "seed=2"),
        ]
    )
    with pytest.raises(ValueError, match="`max_summary_length`"):
        make_trainer(*settings)
    assert not (tmp_path / "out").exists()


def test_an_evaluation(trained, tmp_path, capsys):
    words = ["--budgets", "4,8", "--instruction", "", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert cli.main(["eval", str(trained), "--dataset", f"sums={EVALUATION}", "--limit", "6", *words]) == 0
    results = load_results(tmp_path / "out" / "results.json")
    assert results["protocol"]["reward"] == "TaskReward"
    assert results["protocol"]["problems"]["sums"][1] == 6
    short = [
        "eval",
        str(trained),
        "--dataset",
        EVALUATION,
        "--max-summary-length",
        "2",
        *words[:-1],
        str(tmp_path / "b"),
    ]
    capsys.readouterr()
    assert cli.main(short) == BAD_INPUT
    assert "20 of 20 answers" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_page(folder, tmp_path, monkeypatch):
    """Its trainer takes a step, its table has the tasks that are refused, and its list those that execute answers."""
    page = (ROOT / "docs" / "data.md").read_text()
    named = {name for row in pages.table("docs/data.md", "task") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == REFUSED.keys()
    listed = re.search(r"execute an answer as Python: (.*?)\.", page, re.DOTALL)[1]
    assert {*re.findall(r"`(\w+)`", listed)} == EXECUTING

    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TaskReward" in block]
    code, by_likelihood = (re.sub(r"size=\d+", "size=4", block) for block in blocks)
    tiny = {name: RECIPE[name] for name in ("max_steps", "bf16", "use_cpu", "report_to", "num_generations")}

    class Small(BRPOConfig):
        def __init__(self, output_dir, **settings):
            batch = {"per_device_train_batch_size": 2, "save_strategy": "no"}
            super().__init__(str(tmp_path / output_dir), **{**settings, **tiny, **batch, "budgets": [4, 8]})

    monkeypatch.setattr(trl_anytime, "BRPOConfig", Small)
    names = {"model": str(folder / "model")}
    exec(compile(code, "docs/data.md", "exec"), names)
    names["trainer"].train()
    (logged,) = (entry for entry in names["trainer"].state.log_history if "reward" in entry)
    assert "rewards/TaskReward/graded" in logged and names["trainer"].state.global_step == 1

    exec(compile(by_likelihood, "docs/data.md", "exec"), names)
    trainer = names["trainer"]
    trainer.train()
    (logged,) = (entry for entry in trainer.state.log_history if "reward" in entry)
    assert 0 <= logged["rewards/likelihood/mean"] <= 1 and "rewards/TaskReward/graded" not in logged
    assert "eval_rewards/TaskReward/mean" in trainer.evaluate()


def test_words_are_learned_by_their_likelihood(tmp_path):
    """A scorer is not needed: relations between persons, one token each, at two cuts and without thinking."""
    rows = read_rows("reasoning_gym:family_relationships?max_family_size=4&size=32&seed=0").rows
    relations = sorted(set(rows["answer"]))
    assert len(relations) > 3 and all(re.fullmatch(r"[a-z-]+", word) for word in relations)
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})
    tokenizer = make_tokenizer(extra_words=tuple(relations))
    trainer = tiny_trainer(
        tmp_path,
        model=make_model(vocab_size=len(tokenizer)),
        processing_class=tokenizer,
        train_dataset=rows,
        reward_funcs=None,
        budgets=[0, 3, 6],
        num_summaries=1,
        summary_reward="likelihood",
        summary_weight="objective",
        reference_template="{answer}",
        learning_rate=2e-2,
        max_steps=15,
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    # At first nearly uniform over the words and the end behind them; then at least as good as a guess among relations
    assert rewards[0] < 0.02 and sum(rewards[-3:]) / 3 > 1 / len(relations)


def test_a_recipe_by_likelihood_without_an_evaluation(folder, tmp_path):
    """Its reward function has nothing to grade."""
    data_args, args, model_args = parse_recipe(
        ["--config", str(folder / "recipe.yaml"), "--summary_reward", "likelihood", "--output_dir", str(tmp_path)]
    )
    data_args.eval_dataset_name = None
    train(make_trainer(data_args, args, model_args))
    card = (tmp_path / "README.md").read_text()
    assert "likelihood of the reference answer" in card
