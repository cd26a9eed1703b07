"""The real worker, but for answers that name a fault: those it commits. Started in place of the worker by tests."""

import ctypes
import os
import re
import signal
import sys
import time
from unittest import mock

from trl_anytime.rewards.verifier import equality, worker

grade = worker._grade


def commit(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(3)
    elif fault == "segfault":
        ctypes.string_at(0)
    elif fault == "stuckinC":
        pow(3, 10**9)  # holds the interpreter: no signal handler and no thread runs
    elif fault == "sleep":
        time.sleep(10_000)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(2**24))
    elif fault == "spin":
        while True:
            pass
    elif fault == "recursion":
        commit(fault)
    elif fault == "raise":
        raise RuntimeError("a bug in a library")
    elif fault == "print":
        print("noise", flush=True)
        os.write(1, b"noise\n")
        sys.stderr.write("noise\n")
    elif fault == "closeoutput":
        os.closerange(3, 100)


def faulty(gold: str, answer: str, cpu_seconds: float) -> str:
    if "fault" not in answer:
        return grade(gold, answer, cpu_seconds)
    if fifo := os.environ.get("REWARDS_TEST_FIFO"):
        with open(fifo, "w") as report:
            report.write(f"{os.getpid()}\n")
    fault = re.search("fault_{(.*?)}", answer)[1]
    # The worker's own `_grade`, with its limits, commits the fault where it would compare the answers.
    with mock.patch.object(equality, "answers_equal", side_effect=lambda *_: bool(commit(fault))):
        return grade(gold, answer, cpu_seconds)


worker._grade = faulty

if __name__ == "__main__":
    worker.main()
