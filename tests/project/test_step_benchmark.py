"""benchmarks/step.py, in short."""

import json
import runpy
import sys

import pytest
import yaml

from tests.support import ROOT

PHASES = ("thinking", "summarising", "grading", "scoring", "updating")


@pytest.fixture
def measure(monkeypatch, capsys):
    """Run the benchmark in short, and return its results by trainer."""
    script = ROOT / "benchmarks" / "step.py"
    monkeypatch.syspath_prepend(str(script.parent))  # as a script's own folder is
    short = "--json --budgets 2 4 --prompt 3 --summary 3 --bridge 3 --num-summaries 2 --group-size 2 --repeats 1"

    def run(*words):
        monkeypatch.setattr(sys, "argv", [str(script), *short.split(), *words])
        runpy.run_path(str(script), run_name="__main__")
        return {result["trainer"]: result for result in json.loads(capsys.readouterr().out)}

    return run


def test_whole_steps_by_phase(measure):
    """No summary is right, so that nothing has an advantage: all but a token of each rollout is left out."""
    results = measure("--reward-rate", "0")

    assert list(results) == ["GRPO", "BRPO", "unpruned", "rows"]
    for name, result in results.items():
        assert result["budget"] == 4
        assert result["step"] == pytest.approx(sum(result[phase] for phase in PHASES), abs=1e-3)
        assert result["over_grpo"] == pytest.approx(result["step"] / results["GRPO"]["step"], rel=1e-2)
        assert result["thinking"] > 0 and result["updating"] > 0
        assert (result["summarising"] > 0) == (name != "GRPO")
    # A trace of 4 tokens and 2 · 2 branches of 3 + 3
    assert results["BRPO"]["pruned_ratio"] == results["rows"]["pruned_ratio"] == round(1 - 1 / 28, 3)
    assert results["unpruned"]["pruned_ratio"] == results["GRPO"]["pruned_ratio"] == 0


def test_summaries_that_agree_are_left_out(measure):
    """A trace of 4 tokens stays, unless its rewards are those of the others. 2 · 2 branches of 3 + 3 tokens do not."""
    results = measure("--agreement", "1", "--trainers", "BRPO")
    assert results["BRPO"]["pruned_ratio"] >= round(24 / 28, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["--sft_steps", "2", "--prompts", "2"], ["--study", "tiny.yaml", "--task", "pointers"]]
)
def test_what_pruning_leaves_out(words, monkeypatch, capsys, tmp_path):
    """Hardly a reward after two steps of warm start, so that nearly all is left out, and the gradients agree."""
    study = yaml.safe_load((ROOT / "studies" / "learning" / "configs" / "main.yaml").read_text())
    study["tasks"]["pointers"]["warm_start_steps"] = 2
    study["training"] |= {"prompts_per_update": 2, "warm_start_problems": 2, "eval_problems": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(study))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pruning", "--updates", "1", *words])
    runpy.run_module("benchmarks.pruning", run_name="__main__")
    update, left_out, _, _, norm, norm_without = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert update == "1" and float(left_out) > 50 and norm == norm_without
