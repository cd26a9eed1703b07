"""What a run shows: one line per log with the right numbers, the phase inside a step, and no dictionary of metrics."""

import re
import sys
import warnings

import pytest
from transformers import PrinterCallback, ProgressCallback

from tests.support.tiny import graded_trainer, make_dataset, tiny_trainer
from trl_anytime import BRPOTrainer
from trl_anytime.training import progress
from trl_anytime.training.progress import StepLines, log_line

LOGS = {
    "loss": -0.0177,
    "reward": 0.4567,
    "anytime/reward@30": 0.25,
    "anytime/reward@600": 0.75,
    "thinking/finished_ratio": 0.125,
    "time/thinking": 20.04,
    "time/summarising": 6.0,
    "time/scoring": 0.0,
    "time/updating": 81.26,
    "step_time": 110.4,
}


def test_the_numbers_of_a_line():
    line = log_line(LOGS, 12, 60)
    parts = [re.findall(r"\d+(?:\.\d+)?", part) for part in line.split(" | ")]
    # Step and last step; reward; curve and budgets; finished in per cent; seconds of the step, then by phase
    assert parts == [["12", "60"], ["0.46"], ["0.25", "0.75", "30", "600"], ["12"], ["110", "20", "6", "81.3"]]
    assert "thinking 20" in line and "updating 81.3" in line and "scoring" not in line


def test_the_numbers_of_an_evaluation():
    logs = {f"eval_{name}": value for name, value in LOGS.items() if name != "step_time"} | {"eval_runtime": 71.0}
    parts = [re.findall(r"\d+(?:\.\d+)?", part) for part in log_line(logs, 0, 0).split(" | ")]
    assert parts == [["0"], [], ["0.25", "0.75", "30", "600"], ["12"], ["71"]]


def test_other_logs_are_shown_as_they_are():
    assert eval(log_line({"mine": 0.123456, "name": "x"}, 1, 2)) == {"mine": "0.1235", "name": "x"}


def test_a_reward_that_nothing_was_scored_by():
    """TRL logs `None` where no function scored a summary."""
    line = log_line({"reward": 0.0, "anytime/reward@3": None, "anytime/reward@6": 0.5}, 1, 2)
    assert "- 0.50 at 3 6" in line


def test_a_line_per_step_in_a_pipe(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=3, disable_tqdm=False)
    trainer.train()
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if " | " in line]
    history = [logs for logs in trainer.state.log_history if "reward" in logs]
    assert len(lines) == len(history) == 3
    for step, (line, logs) in enumerate(zip(lines, history, strict=True), start=1):
        assert line.startswith(f"step {step}/3 ")
        assert f" {logs['reward']:.2f} " in line
        assert " ".join(f"{logs[f'anytime/reward@{budget}']:.2f}" for budget in (3, 6, 9)) in line
    assert "grad_norm" in history[0] and "grad_norm" not in printed.out
    assert "it/s" not in printed.err  # no bar


def test_the_phases_of_a_silent_step(tmp_path, capsys, monkeypatch):
    """With a minute of no length, each phase is a line."""
    monkeypatch.setattr(progress, "SILENCE", 0.0)
    tiny_trainer(tmp_path, max_steps=1).train()
    phases = re.findall(r"^step 1/1: (\w+)$", capsys.readouterr().out, re.MULTILINE)
    assert phases == ["thinking", "summarising", "grading", "updating"]


def test_phases_are_silent_for_a_minute(tmp_path, capsys):
    """The first one is a line, so that something is said at once."""
    tiny_trainer(tmp_path, max_steps=2).train()
    assert re.findall(r"^step \d/2: (\w+)$", capsys.readouterr().out, re.MULTILINE) == ["thinking"]


def test_the_bar_names_the_phase(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = []
    monkeypatch.setattr(progress.StepLines, "show_phase", recorded(progress.StepLines.show_phase, shown))
    tiny_trainer(tmp_path, max_steps=1, disable_tqdm=False).train()
    assert shown == ["thinking", "summarising", "grading", "updating"]
    assert "updating" in capsys.readouterr().err


def recorded(show_phase, shown):
    def show(self, phase):
        show_phase(self, phase)
        if self.training_bar is not None and self.training_bar.desc and self.training_bar.desc not in shown:
            shown.append(self.training_bar.desc)

    return show


def test_an_evaluation_is_a_line(tmp_path, capsys):
    trainer = graded_trainer(tmp_path)
    metrics = trainer.evaluate()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " | " in line)
    assert " ".join(f"{metrics[f'eval_anytime/reward@{budget}']:.2f}" for budget in (2, 4)) + " at 2 4" in line


def test_phases_of_an_evaluation_are_of_no_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENCE", 0)
    tiny_trainer(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=make_dataset(8)).train()
    shown = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if line.endswith(": thinking")]
    assert shown[0] == "step 1/1" and set(shown[1:]) == {"evaluation"}


class MyBar(ProgressCallback):
    """A user's own."""


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_whose_place_it_takes(tmp_path, disable_tqdm):
    trainer = tiny_trainer(tmp_path, disable_tqdm=disable_tqdm, callbacks=[MyBar])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(StepLines) == kinds.count(MyBar) == 1
    assert ProgressCallback not in kinds and PrinterCallback not in kinds
    trainer.remove_callback(StepLines)
    assert StepLines not in [type(callback) for callback in trainer.callback_handler.callbacks]


def warns(completions, completion_ids, **kwargs):
    warnings.warn("mine", FutureWarning, stacklevel=1)
    return [float(len(ids)) for ids in completion_ids]


def test_only_the_users_own_code_warns_of_the_future(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = tiny_trainer(tmp_path, max_steps=1, gradient_checkpointing=True, reward_funcs=warns)
        assert isinstance(trainer, BRPOTrainer)
        trainer.train()
    future = [str(warning.message) for warning in caught if issubclass(warning.category, FutureWarning)]
    assert set(future) == {"mine"}
