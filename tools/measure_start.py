"""
How long the installed package takes to start: the fastest of five fresh processes each. Ends with 1 beyond a limit.

    make wheel
"""

import subprocess
import sys
import time
from pathlib import Path

# None: no limit, since nearly all of it is TRL's own import, which stands below it for comparison
LIMITS = {
    "import trl_anytime": 4.0,
    "from trl_anytime import BRPOTrainer": None,
    "from trl import GRPOTrainer": None,
    "trl-anytime --help": 2.0,
    "trl-anytime train --help": 2.0,
}


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    late = False
    for name, limit in LIMITS.items():
        program, *words = name.split()
        command = [sys.executable, "-c", name]
        if program == "trl-anytime":
            command = [str(Path(sys.executable).parent / program), *words]
        fastest = min(seconds(command) for _ in range(5))
        late |= limit is not None and fastest > limit
        print(f"{name:40}{fastest:6.2f} s" + ("" if limit is None else f", limit {limit:g} s"))
    sys.exit(late)


if __name__ == "__main__":
    main()
