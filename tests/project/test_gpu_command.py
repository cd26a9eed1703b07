"""`make gpu`, tried without one: each part in small, and what is written where parts fail, are late or cannot run."""

import json
import re
import sys
from dataclasses import replace

import pytest

from benchmarks import gpu
from tests.support import ROOT

RUN = gpu.run


def results_of(folder):
    return json.loads((folder / "gpu.json").read_text())["parts"]


def run(monkeypatch, folder, *options):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(folder), *options])
    return gpu.main()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_part_runs_in_small(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--tiny", "--minutes", "18") == 0, (tmp_path / "gpu.log").read_text()[-3000:]
    found = results_of(tmp_path)
    assert list(found) == [part.name for part in gpu.PARTS]
    for name, part in found.items():
        if part["status"] == "not run":  # a benchmark that is not there
            assert "is not there" in part["reason"]
            continue
        assert part["status"] == "done" and part["results"], name
    assert set(found["tests"]["results"].values()) <= {"passed"} | {
        outcome for outcome in found["tests"]["results"].values() if outcome.startswith("skipped")
    }
    assert found["tree_attention"]["results"][0]["share_of_flop_ideal"] > 0
    report = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} | " in report for name in found)


def python(code):
    return ["-c", code]


def part_of(code, seconds=60, needs=(), read=gpu.printed_json):
    return gpu.Part("some", seconds, python(code), python(code), needs, read)


@pytest.mark.parametrize(
    ("part", "status", "reason"),
    [
        (part_of("print('[\\n1]')"), "done", None),
        (part_of("raise SystemExit(3)"), "failed", "exit code 3"),
        (part_of("print('nothing')"), "failed", "no results"),
        (part_of("import time; print('[\\n2]', flush=True); time.sleep(60)"), "timed out", "longer than"),
        (part_of("", needs=("torch", "no_such_package")), "not run", "no_such_package"),
        (replace(part_of(""), tiny=["benchmarks/no_such_file.py"]), "not run", "no_such_file.py"),
    ],
)
def test_what_becomes_of_a_part(monkeypatch, tmp_path, part, status, reason):
    """What a part wrote before it was late counts, and parts after a failure still run."""
    monkeypatch.setattr(gpu, "PARTS", [part, replace(part_of("print('[\\n1]')"), name="next")])
    if status == "timed out":  # as on a GPU, where a part has a limit of its own
        late = part
        monkeypatch.setattr(
            gpu, "run", lambda p, folder, log, limit, tiny: RUN(p, folder, log, 5 if p is late else limit, tiny)
        )
    assert run(monkeypatch, tmp_path, "--tiny") == int(status in ("failed", "timed out"))
    found = results_of(tmp_path)
    assert found["some"]["status"] == status
    assert (reason or "") in found["some"].get("reason", "")
    assert found["some"].get("results") == {"done": [1], "timed out": [2]}.get(status)
    assert found["next"]["results"] == [1]


def test_nothing_runs_where_there_is_no_gpu_or_no_time(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "environment", lambda: {"versions": {"torch": "2"}})
    assert run(monkeypatch, tmp_path) == 0
    assert {part["reason"] for part in results_of(tmp_path).values()} <= {"no GPU", "benchmarks/step.py is not there"}
    assert run(monkeypatch, tmp_path, "--tiny", "--minutes", "0") == 0
    reasons = {part["reason"] for part in results_of(tmp_path).values()}
    assert "no time was left" in reasons


def test_all_parts_fit_into_the_time():
    """Nine minutes with the starts of their processes, and the page lists them with their limits."""
    assert sum(part.seconds for part in gpu.PARTS) <= 9.5 * 60
    page = (ROOT / "docs/benchmarks.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", page, re.MULTILINE)
    assert [(part.name, str(part.seconds)) for part in gpu.PARTS] == listed


def test_utilisation_is_a_share_of_the_cards_peak():
    """989 · 10¹² operations per second of an H100: 98.9 are a tenth."""
    rows = [{"packed_tflops_per_second": 98.9}, {"other": 1}]
    assert gpu.with_utilisation(rows, "NVIDIA H100 80GB HBM3")[0]["mfu"] == 0.1
    assert "mfu" not in gpu.with_utilisation([{"packed_tflops_per_second": 1.0}], "another")[0]


def test_tables():
    found = {
        "a": {"status": "done", "seconds": 1, "command": "python a", "results": [{"x": 1234.5, "y": "a|b"}, {"x": 2}]}
    }
    report = gpu.tables({"gpu": "card", "versions": {"torch": "2.13", "vllm": None}}, found)
    assert "card, torch 2.13" in report and "vllm" not in report
    assert "| x | 1,234 | 2 |" in report or "| x | 1,235 | 2 |" in report
    assert "| y | a\\|b |  |" in report
