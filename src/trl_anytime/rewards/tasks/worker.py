"""
A worker process that scores answers to problems of reasoning-gym, see [`trl_anytime.rewards.verifier.worker`].

In place of a gold answer it gets the name of a problem, which it makes again. It replies with a score, with why there
is none, or with `"timeout"`.
"""

from typing import Any

from ..verifier.worker import limited, serve
from .boxes import readings
from .library import find_entry, open_task, score_readings
from .source import PREFIX, TaskSource, split_entry_id


def _score(entry: str, answer: str, cpu_seconds: float) -> Any:
    found = split_entry_id(entry)
    assert found is not None, "the reward has read it"
    try:
        dataset, problem = find_entry(*found)  # not a matter of the answer, and so not of its limits
    except ValueError as error:
        return {"by": "changed", "failed": str(error)}
    task = TaskSource.parse(found[0]).task
    return limited(lambda: score_readings(task, dataset.score_answer, problem, readings(answer)), cpu_seconds)


def _self_test() -> tuple[bool, Any]:
    dataset = open_task(f"{PREFIX}chain_sum?size=1")
    problem = dataset[0]
    scores = [dataset.score_answer(text, problem) for text in (problem["answer"], "")]
    return scores == [1.0, 0.0], scores


if __name__ == "__main__":
    serve(_score, _self_test)
