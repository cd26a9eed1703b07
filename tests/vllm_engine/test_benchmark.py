"""benchmarks/vllm_overlap.py, in short."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm_overlap.py"


def test_overlapping_phases_in_short():
    in_short = ["--batch", "4", "--budgets", "4", "8", "--summaries", "2", "--summary", "2", "--repeats", "1"]
    run = subprocess.run([sys.executable, str(SCRIPT), *in_short], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "same tokens both ways: True" in run.stdout
