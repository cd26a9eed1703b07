"""Have the problems of a task made, in a process of its own."""

import json
import subprocess

from ..verifier.pool import python_module
from .source import TaskSource, library_version


def task_problems(source: TaskSource) -> list[dict[str, str]]:
    """
    Return the problems of a source.

    The same source gives the same problems in every process and on every machine with the same version of the library.

    Args:
        source ([`TaskSource`]):
            A task with its settings.

    Returns:
        `list[dict]`: `question`, `answer` (the task's own), and `entry`, the problem's name for [`TaskReward`].

    Raises:
        `ValueError`: If the library is missing, or the task cannot be used with these settings.
    """
    library_version()
    command, environment = python_module(f"{__package__}.library", str(source))
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
    try:
        reply = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"The problems of `{source}` cannot be made: {last[:300]}. Change its settings.") from None
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["problems"]
