"""
Real processes for tests, without the seconds that importing takes: forks of a process that has imported everything.

Run as a program it reads one job per line, starts its ranks, waits for them, and replies with a line. The fixture
`ranks` in conftest.py runs it, one for each worker of pytest-xdist; `Ranks.run` is what tests call.
"""

import contextlib
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
    """Runs scenarios of scenarios.py in forked ranks, one job after the other."""

    def __init__(self):
        self._server = None

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
        try:
            answer = self._ask(job)
        except BaseException:  # a test's time is up, too: the next job must not get the answer to this one
            self.close()
            raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return [Ended(**rank) for rank in answer["ranks"]]

    def _ask(self, job):
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ranks"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # a group with its ranks
            )
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self):
        """End the process and its ranks. The next job starts another."""
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.communicate()
            self._server = None


def torchrun(module, *arguments, limit=300) -> subprocess.CompletedProcess:
    """Run a module on two ranks, as users start them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", module]
    return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=limit)


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
    for path in (f(job, rank) for f in (log_path, result_path) for rank in range(job["world_size"])):
        Path(path).unlink(missing_ok=True)
    ended, signals, ranks = {}, list(job["signals"]), {}
    with socket.socket() as held:
        # Bound for as long as the job runs, so that no other process gets the port. It does not listen: rank 0 may.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        began = time.monotonic()
        try:
            for rank in range(job["world_size"]):
                ranks[start(job, rank, held.getsockname()[1])] = rank
            pids = {rank: pid for pid, rank in ranks.items()}
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
                        # a full disk may cut a character
                        "output": Path(log_path(job, rank)).read_text(errors="replace"),
                        "result": json.loads(result.read_text()) if result.exists() else None,
                        "seconds": time.monotonic() - began,
                    }
                time.sleep(0.0005)
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return [ended[rank] for rank in sorted(ended)]


def answer(job):
    """What became of a job. An error of one is no reason not to run the next."""
    try:
        return {"ranks": run(job)}
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    from tests.support import scenarios  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
