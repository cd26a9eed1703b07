"""Prints the tasks whose scorers execute an answer: an audit hook sees the answers that are compiled."""

import os
import sys

from reasoning_gym.factory import DATASETS

from trl_anytime.rewards.tasks.library import open_task
from trl_anytime.rewards.tasks.source import REFUSED, TaskSource

CODE = "zqcanary"
ANSWERS = [CODE, f"[{CODE}()]", f"1 + {CODE}", f"{{'a': {CODE}}}", f"x = {CODE}", f"{CODE} + C", f"${CODE}$"]
executing = set()
task = ""


def note(event, arguments):
    if event == "compile" and arguments[0] is not None and CODE in str(arguments[0]):
        executing.add(task)


if __name__ == "__main__":
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.addaudithook(note)
    for task in set(DATASETS) - set(REFUSED):
        dataset = open_task(TaskSource(task, size=2))
        for entry in (dataset[0], dataset[1]):
            for answer in ANSWERS:
                try:
                    dataset.score_answer(answer, entry)
                except Exception:
                    continue
    reply.write(" ".join(sorted(executing)))
    reply.flush()
