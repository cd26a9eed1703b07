"""
Real processes for tests, without the seconds that importing takes: forks of a process that has imported everything.

Run as a program it reads one job per line, starts its ranks, waits for them, and replies with a line. The fixture
`ranks` in conftest.py runs it; `Ranks.run` is what tests call.
"""

import glob
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT


@dataclass
class Ended:
    """How one rank ended: exit code (negative: the signal), what it printed, what its scenario returned, when."""

    code: int
    output: str
    result: Any
    seconds: float


class Ranks:
    """Runs scenarios of scenarios.py in forked ranks."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ranks"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, scenario, directory, world_size=1, signals=(), limit=100, **arguments) -> list[Ended]:
        """
        Args:
            signals: what to send from outside, as (rank, signal, "path" that must exist, or seconds since the start).
            limit: seconds until all ranks are killed, which is then their code.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        job = {
            "scenario": scenario,
            "directory": str(directory),
            "world_size": world_size,
            "signals": signals,
            "limit": limit,
            "arguments": arguments,
        }
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return [Ended(**rank) for rank in json.loads(self._server.stdout.readline())]

    def close(self):
        self._server.stdin.close()
        self._server.wait()


def start(job, rank, port):
    """Fork one rank. Its output goes to a file, what the scenario returns to another."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log_path(job, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if job["world_size"] > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(job["world_size"]),
                "LOCAL_WORLD_SIZE": str(job["world_size"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        from tests.support import scenarios

        result = getattr(scenarios, job["scenario"])(job["directory"], **job["arguments"])
        Path(result_path(job, rank)).write_text(json.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # nothing of the parent's is cleaned up here


def log_path(job, rank):
    return os.path.join(job["directory"], f"output_{rank}.txt")


def result_path(job, rank):
    return os.path.join(job["directory"], f"result_{rank}.json")


def run(job):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for path in (f(job, rank) for f in (log_path, result_path) for rank in range(job["world_size"])):
        Path(path).unlink(missing_ok=True)
    began = time.monotonic()
    ranks = {start(job, rank, port): rank for rank in range(job["world_size"])}
    pids = {rank: pid for pid, rank in ranks.items()}
    ended, signals = {}, list(job["signals"])
    while ranks:
        seconds = time.monotonic() - began
        for rank, number, when in list(signals):
            if seconds > when if isinstance(when, int | float) else glob.glob(when):
                signals.remove([rank, number, when])
                if pids[rank] in ranks:
                    os.kill(pids[rank], number)
        if seconds > job["limit"]:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            rank = ranks.pop(pid)
            result = Path(result_path(job, rank))
            ended[rank] = {
                "code": os.waitstatus_to_exitcode(status),
                "output": Path(log_path(job, rank)).read_text(errors="replace"),  # a full disk may cut a character
                "result": json.loads(result.read_text()) if result.exists() else None,
                "seconds": time.monotonic() - began,
            }
        time.sleep(0.0005)
    return [ended[rank] for rank in sorted(ended)]


if __name__ == "__main__":
    from tests.support import scenarios  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
