"""
How long the installed package takes to start: the fastest of five fresh processes each.

Machines differ, so the limits are shares of TRL's own import. Ends with 1 beyond a limit.

    make wheel
"""

import subprocess
import sys
import time
from pathlib import Path

TRL = "from trl import GRPOTrainer"
LIMITS = {
    "import trl_anytime": 0.1,
    "from trl_anytime import BRPOTrainer": 1.3,  # nearly all of it is TRL's own import
    "trl-anytime --help": 0.1,
    "trl-anytime train --help": 0.1,
}


def seconds(command: list[str]) -> float:
    """Wall time of one process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def fastest(name: str) -> float:
    """Wall time of a Python statement or a command."""
    program, *words = name.split()
    command = [sys.executable, "-c", name]
    if program == "trl-anytime":
        command = [str(Path(sys.executable).parent / program), *words]
    return min(seconds(command) for _ in range(5))


def main() -> None:
    late = False
    trl = fastest(TRL)
    print(f"{TRL:40}{trl:6.2f} s")
    for name, limit in LIMITS.items():
        time_taken = fastest(name)
        late |= time_taken > limit * trl
        print(f"{name:40}{time_taken:6.2f} s, {time_taken / trl:.2f} of it, limit {limit:g}")
    sys.exit(late)


if __name__ == "__main__":
    main()
