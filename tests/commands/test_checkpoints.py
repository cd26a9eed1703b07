"""`trl-anytime eval --checkpoints` on the checkpoints of tiny runs, of whole models and of adapters."""

import csv
import json
import shutil
import weakref
from dataclasses import replace

import pytest
from peft import LoraConfig

from tests.support.tiny import make_model, make_tokenizer, tiny_trainer
from trl_anytime import AnytimeConfig
from trl_anytime.cli import main
from trl_anytime.commands import measurement
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.evaluation.results import load_results

pytestmark = pytest.mark.slow  # processes, or a training of its own

SAVED = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "max_steps": 3}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of three steps. Its first checkpoint has weights alone."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer = tiny_trainer(run, learning_rate=0.1, **SAVED)
    trainer.train()
    trainer.save_model()
    for name in (*TOKENIZER, "anytime_config.json"):
        (run / "checkpoint-1" / name).unlink()
    problems = [json.dumps({"problem": str(i), "answer": str(i)}) for i in range(3)]
    (run.parent / "problems.jsonl").write_text("\n".join(problems))
    (run.parent / "reward.py").write_text(
        "def odd(completion_ids, **kwargs):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    return run


def words(run, output, *more):
    problems = ["--dataset", run.parent / "problems.jsonl", "--instruction", "", "--budgets", "2,4,8", "--samples", 2]
    reward = ["--reward", f"{run.parent / 'reward.py'}:odd", "--device", "cpu", "--output", output]
    return [*map(str, ["eval", run, "--checkpoints", *problems, *reward, *more])]


@pytest.fixture(scope="module")
def evaluated(run):
    output = run.parent / "evaluated"
    assert main(words(run, output)) == 0
    return output


@pytest.fixture
def loaded(monkeypatch):
    """Names of the models that are loaded. Each is held alone."""
    names, held = [], []
    load = measurement.load_model

    def load_model(options):
        assert [reference for reference in held if reference() is not None] == []
        model = load(options)
        names.append(options.model.rpartition("/")[2])
        held.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measurement, "load_model", load_model)
    return names


def test_every_checkpoint_has_a_folder_of_its_own(run, loaded, capsys, tmp_path):
    assert main(words(run, tmp_path)) == 0
    printed = capsys.readouterr()
    assert loaded == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    header, *rows = printed.out.splitlines()
    assert header.split()[:7] == ["step", "at", "2", "at", "4", "at", "8"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    by_step = {step: load_results(tmp_path / f"checkpoint-{step}" / "results.json") for step in (1, 2, 3)}
    for step, results in by_step.items():
        assert results["protocol"]["model"] == str(run / f"checkpoint-{step}")
        assert (tmp_path / f"checkpoint-{step}" / "questions.png").stat().st_size > 0
    # The weights differ, so what they answer does
    answers = [(tmp_path / f"checkpoint-{step}" / "samples.jsonl").read_text().partition("\n")[2] for step in by_step]
    assert len(set(answers)) == 3
    with (tmp_path / "checkpoints.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["budget"]), float(row["accuracy"])) for row in table] == [
        (step, budget, estimate["mean"])
        for step, results in by_step.items()
        for budget, estimate in zip([2, 4, 8], results["curves"]["problems"]["accuracy"], strict=True)
    ]
    assert (tmp_path / "checkpoints.png").stat().st_size > 0


def test_what_is_done_is_not_done_again(run, evaluated, loaded, capsys, tmp_path):
    shutil.copytree(evaluated, tmp_path / "output")
    journal = tmp_path / "output" / "checkpoint-2" / "samples.jsonl"
    kept = journal.read_bytes().splitlines(keepends=True)[:3]
    journal.write_bytes(b"".join(kept))
    capsys.readouterr()
    assert main([*words(run, tmp_path / "output"), "--json"]) == 0
    assert loaded == ["checkpoint-2"]
    assert journal.read_bytes().splitlines(keepends=True)[:3] == kept
    printed = json.loads(capsys.readouterr().out)
    assert [one["step"] for one in printed] == [1, 2, 3]
    for one in printed:
        path = tmp_path / "output" / f"checkpoint-{one['step']}" / "results.json"
        assert one["results"] == load_results(path)
    assert printed[0]["results"] == load_results(evaluated / "checkpoint-1" / "results.json")


def test_other_settings_of_the_report_need_no_model(run, evaluated, loaded, tmp_path):
    """The samples are the same, so nothing is loaded. A baseline is compared with every checkpoint."""
    shutil.copytree(evaluated, tmp_path / "output")
    (tmp_path / "frontier.csv").write_text("budget,accuracy\n1,1\n8,1\n")
    baseline = evaluated / "checkpoint-1" / "results.json"
    more = ["--frontier", tmp_path / "frontier.csv", "--right-at", 1, "--baseline", baseline, "--steps", "1,3"]
    assert main(words(run, tmp_path / "output", *more)) == 0
    assert loaded == []
    for step in (1, 3):
        results = load_results(tmp_path / "output" / f"checkpoint-{step}" / "results.json")
        curve = results["curves"]["problems"]
        assert results["right_at"] == 1 and results["frontier"] == {"problems": [[1, 1.0], [8, 1.0]]}
        assert curve["gap"]["mean"]["mean"] == pytest.approx(1 - curve["area"]["mean"])
        assert results["baseline"]["model"] == str(run / "checkpoint-1")


def test_weights_that_were_saved_again_are_refused(run, evaluated, capsys, tmp_path):
    """A journal of a run whose folder another run has overwritten."""
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(evaluated, tmp_path / "output")
    for name in ("problems.jsonl", "reward.py"):
        shutil.copy(run.parent / name, tmp_path)
    header, *rest = (tmp_path / "output" / "checkpoint-2" / "samples.jsonl").read_text().splitlines(keepends=True)
    named = header.replace(str(run), str(tmp_path / "run"))
    (tmp_path / "output" / "checkpoint-2" / "samples.jsonl").write_text("".join([named, *rest]))
    steps = ["--steps", "2"]
    assert main(words(tmp_path / "run", tmp_path / "output", *steps)) == 0
    make_model(seed=7).save_pretrained(tmp_path / "run" / "checkpoint-2")
    assert main(words(tmp_path / "run", tmp_path / "output", *steps)) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "weights" in line and "checkpoint-2" in line and "--output" in line


def test_adapters(tmp_path, run, loaded):
    """LoRA checkpoints on a base model whose tokenizer they take."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapters = tmp_path / "adapters"
    trainer = tiny_trainer(
        adapters, model=str(tmp_path / "base"), peft_config=lora, learning_rate=1.0, **SAVED | {"max_steps": 2}
    )
    trainer.train()
    for step in (1, 2):
        assert (adapters / f"checkpoint-{step}" / "adapter_model.safetensors").exists()
        for name in TOKENIZER:
            (adapters / f"checkpoint-{step}" / name).unlink()
            (adapters / name).unlink(missing_ok=True)
    for name in ("problems.jsonl", "reward.py"):
        shutil.copy(run.parent / name, tmp_path)
    output = tmp_path / "output"
    assert main(words(adapters, output)) == 0
    assert loaded == ["checkpoint-1", "checkpoint-2"]
    first, second = ((output / f"checkpoint-{step}" / "samples.jsonl").read_text() for step in (1, 2))
    assert "adapter_model.safetensors" in first
    assert first.partition("\n")[2] != second.partition("\n")[2]


def test_evaluated_checkpoints_are_plotted(evaluated, capsys, tmp_path):
    picture = tmp_path / "picture.png"
    assert main(["plot", str(evaluated), "--output", str(picture)]) == 0
    assert picture.stat().st_size > 0
    assert main(["plot", str(evaluated), "--labels", "a"]) == BAD_INPUT
    assert main(["plot", str(evaluated), "--questions"]) == BAD_INPUT
    questions = tmp_path / "questions.png"
    assert main(["plot", str(evaluated / "checkpoint-1"), "--questions", "--output", str(questions)]) == 0
    assert questions.stat().st_size > 0
    shutil.copytree(evaluated, tmp_path / "other")
    path = tmp_path / "other" / "checkpoint-2" / "results.json"
    results = json.loads(path.read_text())
    results["protocol"]["budgets"] = [2, 4, 9]
    path.write_text(json.dumps(results))
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "other"), "--output", str(picture)]) == BAD_INPUT
    assert "checkpoint-2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--base-url", "http://localhost:1"], "--base-url"),
        (["--steps", "2,4"], "step 4"),
        (["--right-at", "nan"], "--right-at"),
    ],
)
def test_bad_options(run, capsys, tmp_path, more, named):
    assert main(words(run, tmp_path / "output", *more)) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line and not (tmp_path / "output").exists()


def test_folders_that_are_not_those_of_a_run(run, capsys, tmp_path):
    def refused(folder, *more):
        assert main(words(folder, tmp_path / "output", *more)) == BAD_INPUT
        return capsys.readouterr().err.splitlines()[-1]

    for name in ("problems.jsonl", "reward.py"):
        shutil.copy(run.parent / name, tmp_path)
    assert "checkpoint-STEP" in refused(tmp_path / "missing")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    # Budgets of its own, where none are given
    config = AnytimeConfig.from_pretrained(copy / "checkpoint-2")
    replace(config, max_summary_length=2).save_pretrained(copy / "checkpoint-2")
    line = refused(copy)
    assert "checkpoint-2" in line and "max_summary_length" in line
    (copy / "checkpoint-3" / "model.safetensors").unlink()
    assert "checkpoint-3" in refused(copy)
    # One that is being saved
    (copy / "checkpoint-2" / "manifest.json").write_text('{"files": null}')
    assert "checkpoint-2" in refused(copy, "--steps", "1,2")
    assert not (tmp_path / "output").exists()
    options = [word for word in words(run, tmp_path / "output", "--steps", "1") if word != "--checkpoints"]
    assert main(options) == BAD_INPUT
    assert "--checkpoints" in capsys.readouterr().err


def test_checkpoints_without_results_are_left_out_of_a_plot(evaluated, tmp_path, monkeypatch):
    from trl_anytime.reporting import evaluation_plots

    drawn = []
    monkeypatch.setattr(evaluation_plots, "plot_checkpoints", lambda by_step, path: drawn.append(list(by_step)))
    shutil.copytree(evaluated, tmp_path / "output")
    (tmp_path / "output" / "checkpoint-1" / "results.json").unlink()
    assert main(["plot", str(tmp_path / "output")]) == 0
    assert drawn == [[2, 3]]
