"""The tables and settings of docs/rewards.md, and its async reward; test_docs.py runs its examples."""

import asyncio
import json
import re

import pytest

from tests.support import ROOT
from tests.support.servers import LoopbackServer, QuietHandler, serving
from trl_anytime.rewards import MathReward, grade_answers

PAGE = (ROOT / "docs" / "rewards.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def policies():
    table = PAGE.partition("| subject |")[2].partition("\n\n")[0]
    for line in table.splitlines()[2:]:
        subject, _, equal, different = (cell.strip() for cell in line.strip("|").split("|"))
        for cell, score in ((equal, 1.0), (different, 0.0)):
            for gold, answer in re.findall(r"`([^`]*)` and `([^`]*)`", cell):
                yield pytest.param(gold, answer, score, id=f"{subject}: {gold} and {answer}")


def test_the_table_is_read():
    assert len(list(policies())) > 40


@pytest.mark.parametrize(("gold", "answer", "score"), policies())
def test_policies(gold, answer, score):
    assert grade_answers([answer], [gold]) == [score]


def test_settings_are_as_documented():
    defaults = MathReward()
    for name, value in (
        ("max_answer_length", "2,000 characters"),
        ("cpu_limit", "2 s"),
        ("hard_limit", "10 s"),
        ("memory_limit", "1,024 MiB"),
        ("tasks_per_worker", "2,000"),
        ("batch_limit", "60 s"),
    ):
        assert f"`{name}` ({value})" in PAGE.replace("\n  ", " ")
        assert getattr(defaults, name) == float(value.split()[0].replace(",", ""))
    for name in defaults.COUNTERS:
        assert f"| `{name}` |" in PAGE


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
