"""A worker process: grades one (gold, answer) pair after the other, under a CPU limit and a memory limit.

Run as `python -m trl_anytime.rewards.verifier.worker`. Reads JSON lines from standard input, `{"gold": ...,
"answer": ...}`, and replies to each with one line, `{"outcome": "equal" | "different" | "timeout"}`. Before the first
it says how its self-test went. It ends when its input does, and when its parent has died.
"""

import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

from .pool import SIGNALS_FOR_THE_PARENT

_SECONDS_TO_KILL = 1  # of CPU beyond the soft limit; by then the interpreter is stuck in C code
_WATCHDOG_SECONDS = 1.0


class OutOfTime(BaseException):
    """The soft CPU limit. No `Exception`, so that no handler in a library swallows it."""


_is_out_of_time = False


def _out_of_time(signum: int, frame: FrameType | None) -> None:
    global _is_out_of_time
    _is_out_of_time = True
    raise OutOfTime


def _watch_parent(parent: int) -> None:
    """End this process when its parent is gone. A killed parent closes no pipe that a sibling still holds."""
    while os.getppid() == parent:
        time.sleep(_WATCHDOG_SECONDS)
    os._exit(1)


def _limit_cpu(seconds: float) -> None:
    """From now on: an exception after `seconds` of CPU time, death by SIGXCPU about a second later."""
    used = time.process_time()
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(used + seconds + _SECONDS_TO_KILL) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limited(compute: Callable[[], Any], cpu_seconds: float) -> Any:
    """Return what a computation returns, or `"timeout"` if it ends at a limit on time, memory or depth."""
    global _is_out_of_time
    _is_out_of_time = False
    try:
        try:
            _limit_cpu(cpu_seconds)
            found = compute()
            return "timeout" if _is_out_of_time else found  # a bare `except:` swallows even this exception
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except (OutOfTime, MemoryError, RecursionError):
        return "timeout"


def _grade(gold: str, answer: str, cpu_seconds: float) -> str:
    from .equality import answers_equal
    from .symbolic import Symbolic, TooLarge

    def compare() -> str:
        try:
            verdict = answers_equal(gold, answer, Symbolic())
        except (MemoryError, RecursionError):
            raise
        except (TooLarge, OverflowError):
            return "timeout"
        except Exception:  # a bug of a library on odd input makes the answer wrong, not the run
            return "different"
        return "timeout" if verdict is None else "equal" if verdict else "different"

    return limited(compare, cpu_seconds)


def _self_test() -> tuple[bool, Any]:
    found = [_grade(r"\frac12", "\\sqrt{0.25}", 10.0), _grade("1", r"\sqrt{4}", 10.0)]
    return found == ["equal", "different"], found


def serve(grade: Callable[[str, str, float], Any], self_test: Callable[[], tuple[bool, Any]]) -> None:
    """
    Reply to the pool's tasks until the input ends.

    Args:
        grade (`Callable`):
            Returns the outcome, for JSON, for a gold answer, an answer and the CPU seconds it may take.
        self_test (`Callable`):
            Returns whether the worker grades as it should, and what it found.
    """
    cpu_seconds, memory_mib, parent = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    for signum in SIGNALS_FOR_THE_PARENT:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS_FOR_THE_PARENT)
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * 2**20, hard))
    threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()

    def reply(message: dict[str, object]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        passed, found = self_test()
    except BaseException:
        reply({"error": traceback.format_exc()})
        raise
    reply({"ready": passed, "self_test": found})
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries print is no reply
    os.dup2(nowhere, 2)
    for line in sys.stdin:
        task = json.loads(line)
        reply({"outcome": grade(task["gold"], task["answer"], cpu_seconds)})


def main() -> None:
    """Grade mathematical answers."""
    serve(_grade, _self_test)


if __name__ == "__main__":
    main()
