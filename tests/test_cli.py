"""The command `trl-anytime` as a user meets it: what it says to mistakes, to other programs and to a pipe."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import trl_anytime
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import AnytimeConfig, Sampling
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT, FAILED, PIPE_CLOSED
from trl_anytime.rollout.markers import ThinkingMarkers

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with its config and three problems."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_model(vocab_size=len(tokenizer)).save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (5,), "so </think>", (9, 5), "answer", (8,))
    AnytimeConfig(markers, [4, 8], [0.5, 0.5], 3, Sampling(), [2]).save_pretrained(folder)
    problems = [json.dumps({"problem": str(i), "answer": str(i)}) for i in range(3)]
    (folder / "problems.jsonl").write_text("\n".join(problems))
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    assert main([*evaluation(folder), "--output", str(folder / "finished")]) == 0
    return folder / "finished"


def evaluation(folder):
    return ["eval", str(folder), "--dataset", str(folder / "problems.jsonl"), "--instruction", "", "--device", "cpu"]


def refused(capsys, *words):
    """The one line that a command line ends with."""
    with pytest.raises(SystemExit) as exit:
        main([*map(str, words)])
    assert exit.value.code == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    return line


# Mistakes


def test_what_was_meant(capsys):
    for words, meant in (
        (["evla"], "eval"),
        (["eval", "model", "--budgts", "4"], "--budgets"),
        (["eval", "model", "--budgts=4"], "--budgets"),
        (["eval", "model", "--backend", "vlm"], "vllm"),
        (["eval", "model", "--budgets", "32,16,8"], "8,16,32"),
        (["plot", "results.json", "--lables", "a"], "--labels"),
    ):
        assert re.search(rf"\b(mean|Give) {meant}\b", refused(capsys, *words)), words


def test_what_this_machine_lacks(folder, capsys, monkeypatch):
    """Said before anything is loaded, a model that is not there included."""
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for words, named in (
        (["eval", "missing", "--dataset", "missing.jsonl", "--backend", "vllm"], "trl-anytime[vllm]"),
        (["eval", "missing", "--dataset", "missing.jsonl", "--device", "nonsense"], "--device nonsense"),
        (["generate", "missing", "2 + 2", "--device", "nonsense"], "--device nonsense"),
    ):
        assert main(words) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line


def test_a_gpu_that_is_not_there(folder, capsys):
    device = f"cuda:{torch.cuda.device_count()}"
    assert main(["generate", str(folder), "0 1", "--device", device]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--device {device}" in line


def test_text_that_a_tokenizer_has_no_tokens_for(tmp_path, folder, capsys):
    """A vocabulary of words without one for what is unknown."""
    for file in folder.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["model"]["unk_token"] = "[none]"
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    assert main(["generate", str(tmp_path), "What is this?", "--device", "cpu"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "What is this?" in line


# Other programs


def test_the_version():
    for command in (["-m", "trl_anytime", "--version"], ["-m", "trl_anytime.cli", "--version"]):
        shown = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT)
        assert (shown.returncode, shown.stdout.split()) == (0, ["trl-anytime", trl_anytime.__version__])


def test_a_pipe_that_nobody_reads(folder):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "trl_anytime", "serve-command", str(folder)]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (PIPE_CLOSED, b"")


def test_completion(capsys, monkeypatch):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "tcsh"):
        with pytest.raises(SystemExit) as exit:
            main(["--print-completion", shell])
        script = capsys.readouterr().out
        assert exit.value.code == 0 and "serve-command" in script and "max-summary-length" in script
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "trl-anytime[completion]" in refused(capsys, "--print-completion", "bash")


def test_results_as_json(folder, finished, capsys):
    assert main([*evaluation(folder), "--output", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "results.json").read_text())

    assert main(["serve-command", str(folder), "--budget", "6", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)
    assert served["command"][:3] == ["vllm", "serve", str(folder)]
    assert served["requests"][0]["body"]["vllm_xargs"] == {"thinking_budget": 6}

    # A server that goes on thinking whatever the budget
    server = TinyServer(chat=lambda body: [*[11] * 99, 5, 13, 2], tokenizer=make_tokenizer())
    with serving(server):
        words = ["probe", str(folder), "--base-url", server.url, "--budgets", "4,8", "--json"]
        assert main(words) == FAILED
    probed = json.loads(capsys.readouterr().out)
    assert [(result["budget"], result["outcome"]) for result in probed["results"]] == [(4, "ignored"), (8, "ignored")]
    assert probed["wrong"]


# The system prompt of the training


@pytest.fixture(scope="module")
def prompted(folder, tmp_path_factory):
    """The same model, trained with a system prompt."""
    copy = tmp_path_factory.mktemp("prompted")
    for file in folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    replace(AnytimeConfig.from_pretrained(copy), system_prompt="0 1 2").save_pretrained(copy)
    return copy


def test_an_evaluation_has_the_system_prompt_of_the_training(prompted):
    for more, expected in (([], "0 1 2"), (["--system-prompt", ""], None), (["--system-prompt", "3"], "3")):
        output = prompted / f"evaluated {expected}"
        assert main([*evaluation(prompted), "--output", str(output), *more]) == 0
        header, *samples = map(json.loads, (output / "samples.jsonl").read_text().splitlines())
        assert header["protocol"]["system_prompt"] == expected
        added = 0 if expected is None else len(expected.split()) + 3  # its role, and what is around it
        assert [sample["prompt_tokens"] for sample in samples] == [7 + added] * 3


def test_generate_and_probe_have_it_too(prompted, capsys):
    tokenizer = make_tokenizer()
    with serving(TinyServer(make_model(vocab_size=len(tokenizer)))) as server:
        assert main(["generate", str(prompted), "4", "--base-url", server.url]) == 0
        (prompt,) = server.bodies[0]["prompt"]
    assert tokenizer.decode(prompt).split()[2:6] == ["0", "1", "2", "<|im_end|>"]
    with serving(TinyServer(chat=lambda body: [2], tokenizer=tokenizer)) as server:
        main(["probe", str(prompted), "--base-url", server.url, "--budgets", "4", "--question", "5"])
        messages = server.bodies[0]["messages"]
    assert messages == [{"role": "system", "content": "0 1 2"}, {"role": "user", "content": "5"}]


def test_requests_of_clients_have_it(folder, prompted, capsys):
    for model, roles in ((folder, ["user"]), (prompted, ["system", "user"])):
        capsys.readouterr()
        assert main(["serve-command", str(model), "--json"]) == 0
        served = json.loads(capsys.readouterr().out)
        assert [message["role"] for message in served["requests"][0]["body"]["messages"]] == roles
        assert any("system prompt" in note for note in served["notes"]) == (len(roles) == 2)


# Pictures


@pytest.fixture
def drawn(monkeypatch):
    """What `plot` draws, in place of the pictures."""
    from trl_anytime.reporting import plots

    calls = SimpleNamespace(results=None, labels=None, history=None)

    def plot_results(results, path, labels=None):
        calls.results, calls.labels = results, labels

    monkeypatch.setattr(plots, "plot_results", plot_results)
    monkeypatch.setattr(plots, "plot_training", lambda history, path: setattr(calls, "history", history))
    return calls


def test_folders_are_sources(finished, tmp_path, drawn, capsys):
    assert main(["plot", str(finished), str(finished / "results.json"), "--labels", "before", "after"]) == 0
    assert drawn.labels == ["before", "after"] and drawn.results[0] == drawn.results[1]
    for step in (9, 10):  # 10 is the last, though not in the order of the alphabet
        (tmp_path / f"checkpoint-{step}").mkdir()
        history = json.dumps({"log_history": [{"step": step, "anytime/reward@4": 0.5}]})
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(history)
    assert main(["plot", str(tmp_path)]) == 0
    assert drawn.history[-1]["step"] == 10
    assert main(["plot", str(tmp_path), "--labels", "one"]) == BAD_INPUT
    capsys.readouterr()
    assert main(["plot", str(finished), str(tmp_path)]) == BAD_INPUT
    assert "training run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["plot", str(tmp_path / "empty")]) == BAD_INPUT
    assert str(tmp_path / "empty") in capsys.readouterr().err


def test_a_label_for_each_curve(finished, tmp_path):
    picture = tmp_path / "curves.png"
    assert main(["plot", str(finished), "--labels", "a", "b", "--output", str(picture)]) == BAD_INPUT
    assert not picture.exists()
    assert main(["plot", str(finished), "--labels", "$a$", "--output", str(picture)]) == 0
    assert picture.stat().st_size > 0
