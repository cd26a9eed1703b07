"""What trackers were given, read back from what they wrote, offline."""

import html
import importlib.util
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from tests.support import ROOT
from trl_anytime.reporting.learning_curves import Curve, evaluations
from trl_anytime.reporting.trackers import Trackers

INSTALLED = [name for name in ("trackio", "wandb", "tensorboard") if importlib.util.find_spec(name)]


def needs(name):
    return pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run that reports to all trackers there are: evaluations at steps 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("tracked")
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        **{f"WANDB_{kind}DIR": str(folder) for kind in ("", "CACHE_", "CONFIG_", "DATA_")},
        "TRACKIO_DIR": str(folder / "trackio"),
    }
    command = [sys.executable, "-m", "tests.support.tracked_run", folder, *INSTALLED]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("`(curves|completions)", done.stderr)  # a warning names what a tracker refused
    return folder


def expected_table(folder, step):
    """TRL's own file of the table, whose rows test_brpo_trainer.py compares with the rollouts."""
    table = pd.read_parquet(folder / f"tracked/out/completions/completions_{step:05d}.parquet")
    assert list(table["budget"]) == [3, 6, 9] * (len(table) // 3) and len(table) in (12, 24)
    return table


def assert_picture(file):
    image = np.asarray(Image.open(file).convert("RGB"))
    assert image.shape[0] == 600 and image.shape[1] >= 750
    # White paper, and lines on it
    assert 0.5 < (image == 255).all(axis=2).mean() < 0.99


@needs("tensorboard")
@pytest.mark.slow
def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (tracked / "tracked/out/runs").glob("*/events*")
    reader = EventAccumulator(str(events), size_guidance={"images": 0, "tensors": 0})
    reader.Reload()
    assert [event.step for event in reader.Images("curves/eval")] == [0, 2, 4]
    assert [event.step for event in reader.Images("curves/training")] == [4]
    for tag in ("curves/eval", "curves/training"):
        for event in reader.Images(tag):
            assert_picture(io.BytesIO(event.encoded_image_string))
    assert len(reader.Scalars("eval/anytime/reward@3")) == 3

    tables = {event.step: event for event in reader.Tensors("completions/text_summary")}
    for step in (0, 1):
        expected = expected_table(tracked, step)
        head, blank, names, rule, *rows = tables[step].tensor_proto.string_val[0].decode().split("\n")
        assert head == f"{len(expected)} of {len(expected)} rows" and (blank, rule) == ("", "| --- " * 7 + "|")
        cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in (names, *rows)]
        table = pd.DataFrame(cells[1:], columns=cells[0]).map(html.unescape)
        assert list(table["budget"].astype(int)) == list(expected["budget"])
        for name in ("thinking", "completion"):
            assert list(table[name]) == [text.strip() for text in expected[name]]
        assert list(table["prompt"]) == [prompt[0]["content"] for prompt in expected["prompt"]]
        assert np.allclose(table["advantage"].astype(float), expected["advantage"], atol=1e-2)


@needs("wandb")
@pytest.mark.slow
def test_wandb(tracked):
    (run,) = tracked.glob("wandb/offline-run-*/files")
    pictures = list(run.glob("media/images/curves/*.png"))
    assert sorted(path.name.split("_")[0] for path in pictures) == ["eval", "eval", "eval", "training"]
    for path in pictures:
        assert_picture(path)
    tables = [json.loads(path.read_text()) for path in run.glob("media/table/completions_*.table.json")]
    steps = {table["data"][0][0]: pd.DataFrame(table["data"], columns=table["columns"]) for table in tables}
    assert set(steps) == {0, 1, 2, 3, 4}
    assert_same_rows(steps[1], expected_table(tracked, 1))


@needs("trackio")
@pytest.mark.slow
def test_trackio(tracked):
    logs = json.loads((tracked / "result.json").read_text())["trackio"]
    pictures = [(name, log) for log in logs for name in log if name.startswith("curves/")]
    assert [(name, log["train/global_step"]) for name, log in pictures] == [
        ("curves/eval", 0),
        ("curves/eval", 2),
        ("curves/eval", 4),
        ("curves/training", 4),
    ]
    for name, log in pictures:
        assert_picture(tracked / "trackio/media" / log[name]["file_path"])
    tables = [pd.DataFrame(log["completions"]["_value"]) for log in logs if "completions" in log]
    (table,) = (table for table in tables if table["step"][0] == 1)
    assert_same_rows(table, expected_table(tracked, 1))


def assert_same_rows(table, expected):
    assert set(table.columns) == set(expected.columns)
    for name in ("budget", "thinking", "completion", "parity_reward", "advantage", "thinking_advantage"):
        assert list(table[name]) == list(expected[name])


@pytest.mark.skipif(not INSTALLED, reason="no tracker is installed")
@pytest.mark.slow
def test_trackers_change_nothing(tracked):
    results = json.loads((tracked / "result.json").read_text())
    assert results["tracked"]["log"] == results["untracked"]["log"]
    assert results["tracked"]["weights"] == results["untracked"]["weights"]


# Without a tracker, or a part of one


def evaluation(step, first, last, name="eval"):
    return {f"{name}_runtime": 1.0, "eval_anytime/reward@4": first, "eval_anytime/reward@16": last, "step": step}


def trackers(*names):
    return Trackers(names, CallbackHandler([], None, None, None, None))


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "trl_anytime.reporting.trackers"]


def test_curves_of_evaluations():
    history = [
        {"anytime/reward@4": 0.1, "step": 1},
        evaluation(1, 0.2, 0.4, "eval_hard"),
        evaluation(1, 0.3, 0.5, "eval_easy"),
        evaluation(2, 0.6, None, "eval_easy"),
        {"train_runtime": 3.0, "step": 2},
    ]
    assert evaluations(history) == {
        "hard": [Curve(1, {4: 0.2, 16: 0.4})],
        "easy": [Curve(1, {4: 0.3, 16: 0.5}), Curve(2, {4: 0.6})],
    }


def test_without_matplotlib_a_line_says_how_to_get_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "trl_anytime.reporting.plots", raising=False)
    state = TrainerState(log_history=[evaluation(3, 0.2, 0.4)])
    ours = trackers("tensorboard")
    with caplog.at_level("WARNING", logger="trl_anytime.reporting.trackers"):
        for _ in range(2):
            ours.update(state.log_history[0], state, None)
    (warning,) = warnings(caplog)
    assert "matplotlib" in warning and "pip install 'trl-anytime[plot]'" in warning


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("trackio", "wandb")])
def test_a_tracker_that_fails_is_named_and_costs_the_figure(name, caplog):
    """Neither has been told of a run, and says so by an exception."""
    state = TrainerState(log_history=[evaluation(3, 0.2, 0.4)], global_step=3)
    with caplog.at_level("WARNING", logger="trl_anytime.reporting.trackers"):
        trackers(name).update(state.log_history[0], state, None)
    (warning,) = warnings(caplog)
    assert [part for part in ("Step 3", name, "`curves/eval`", "init") if part not in warning] == []


@needs("tensorboard")
def test_long_tables_say_how_much_is_left_out(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    count = 100
    extra = {"budget": [4] * count, "thinking": ["a|b\nc"] * count}
    prompts = [[{"role": "user", "content": "1"}]] * count
    table = {
        "prompt": prompts,
        "completion": ["<b>"] * count,
        "rewards": {"r": [1.0] * count},
        "extra": extra,
        "advantages": [0.25] * count,
    }
    with SummaryWriter(str(tmp_path)) as writer:
        ours = Trackers(["tensorboard"], CallbackHandler([TensorBoardCallback(writer)], None, None, None, None))
        ours.update({"loss": 1.0}, TrainerState(global_step=7), table)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    (event,) = reader.Tensors("completions/text_summary")
    lines = event.tensor_proto.string_val[0].decode().split("\n")
    assert (event.step, lines[0], len(lines)) == (7, "64 of 100 rows", 4 + 64)
    assert lines[4] == "| 4 | a&#124;b<br>c | &#60;b&#62; | 1 | 0.25 | 1 |"


def test_other_trackers_get_nothing(caplog):
    state = TrainerState(log_history=[evaluation(3, 0.2, 0.4)])
    trackers("mlflow").update(state.log_history[0], state, {})
    assert warnings(caplog) == []
