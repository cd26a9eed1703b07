"""The data of a recipe: where it is, which columns it has, and what prompts become of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

import trl_anytime
from tests.support.anytime import make_anytime_config
from tests.support.tiny import make_tokenizer
from trl_anytime import cli
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.data import problems
from trl_anytime.data.recipe import (
    DataArguments,
    Source,
    launch_words,
    packaged_file,
    set_chat_template,
    to_prompts,
)
from trl_anytime.evaluation.evaluate import Evaluation
from trl_anytime.evaluation.problems import ProblemSet
from trl_anytime.evaluation.protocol import differences
from trl_anytime.rewards import MathReward
from trl_anytime.train import main

INSTRUCTION = DataArguments("a.jsonl").instruction


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts_of(path, **settings) -> Dataset:
    data_args = DataArguments(path, **settings)
    return to_prompts(data_args.sources[0].read(data_args), data_args, MathReward(on_bad_gold=data_args.on_bad_gold))


@pytest.mark.parametrize("problem", ["problem", "question", "prompt"])
@pytest.mark.parametrize("answer", ["answer", "solution", "final_answer"])
def test_the_usual_columns_are_found(tmp_path, problem, answer):
    (row,) = prompts_of(write(tmp_path / "a.jsonl", [{"level": 1, answer: "2", problem: "1 + 1 ?"}]))
    assert row == {"prompt": [{"role": "user", "content": f"1 + 1 ? {INSTRUCTION}"}], "answer": "2"}


def test_a_system_prompt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "1 + 1 ?", "answer": "2"}])
    (row,) = prompts_of(path, system_prompt="Think.", instruction="")
    assert row["prompt"] == [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1 ?"}]


def test_a_bad_gold_answer_is_named_as_the_data_has_it(tmp_path):
    rows = [{"q": "1 + 1 ?", "truth": "2"}, {"q": "?", "truth": None}, {"q": "2 + 2 ?", "truth": "4"}]
    columns = {"problem_column": "q", "answer_column": "truth"}
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="[Rr]ow 1.*'truth'.*`on_bad_gold`"):
        prompts_of(path, **columns)
    with pytest.warns(UserWarning, match=r"\b1 of 3\b"):
        assert prompts_of(path, **columns, on_bad_gold="skip")["answer"] == ["2", "4"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "dataset_name"),
        ({"dataset_name": "a.jsonl", "on_bad_gold": "ignore"}, "on_bad_gold"),
        ({"dataset_name": "a.jsonl", "dataset_streaming": True}, "dataset_streaming"),
        ({"dataset_name": "a.jsonl", "ignore_bias_buffers": True}, "ignore_bias_buffers"),
    ],
)
def test_what_is_refused(settings, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        DataArguments(**settings)


def test_where_data_sets_are(monkeypatch):
    """A configuration stands behind a colon or in a setting of its own; a benchmark has its own split."""
    asked = []

    def load(hub_id, config, split):
        asked.append((hub_id, config, split))
        return Dataset.from_list([{"problem": "?", "final_answer": "1"}])

    monkeypatch.setattr(problems, "_load_hub", load)
    for settings in (
        {"dataset_name": "owner/set", "dataset_config": "main", "eval_dataset_name": "owner/other:hard"},
        {"dataset_name": "owner/set:main", "dataset_train_split": "part", "eval_dataset_name": "AIME-24"},
    ):
        data_args = DataArguments(answer_column="final_answer", **settings)
        for source in data_args.sources:
            source.read(data_args)
    assert asked == [
        ("owner/set", "main", "train"),
        ("owner/other", "hard", "test"),
        ("owner/set", "main", "part"),
        ("HuggingFaceH4/aime_2024", None, "train"),
    ]
    with pytest.raises(ValueError, match="`dataset_config`"):
        Source("owner/set:main", "other", None).read(data_args)
    with pytest.raises(ValueError, match="math500"):
        Source("math50", None, "train").read(data_args)


@pytest.mark.parametrize(
    ("rows", "words", "flag"),
    [
        ([{"text": "?", "answer": "1"}], [], "--problem-column"),
        ([{"problem": "?", "text": "1"}], [], "--answer-column"),
        ([{"problem": "?", "answer": None}], [], "--on-bad-gold"),
        ([{"problem": "?", "answer": "1"}], ["--limit", "0"], "--limit"),
    ],
)
def test_errors_of_the_command_name_its_flags(tmp_path, capsys, rows, words, flag):
    path = write(tmp_path / "a.jsonl", rows)
    assert cli.main(["eval", "nowhere", "--dataset-name", path, *words]) == BAD_INPUT
    error = capsys.readouterr().err
    assert flag in error and not re.search(r"`\w+_\w+`", error)


# Files of the package, and the words of a training

FOLDERS = ("recipes", "accelerate_configs", "chat_templates")


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_of_the_package_are_found_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = [*(Path(trl_anytime.__file__).parent / folder).iterdir()]
    assert files and all(packaged_file(folder, file.stem) == file == packaged_file(folder, file) for file in files)
    (tmp_path / "mine").write_text("")
    assert packaged_file(folder, "mine") == Path("mine")
    with pytest.raises(ValueError, match=files[0].stem):
        packaged_file(folder, "nothing")


def test_words_are_sorted():
    """What is no setting is for `accelerate launch`; the values of both may be the same."""
    words = ["--num_processes", "8", "--budgets", "4", "8", "--config=8k_grpo", "--use_peft"]
    launch, settings = launch_words([*words, "--accelerate_config", "zero2", "--max-steps", "2"])
    zero2 = str(packaged_file("accelerate_configs", "zero2"))
    assert launch == ["--num_processes", "8", "--config_file", zero2]
    recipe = ["--config", str(packaged_file("recipes", "8k_grpo"))]
    assert settings == [*recipe, "--budgets", "4", "8", "--use_peft", "--max-steps", "2"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--budgetts", "4"], "budgets"),
        (["--config", "8k_grop"], "8k_grpo"),
        (["--config"], "--config"),
        (["--config", "mine.yaml", "--dataset_name", "a.jsonl"], "learning_rate"),
        (["--dataset_name", "a.jsonl", "--use_cpu", "true", "--bf16", "false"], "model_name_or_path"),
        (["--model_name_or_path", "m", "--use_cpu", "true", "--bf16", "false"], "dataset_name"),
        (["a.jsonl"], "a.jsonl"),
        (["--config", "8k_grpo", "--budgets", "32,16,8"], "--budgets 32 16 8"),
        (["--config", "8k_grpo", "--use_cpu", "true", "--bf16", "false", "--budgets", "32", "16"], "[16, 32]"),
        (["--config", "8k_grpo", "--learning_rate", "abc"], "'abc'"),
    ],
)
def test_words_that_are_wrong(words, named, tmp_path, monkeypatch, capsys):
    """One line, before anything is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("learning_rat: 1")
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and named in printed.splitlines()[-1] and "Traceback" not in printed
    # The libraries' own warnings are in this process only
    assert len([line for line in printed.splitlines() if "Warning" not in line and "warn" not in line]) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--budgts", "8"], "budgets"),
        (["--num_proceses", "2"], "mean num_processes"),
        (["--num_processes", "two"], "'two'"),
        (["--budgets", "32,16"], "--budgets 32 16"),
    ],
)
def test_the_command_with_words_that_are_wrong(words, named, capsys):
    """`accelerate launch` would print all of its options."""
    assert cli.main(["train", "--config", "8k_grpo", *words]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_the_command_of_a_recipe_that_is_not_there(capsys):
    assert cli.main(["train", "--config", "8k_grop"]) == BAD_INPUT
    assert "8k_grpo" in capsys.readouterr().err


# Chat templates


def test_a_template_that_opens_the_thinking(tmp_path):
    conversation = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    tokenizer = make_tokenizer()
    own = tokenizer.chat_template
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == own
    set_chat_template(tokenizer, "chatml_think")
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    answered = [*conversation, {"role": "assistant", "content": "<think>\nc</think>d"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == f"{prompt}c</think>d<|im_end|>\n"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    set_chat_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "a"
    for path in (str(tmp_path), "chatml_thinking"):
        with pytest.raises(ValueError, match="chatml_think|chat_template_path"):
            set_chat_template(tokenizer, path)


# The same prompts elsewhere


def test_a_system_prompt_of_an_evaluation():
    """It is part of the protocol; a model without a template cannot have one."""
    tokenizer, config = make_tokenizer(), make_anytime_config()
    messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1"}]
    assert replace(config, system_prompt="Think.").question(tokenizer, "1 + 1") == messages
    assert config.question(tokenizer, "1 + 1") == messages[1:]
    sets = [ProblemSet("a", ["1 + 1"], ["2"])]
    plain = Evaluation(None, tokenizer, config, sets, "tiny")
    asked = Evaluation(None, tokenizer, replace(config, system_prompt="1"), sets, "tiny")
    (difference,) = differences(asked.protocol.as_dict(), plain.protocol.as_dict())
    assert difference.startswith("system_prompt ")
    assert len(asked._prompt_ids["a"][0]) > len(plain._prompt_ids["a"][0])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        replace(config, system_prompt="Think.").question(tokenizer, "1 + 1")
