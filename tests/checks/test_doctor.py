"""`trl-anytime doctor`: every check has a recipe that it finds fault with, and a healthy recipe has none."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import ModelConfig

from tests.support import ROOT, pages
from tests.support.tiny import Gradients, byte_tokenizer, make_config, make_model, make_tokenizer, tiny_trainer
from trl_anytime import BRPOConfig, cli
from trl_anytime.checks import doctor
from trl_anytime.checks.batch_sizes import BatchArithmetic
from trl_anytime.checks.doctor import check_recipe, read_launch
from trl_anytime.checks.finding import ERROR, OK, WARNING
from trl_anytime.checks.memory import (
    Launch,
    estimate_memory,
    memory_finding,
    planned_model,
    run_layers,
    static_memory,
    without_memory,
)
from trl_anytime.checks.start_checks import reward_findings, splice_findings
from trl_anytime.checks.unused_settings import (
    _DATA,
    _EVALUATION,
    _MODEL,
    _TRAINING,
    unused_recipe_settings,
    unused_settings,
)
from trl_anytime.commands.common import FAILED
from trl_anytime.data.recipe import DataArguments
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.modeling.tree_attention import TreeLayout, enable_tree_attention, layout_in_use
from trl_anytime.rewards import MathReward
from trl_anytime.rollout.markers import find_markers

EXAMPLES = ROOT / "examples"
OPENED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
PROBLEMS = [{"problem": f"How much is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
RECIPE = {
    "max_prompt_length": 200,
    "budgets": [32, 64],
    "num_summaries": 2,
    "max_summary_length": 16,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
}


TEXTS = [problem["problem"] for problem in PROBLEMS] * 2


def save_model(path: Path, chat_template: str = OPENED, model_type: str = "qwen3", **settings) -> str:
    tokenizer = byte_tokenizer(TEXTS, 400, chat_template)
    tokenizer.save_pretrained(path)
    make_model(model_type, len(tokenizer), **{"max_position_embeddings": 512, **settings}).save_pretrained(path)
    return str(path)


def save_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, problems and a healthy recipe."""
    folder = tmp_path_factory.mktemp("doctor")
    recipe = {
        "model_name_or_path": save_model(folder / "model"),
        "dataset_name": save_rows(folder / "problems.jsonl", PROBLEMS),
        "output_dir": str(folder / "out"),
        **RECIPE,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def look(folder: Path, processes: int = 1, gpu_bytes: int | None = None, settings_only=False, **changes):
    """What is wrong with the recipe after `changes`: level, what was found and what to change, by check."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | changes
    (folder / "changed.yaml").write_text(yaml.safe_dump(recipe))
    found = check_recipe(folder / "changed.yaml", {}, Launch(processes), gpu_bytes, settings_only)
    return {finding.check: finding for finding in found.findings if finding.level != OK}


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?!\w)", text)


def mentions(text: str, expected: str | list[str]) -> bool:
    """Whether a message has a name, or all of several numbers."""
    return expected in text if isinstance(expected, str) else set(expected) <= set(numbers(text))


# End to end


def test_a_healthy_recipe(folder, capsys):
    assert cli.main(["doctor", "--config", str(folder / "recipe.yaml"), "--gpu-memory", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    checks = [
        "settings",
        "vllm",
        "model",
        "data",
        "template",
        "splice",
        "verifier",
        "gold answers",
        "batch",
        "context",
    ]
    assert [finding["check"] for finding in printed["findings"]] == [*checks, "memory", "tree attention"]
    assert {finding["level"] for finding in printed["findings"]} == {OK}
    documented = [row[0].strip("`") for row in pages.table("docs/doctor.md", "check")]
    assert documented == [*checks, "memory", "tree attention"]
    found = {finding["check"]: finding["message"] for finding in printed["findings"]}
    assert "'<think>'" in found["template"] and "'</think>'" in found["template"]
    assert "--load-model" not in found["tree attention"]  # the model is small, so its weights were measured
    assert numbers(found["data"])[-2:] == ["24", "24"]
    table = printed["tables"][0]
    # 4 rows × 4 micro-batches = 16 traces of 4 prompts, × 2 budgets × 2 summaries = 64
    rows = {line.split("  ")[0]: line.split()[-3:] for line in table.splitlines()[1:4]}
    assert rows == {
        "prompts": ["4", "4", "1"],
        "traces": ["16", "16", "4"],
        "summaries": ["64", "64", "16"],
    }
    steps = dict(re.split("  +", line) for line in printed["tables"][0].split("\n\n")[1].splitlines())
    assert steps["generation batches per epoch"] == "6"  # 24 prompts
    assert steps["optimiser steps of the run"] == "18"  # 3 epochs, transformers' default


def test_the_report_for_people(folder, capsys):
    words = [
        "doctor",
        str(folder / "recipe.yaml"),
        "--settings-only",
        "--set",
        "lora_r=8",
        "--set",
        "eval_strategy=epoch",
    ]
    assert cli.main(words) == 1
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    warning, error = (next(line for line in lines if line.startswith(level)) for level in (WARNING, ERROR))
    assert warning.split()[:3] == [WARNING, "settings", "`lora_r=8`"]
    assert error.split()[:3] == [ERROR, "settings", "`eval_strategy='epoch'`"]
    fixes = [line for line in lines if line.lstrip().startswith("->")]
    assert len(fixes) == 2 and "`use_peft: true`" in fixes[0] and "`eval_dataset_name`" in fixes[1]
    assert numbers(lines[-1]) == ["1", "1"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, ["recipe.yaml"]),
        ("- budgets", ["recipe.yaml", "list"]),
        ("budgets: [", ["recipe.yaml", "YAML"]),
        ("model_name_or_path: a\ndataset_name: b\nbudgetts: [1]", ["`budgetts`", " budgets"]),
        ("budgets: [1]", ["`dataset_name`"]),
        ("model_name_or_path: a\ndataset_name: b\nlearning_rate: much", ["learning_rate", "'much'"]),
    ],
)
def test_files_that_hold_no_recipe(tmp_path, capsys, content, named):
    if content is not None:
        (tmp_path / "recipe.yaml").write_text(content)
    assert cli.main(["doctor", str(tmp_path / "recipe.yaml")]) == 2
    assert cli.main(["doctor"]) == cli.main(["doctor", "a", "--config", "a"]) == 2
    error = capsys.readouterr().err
    assert [name for name in named if name not in error] == []


@pytest.mark.parametrize("path", sorted((EXAMPLES / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(path):
    found = check_recipe(path, {"bf16": "false"}, Launch(8), settings_only=True, assume_vllm=True)
    assert [finding for finding in found.findings if finding.level != OK] == []
    assert re.search(r"optimiser steps per generation batch +2$", found.tables[0], re.MULTILINE)


SHARDING = {"fsdp2": "fsdp", "zero2": "zero2", "zero3": "zero3", "multi_gpu": "none", "single_gpu": "none"}


@pytest.mark.parametrize("name", SHARDING)
def test_launch_files(name):
    launch = read_launch(Path(name), None, None)
    assert launch == Launch(1 if name == "single_gpu" else 8, SHARDING[name])


def test_a_launch_file_that_is_none(folder):
    with pytest.raises(ValueError, match="`distributed_type`"):
        read_launch(folder / "recipe.yaml", None, None)


# One fault for each check


@pytest.mark.parametrize(
    ("changes", "check", "level", "found", "change"),
    [
        ({"scale_rewards": "group"}, "settings", ERROR, "`scale_rewards='group'`", "changed.yaml"),
        ({"max_cached_tokens": 500, "use_transformers_continuous_batching": True}, "settings", WARNING,
         "`max_cached_tokens=500`", "`use_transformers_continuous_batching: false`"),
        ({"gradient_accumulation_steps": 1}, "batch", WARNING, ["1", "4"], "`gradient_accumulation_steps`"),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, "batch", WARNING, ["1.5"],
         "`gradient_accumulation_steps`"),
        ({"num_iterations": 5}, "batch", WARNING, ["5", "4", "1"], "`num_iterations`"),
    ],
)  # fmt: skip
def test_faults_of_settings(folder, changes, check, level, found, change):
    finding = look(folder, settings_only=True, **changes)
    assert finding.keys() == {check}
    assert finding[check].level == level
    assert mentions(finding[check].message, found) and change in finding[check].fix


def test_batches_are_those_of_all_ranks(folder):
    assert look(folder, 2, settings_only=True, generation_batch_size=16) == {}
    found = look(folder, 3, settings_only=True, generation_batch_size=16)
    assert "generation_batch_size" in found["settings"].message and numbers(found["settings"].message) == ["16", "12"]


def test_vllm_that_is_missing_or_does_not_fit(folder, monkeypatch):
    monkeypatch.setattr(doctor, "is_vllm_available", lambda: False)
    found = look(folder, settings_only=True, use_vllm=True)
    assert found.keys() == {"vllm"} and "pip install 'trl-anytime[vllm]'" in found["vllm"].fix
    assert "--assume-vllm" in found["vllm"].fix
    words = ["doctor", str(folder / "changed.yaml"), "--settings-only"]
    assert [cli.main([*words, *more]) for more in ([], ["--assume-vllm"])] == [FAILED, 0]
    monkeypatch.setattr(doctor, "is_vllm_available", lambda: True)
    found = look(folder, 3, settings_only=True, use_vllm=True, vllm_tensor_parallel_size=2)
    assert "`vllm_tensor_parallel_size=2`" in found["vllm"].message and "3" in numbers(found["vllm"].message)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://localhost:9"}
    found = look(folder, **server)
    assert found.keys() == {"vllm"} and "http://localhost:9" in found["vllm"].message
    found = look(folder, use_vllm=True, vllm_max_model_length=100)
    assert "vLLM" in found["context"].message and "100" in numbers(found["context"].message)
    assert "`vllm_max_model_length`" in found["context"].fix and "`budgets`" in found["context"].fix


@pytest.mark.parametrize(
    ("changes", "check", "level", "found", "change"),
    [
        ({"budgets": [64, 600]}, "context", ERROR, ["600", "512"], "`budgets`"),
        ({"gradient_accumulation_steps": 32}, "batch", ERROR, ["24", "32"], " 96 "),
        ({"problem_column": "question"}, "data", ERROR, "'question'", "`problem_column`"),
        ({"max_prompt_length": 10}, "data", ERROR, ["24", "10"], "`max_prompt_length`"),
        ({"dataset_name": "nowhere.jsonl"}, "data", ERROR, "nowhere.jsonl", "`dataset_name`"),
        ({"remove_unused_columns": True}, "gold answers", ERROR, "'answer'", "`remove_unused_columns: false`"),
        ({"truncation_bridge": "no end"}, "template", ERROR, "`truncation_bridge`", "`chat_template_kwargs`"),
        ({"think_end": "END.", "use_transformers_continuous_batching": True}, "template", WARNING, "'END.'",
         "`vllm_mode: colocate`"),
        ({"packing": "rows"}, "tree attention", WARNING, "'rows'", "`packing: auto`"),
    ],
)  # fmt: skip
def test_faults_of_model_and_data(folder, changes, check, level, found, change):
    finding = look(folder, **changes)
    assert finding.keys() == {check}
    assert finding[check].level == level
    assert mentions(finding[check].message, found) and change in finding[check].fix


def test_a_chat_model_that_was_not_taught_to_think(folder):
    """Its marker is several tokens, which no prompt opens: nothing would end. A template of one's own opens it."""
    chat = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = byte_tokenizer(
        chat_template=chat + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        special_tokens=["<|im_start|>", "<|im_end|>"],
        end="<|im_end|>",
    )
    tokenizer.save_pretrained(folder / "chat")
    make_model("qwen3", len(tokenizer), max_position_embeddings=512).save_pretrained(folder / "chat")
    chat_model = {"model_name_or_path": str(folder / "chat")}
    assert look(folder, **chat_model)["template"].level == ERROR
    found = look(folder, **chat_model, think_end="</think>")
    assert found.keys() == {"template"} and found["template"].level == WARNING
    assert "`chat_template_path`" in found["template"].fix
    assert look(folder, **chat_model, chat_template_path="chatml_think") == {}
    found = look(folder, chat_template_path="chatml_thonk")
    assert found["template"].level == ERROR and "chatml_think" in found["template"].message


def test_gold_answers_that_are_none(folder):
    rows = [*PROBLEMS, {"problem": "What?", "answer": None}]
    name = save_rows(folder / "bad.jsonl", rows)
    found = look(folder, dataset_name=name)["data"].message
    assert "24" in numbers(found) and "'answer'" in found and "None" in found
    assert look(folder, dataset_name=name, on_bad_gold="skip") == {}
    found = look(folder, dataset_name=save_rows(folder / "empty.jsonl", []))
    assert found.keys() == {"data"} and found["data"].level == ERROR and "empty.jsonl" in found["data"].message


def test_gold_answers_that_are_texts(folder):
    """Of the training and of the evaluation set alike; read from all rows, not from a sample."""
    rows = [*PROBLEMS, {"problem": "Show it.", "answer": "proof"}, {"problem": "Show that.", "answer": "Proof."}]
    name = save_rows(folder / "proofs.jsonl", rows)
    for changes in ({"dataset_name": name}, {"eval_dataset_name": name, "eval_strategy": "steps"}):
        found = look(folder, **changes)
        assert found.keys() == {"gold answers"} and found["gold answers"].level == WARNING
        said = found["gold answers"].message
        assert [n for n in ("2", "26") if n not in numbers(said)] == [] and "'proof'" in said
    prose = save_rows(folder / "prose.jsonl", [*PROBLEMS, {"problem": "?", "answer": "It is 4, because 2 + 2 = 4."}])
    for changes in ({"dataset_name": prose}, {"eval_dataset_name": prose, "eval_strategy": "steps"}):
        found = look(folder, **changes)
        assert "Row 24" in found["data"].message and "on_bad_gold" in found["data"].fix
    shapes = [{**row, "answer": f"It is so.\n#### {row['answer']}"} for row in PROBLEMS]
    assert look(folder, dataset_name=save_rows(folder / "gsm8k.jsonl", shapes)) == {}


@pytest.mark.parametrize(
    "rows", [[{"problem": "1 + 1?"}], [{"answer": "2"}], []], ids=["no gold answers", "no prompts", "empty"]
)
def test_an_evaluation_set_that_is_none(folder, rows):
    name = save_rows(folder / "evaluation.jsonl", rows)
    found = look(folder, eval_dataset_name=name, eval_strategy="steps")
    assert found.keys() == {"data"} and found["data"].level == ERROR and name in found["data"].message


def test_nested_answers(folder):
    rows = [
        {"prompt": [{"role": "user", "content": row["problem"]}], "reward_model": {"ground_truth": row["answer"]}}
        for row in PROBLEMS
    ]
    name = save_rows(folder / "verl.jsonl", rows)
    assert look(folder, dataset_name=name) == {}


def test_an_adapter_in_place_of_a_model(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())  # what the finding says
    found = look(folder, model_name_or_path=str(tmp_path))
    assert found.keys() == {"model"} and found["model"].level == ERROR and "is_trainable" in found["model"].fix


@pytest.mark.hardware
@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine may have bf16")
def test_a_precision_that_this_machine_lacks(folder):
    """What the trainer's own configuration refuses here is what is found."""
    with pytest.raises(ValueError) as refused:
        BRPOConfig(bf16=True)
    found = look(folder, settings_only=True, bf16=True, use_cpu=False)
    assert found.keys() == {"settings"} and found["settings"].level == ERROR
    assert str(refused.value) in found["settings"].message and "bf16" in found["settings"].fix
    # For a run on another machine it is only said
    assert look(folder, gpu_bytes=2**30, settings_only=True, bf16=True, use_cpu=False)["settings"].level == WARNING
    BRPOConfig(bf16=True, use_cpu=True)
    assert look(folder, settings_only=True, bf16=True, use_cpu=True) == {}


def test_a_template_that_closes_the_thinking(folder, tmp_path):
    name = save_model(tmp_path, OPENED.replace("<think>\n", "<think>\n\n</think>\n"))
    found = look(folder, model_name_or_path=name)
    assert found.keys() == {"template"} and found["template"].level == ERROR
    assert "</think>" in found["template"].message and "`chat_template_kwargs`" in found["template"].fix


def test_a_template_that_closes_the_thinking_of_some_rows(folder, tmp_path):
    closing = "<think>{% if 'quick' in messages[0].content %}</think>{% endif %}\n"
    name = save_model(tmp_path, OPENED.replace("<think>\n", closing))
    assert look(folder, model_name_or_path=name) == {}
    rows = [*PROBLEMS[:9], {"problem": "Be quick. How much is 1 + 1?", "answer": "2"}, *PROBLEMS[9:]]
    quick = save_rows(folder / "quick.jsonl", rows)
    for changes in ({"dataset_name": quick}, {"eval_dataset_name": quick, "eval_strategy": "epoch"}):
        found = look(folder, model_name_or_path=name, **changes)
        assert found.keys() == {"template"} and found["template"].level == ERROR
        assert "quick.jsonl, row 9" in found["template"].message


def test_an_end_of_thinking_that_is_no_token(folder, tmp_path):
    for template, levels in ((OPENED, [OK]), (OPENED.replace("<think>\n", "{# </think> #}"), [OK, WARNING])):
        name = save_model(tmp_path, template)
        byte_tokenizer(["a"], 258, template, ["<|end|>"]).save_pretrained(tmp_path)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"model_name_or_path": name}
        (folder / "changed.yaml").write_text(yaml.safe_dump(recipe))
        findings = check_recipe(folder / "changed.yaml", {}, Launch(1)).findings
        found = [finding for finding in findings if finding.check == "template"]
        assert [finding.level for finding in found] == levels
        assert "'</think>'" in found[0].message and "8" in numbers(found[0].message)  # a byte is a token


def test_a_model_that_is_not_there(folder, tmp_path):
    found = look(folder, model_name_or_path=str(tmp_path / "nowhere"))
    assert found.keys() == {"model"} and found["model"].level == ERROR
    without_weights = tmp_path / "model"
    shutil.copytree(folder / "model", without_weights)
    (without_weights / "model.safetensors").unlink()
    found = look(folder, model_name_or_path=str(without_weights))
    assert found.keys() == {"tree attention"} and "weights" in found["tree attention"].message


@pytest.mark.parametrize(
    ("offline", "data"),
    [
        ("1", ["some/data", "math500"]),
        pytest.param("0", [], marks=pytest.mark.slow),  # the Hub's client tries for 23 seconds
    ],
)
def test_a_hub_that_is_not_reached(folder, tmp_path, offline, data):
    """It is not to be asked, or nothing listens at its address."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text()) | {"model_name_or_path": "some/model"}
    recipe |= dict(zip(("dataset_name", "eval_dataset_name"), data, strict=False))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline, "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | hub | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "trl_anytime", "doctor", str(tmp_path / "recipe.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    findings = json.loads(done.stdout)["findings"]
    fixes = [finding["fix"] for finding in findings if finding["level"] == ERROR]
    named = ["`hf download some/model`", "load_dataset('some/data')", "load_dataset('HuggingFaceH4/MATH-500')"]
    assert len(fixes) == 1 + len(data) and all(name in fix for name, fix in zip(named, fixes, strict=False))
    assert all(("Unset it" in fix) == (offline == "1") for fix in fixes)
    assert all(("set `HF_HUB_OFFLINE=1`" in fix) == (offline == "0") for fix in fixes)


def test_a_model_that_cannot_be_packed(folder, tmp_path):
    name = save_model(tmp_path, model_type="mamba", state_size=4)
    found = look(folder, model_name_or_path=name)
    assert found["tree attention"].level == WARNING and "`packing: rows`" in found["tree attention"].fix
    found = look(folder, model_name_or_path=name, packing="tree")
    assert found["tree attention"].level == ERROR


def test_too_little_memory(folder):
    found = look(folder, gpu_bytes=2**20)
    assert found.keys() == {"memory"} and found["memory"].level == WARNING
    assert "LM head" in found["memory"].message
    assert "`per_device_train_batch_size`" in found["memory"].fix


def test_memory_of_a_mixture_of_experts(tmp_path):
    config = make_model("qwen3_moe").config
    finding, table = memory_finding(config, torch.float32, None, make_config(tmp_path), Launch(), 10, 3, 2**10)
    assert finding.level == WARNING and "without content" in finding.message
    assert "weights" in table and "activations" not in table


def test_splices_whose_text_says_something_else():
    tokenizer = byte_tokenizer(TEXTS, 400)
    markers = find_markers(tokenizer, "How", think_end="much", truncation_bridge=" How much", answer_bridge=" is")
    (melted,) = splice_findings(tokenizer, "How", "is 1 + 1", markers, [0], True)
    assert melted.level == OK and "bridge" in melted.message
    words = make_tokenizer()
    markers = find_markers(words, "<think>", truncation_bridge="so </think>", answer_bridge="answer")
    (lost,) = splice_findings(words, "user 1 <think>", "1 2 3 4", markers, [2], answers_in_boxes=True)
    assert lost.level == WARNING and r"\boxed{42}" in lost.message
    (fine,) = splice_findings(words, "user 1 <think>", "1 2 3 4", markers, [2], answers_in_boxes=False)
    assert fine.level == OK


def test_splices_of_a_tokenizer_that_refuses_other_words():
    known = ["<think>", "</think>", "user", "answer", "1", "2"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    markers = find_markers(tokenizer, "<think>", truncation_bridge="</think>", answer_bridge="answer")
    (lost,) = splice_findings(tokenizer, "user 1 <think>", "1 2", markers, [3], answers_in_boxes=True)
    assert lost.level == WARNING and r"\boxed{42}" in lost.message
    (fine,) = splice_findings(tokenizer, "user 1 <think>", "1 2", markers, [3], answers_in_boxes=False)
    assert fine.level == OK


def test_rewards_that_do_not_grade(tmp_path):
    args = make_config(tmp_path)
    dead = MathReward(memory_limit=1, workers=1)
    (broken,) = reward_findings(args, [dead], [])
    assert broken.check == "verifier" and broken.level == ERROR
    for gold in (None, "{"):
        (_, gold_answers) = reward_findings(args, [MathReward()], [{"answer": gold}])
        assert gold_answers.level == WARNING and repr(gold) in gold_answers.message
    (_, missing) = reward_findings(args, [MathReward()], [{"result": 1}])
    assert missing.level == ERROR and str(list(MathReward().answer_columns)) in missing.message


# Settings without effect


def test_the_tables_name_settings():
    for rows, settings in (((*_TRAINING, _EVALUATION), BRPOConfig), (_DATA, DataArguments), (_MODEL, ModelConfig)):
        names = {f.name for f in fields(settings)}
        assert {name for row in rows for name in row.names} <= names


@pytest.mark.parametrize(
    ("settings", "unused"),
    [
        ({}, set()),
        ({"eval_budgets": [3]}, {"eval_budgets"}),
        ({"vllm_overlap": False}, {"vllm_overlap"}),
        ({"max_completion_length": 99}, set()),
        ({"max_completion_length": 99, "loss_type": "dapo"}, {"max_completion_length"}),
        ({"progress_decay": 0.9}, set()),
        ({"progress_decay": 0.9, "baseline": "v2"}, {"progress_decay"}),
        ({"max_cached_tokens": 500}, set()),
        ({"max_cached_tokens": 500, "use_transformers_continuous_batching": True}, {"max_cached_tokens"}),
        (
            {"max_tool_calling_iterations": 2, "log_multimodal": False},
            {"max_tool_calling_iterations", "log_multimodal"},
        ),
    ],
)
def test_unused_settings(tmp_path, settings, unused):
    args = make_config(tmp_path, **settings)
    assert named(args, unused_settings(args, has_eval_data=False)) == unused


def named(settings, findings):
    found = " ".join(finding.message for finding in findings)
    return {f.name for f in fields(settings) if f"`{f.name}=" in found}


def test_unused_settings_of_evaluation_data(tmp_path):
    args = make_config(tmp_path, eval_budgets=[3])
    assert unused_settings(args, has_eval_data=True) == []


@pytest.mark.parametrize(
    ("data", "model", "unused"),
    [
        ({"dataset_name": "owner/set", "dataset_config": "main", "dataset_train_split": "part"}, {}, set()),
        ({"dataset_name": "a.jsonl", "dataset_train_split": "part"}, {}, {"dataset_train_split"}),
        ({"dataset_name": "owner/set", "dataset_test_split": "part"}, {}, {"dataset_test_split"}),
        ({"dataset_name": "owner/set", "dataset_test_split": "part", "eval_dataset_name": "owner/b"}, {}, set()),
        ({"dataset_name": "owner/set"}, {"lora_r": 8, "lora_alpha": 3}, {"lora_r", "lora_alpha"}),
        ({"dataset_name": "owner/set"}, {"lora_r": 8, "use_peft": True}, set()),
    ],
)
def test_unused_settings_of_a_recipe(data, model, unused):
    data_args, model_args = DataArguments(**data), ModelConfig(**model)
    findings = unused_recipe_settings(data_args, model_args)
    assert named(data_args, findings) | named(model_args, findings) == unused


@pytest.mark.parametrize(
    ("learning_rate", "use_peft", "advised"),
    [("1e-6", True, "1e-05"), ("4e-6", True, "4e-05"), ("5e-6", True, None), ("1e-6", False, None)],
)
def test_the_learning_rate_of_adapters(folder, learning_rate, use_peft, advised):
    """That of full fine-tuning is too small for them."""
    changes = {"learning_rate": learning_rate, "use_peft": str(use_peft)}
    report = check_recipe(folder / "recipe.yaml", changes, Launch(1), settings_only=True)
    found = [finding for finding in report.findings if "learning_rate" in finding.message]
    assert [finding.level for finding in found] == ([WARNING] if advised else [])
    assert all(advised in finding.fix for finding in found)


def test_the_trainer_looks_at_the_learning_rate_of_adapters(tmp_path, caplog):
    lora = LoraConfig(r=2, target_modules="all-linear")
    for learning_rate, count in ((1e-6, 1), (1e-5, 0)):
        caplog.clear()
        tiny_trainer(tmp_path, max_steps=1, peft_config=lora, learning_rate=learning_rate).train()
        assert sum("`learning_rate=" in record.getMessage() for record in caplog.records) == count


def test_a_static_cache_is_ignored(tmp_path):
    tiny_trainer(tmp_path, cache_implementation="static", max_steps=1).train()


# Arithmetic


def test_the_paper_s_arithmetic(tmp_path):
    args = BRPOConfig(str(tmp_path), per_device_train_batch_size=16, gradient_accumulation_steps=16,
                      steps_per_generation=32, use_cpu=True, bf16=False, num_train_epochs=1)  # fmt: skip
    batch = BatchArithmetic.from_settings(args, num_prompts=40_000, tokens_per_row=11_000)
    assert (batch.prompts_per_generation, batch.prompts_per_step) == (64, 32)
    assert (batch.updates_per_generation, batch.generations_per_epoch, batch.num_updates) == (2, 625, 1250)
    rows = {line[:22].strip(): line[22:].split() for line in batch.table().splitlines()[:5]}
    assert rows["summaries"] == ["8,192", "4,096", "256"]  # 512 traces × 4 budgets × 4 summaries
    assert rows["packed tokens, at most"] == ["5,632,000", "2,816,000", "176,000"]
    assert batch.findings() == []


@pytest.mark.parametrize("settings", [
    {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2},
    {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
])  # fmt: skip
def test_steps_are_those_of_the_trainer(tmp_path, settings):
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "num_train_epochs": 2, **settings}
    trainer = tiny_trainer(tmp_path, max_steps=-1, **settings)
    trainer.train()
    batch = BatchArithmetic.from_settings(trainer.args, 8, None)
    assert trainer.state.max_steps == trainer.state.global_step == batch.num_updates


# When training begins


def test_what_the_trainer_says(tmp_path, capsys, caplog):
    tiny_trainer(tmp_path, progress_decay=0.9, baseline="v2", max_steps=1).train()
    assert "optimiser steps per generation batch" in capsys.readouterr().out
    assert "`progress_decay=0.9`" in caplog.text


def test_what_the_trainer_refuses(tmp_path):
    short = Dataset.from_list([{"prompt": "1 2 <think>", "answer": "3"}])
    with pytest.raises(ValueError, match=r"\b1\b.*\b2\b.*`generation_batch_size`"):
        tiny_trainer(tmp_path, train_dataset=short).train()
    with pytest.raises(ValueError, match="`train_dataset`"):
        tiny_trainer(tmp_path, train_dataset=short.select([]))


# Memory


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_what_is_held_always_is_exact(tmp_path, lora, optim):
    """Weights, gradients and states of a real trainer behind its first step."""
    peft_config = LoraConfig(target_modules="all-linear", r=2, lora_dropout=0.1) if lora else None
    gradients = Gradients()
    trainer = tiny_trainer(tmp_path, peft_config=peft_config, optim=optim, max_steps=1, callbacks=[gradients])
    config = trainer.model.config
    trainer.train()
    real = {
        "weights": [*trainer.model.parameters(), *trainer.model.buffers()],
        "gradients": list(gradients.steps[0].values()),
        "optimiser states": [
            value for state in trainer.optimizer.state.values() for value in state.values() if value is not None
        ],
    }
    with without_memory():
        planned = planned_model(config, torch.float32, peft_config)
        held = static_memory(planned, trainer.args, Launch())
        sharded = static_memory(planned, trainer.args, Launch(4, "zero2"))
    assert held == {name: sum(x.numel() * x.element_size() for x in tensors) for name, tensors in real.items()}
    assert sharded == {**{name: size // 4 for name, size in held.items()}, "weights": held["weights"]}


def test_parts_that_depend_on_settings(tmp_path):
    model = make_model()
    cases = {
        "plain": ({}, Launch()),
        "reference": ({"beta": 0.1}, Launch()),
        "few": ({"max_cached_tokens": 1}, Launch()),
        "half": ({"bf16": True}, Launch()),
        "sharded": ({}, Launch(2, "fsdp")),
        "vllm": ({"use_vllm": True, "vllm_gpu_memory_utilization": 0.5}, Launch()),
        "asleep": ({"use_vllm": True, "vllm_enable_sleep_mode": True}, Launch()),
    }
    found = {}
    for name, (settings, launch) in cases.items():
        with without_memory() as mode:
            planned = planned_model(model.config, torch.float32)
            args = make_config(tmp_path, **settings)
            found[name] = estimate_memory(planned, args, launch, 10, 3, mode, available=2**30)
    plain = found["plain"]
    # 8 rollouts of 10 + 9 + 3 · 2 · (3 + 4) tokens, keys and values of 2 layers, 2 heads of 8 numbers of 4 bytes
    per_rollout = {
        "keys and values": 61 * 2 * 2 * 2 * 8 * 4,
        # 6 summaries: logits of 20 tokens in 4 bytes, and their scores, probabilities and noise
        "logits": 6 * 20 * (4 + 12),
        # 3 cuts × 4 tokens of bridges read 19 tokens with 4 heads: scores and weights; what 6 summaries see
        "scores": 12 * 4 * 19 * (4 + 4) + 6 * 19,
    }
    assert plain.generating == {name: 8 * size for name, size in per_rollout.items()}
    assert found["few"].generating == per_rollout  # one rollout at least
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert found["half"].generating["cast weights"] == 2 * sum(p.numel() for p in matrices)
    assert found["reference"].always["reference model"] == plain.always["weights"]
    assert found["sharded"].always["weights"] == plain.always["weights"] // 2
    assert found["sharded"].training["gathered weights"] > 0
    assert found["vllm"].training["vLLM"] == found["vllm"].generating["vLLM"] == 2**29
    assert "vLLM" not in found["asleep"].training


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_close(tmp_path, checkpointing):
    """Against every allocation of a real forward and backward pass, as torch's profiler counts them."""
    budgets, prompt_length, bridge = [60, 120], 20, 5
    args = make_config(
        tmp_path, budgets=budgets, max_summary_length=10, per_device_train_batch_size=2, num_generations=2,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    config = make_model(hidden_size=128, intermediate_size=384, num_hidden_layers=4).config
    with without_memory() as mode:
        _, estimated, hidden = run_layers(planned_model(config, torch.float32), args, prompt_length, bridge, mode)
    assert hidden.shape == (2, 20 + 120 + 4 * 15, 128)

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()), dtype=torch.float32)
    enable_tree_attention(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    summaries = [[[[1] * 10] * 2] * 2] * 2
    packed = PackedRollouts.pack([[1] * 120] * 2, [budgets] * 2, [[[1] * bridge] * 2] * 2, summaries)
    layout = TreeLayout.from_packed(packed, torch.tensor([prompt_length] * 2), 200)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with layout_in_use():
            output = model.model(
                torch.ones(2, 200, dtype=torch.long), position_ids=layout.position_ids, tree=layout, use_cache=False
            )
        output.last_hidden_state.sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = measured = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        measured = max(measured, live)
    assert estimated == pytest.approx(measured, rel=0.1)  # what torch's operators take for themselves is not seen
