"""The tables and settings of docs/rewards.md, and its async reward; test_docs.py runs its examples."""

import asyncio
import json
import re

import pytest

from tests.support import ROOT
from tests.support.pages import table
from tests.support.servers import LoopbackServer, QuietHandler, serving
from trl_anytime.rewards import MathReward, TaskReward, grade_answers

PAGE = (ROOT / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def policies():
    for subject, _, equal, different in table("docs/rewards.md", "subject"):
        for cell, score in ((equal, 1.0), (different, 0.0)):
            for gold, answer in re.findall(r"`([^`]*)` and `([^`]*)`", cell):
                yield pytest.param(gold, answer, score, id=f"{subject}: {gold} and {answer}")


def test_the_table_is_read():
    assert len(list(policies())) > 40


@pytest.mark.parametrize(("gold", "answer", "score"), policies())
def test_policies(gold, answer, score):
    assert grade_answers([answer], [gold]) == [score]


def test_limits_are_as_documented():
    defaults = MathReward()
    limits = {row[0].strip("`"): row[1] for row in table("docs/rewards.md", "limit")}
    assert limits.keys() == {
        *("max_answer_length", "cpu_limit", "hard_limit", "memory_limit", "tasks_per_worker", "batch_limit")
    }
    for name, value in limits.items():
        assert getattr(defaults, name) == float(value.split()[0].replace(",", "")), name


def test_counters_are_as_documented():
    assert {row[0].strip("`") for row in table("docs/rewards.md", "counter")} == set(TaskReward().COUNTERS)
    assert set(MathReward().COUNTERS) < set(TaskReward().COUNTERS)


class Sandbox(QuietHandler):
    """Stands in for a sandbox: a code passes if it is what the tests say."""

    def do_POST(self):
        task = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send({"passed": task["code"] == task["tests"]})


def test_the_async_reward():
    namespace: dict = {}
    exec(next(block for block in BLOCKS if "async def" in block), namespace)
    with serving(LoopbackServer(Sandbox)) as server:
        namespace["SANDBOX"] = f"{server.url}/run"
        completions = ["a", [{"role": "assistant", "content": "b"}], "c"]
        rewards = asyncio.run(namespace["passes_tests"]([""] * 3, completions, tests=["a", "b", "x"], other=[0] * 3))
    assert rewards == [1.0, 1.0, 0.0]
