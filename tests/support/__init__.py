"""What several tests share. The environment is set here, before any library is imported."""

import os
from pathlib import Path

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # but for a test with a Hub of its own
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums have one order

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
