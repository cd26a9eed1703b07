"""What the files of the project say of it: the order of its rooms, the versions that it is tested with."""

import re
from pathlib import Path

import trl_anytime
from tests.support import ROOT
from tools.pins import lowest

PACKAGE = Path(trl_anytime.__file__).parent
# A module may import from its own room and from those before it
ORDER = [
    *("outside", "rewards", "method", "brpo_config", "modeling", "rollout", "inference", "data"),
    *(
        "evaluation",
        "training",
        "reporting",
        "checks",
        "vllm_budget",
        "brpo_trainer",
        "__init__",
        "train",
        "commands",
        "cli",
        "__main__",
    ),
]
PINNED = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
OLDEST = lowest()
