"""The study with a real language model: its tasks, its rewards, and its jobs in miniature with a tiny model."""

import json
import random

import pytest
import yaml

from examples import arithmetic
from studies.learning import run
from studies.learning.study import Study
from studies.real_model.tasks import TASKS, count_legs
from studies.real_model.training import LengthDiscount
from tests.support import ROOT
from tests.support.tiny import save_chat_model

CONFIGS = ROOT / "studies" / "real_model" / "configs"


@pytest.mark.parametrize("name", TASKS)
def test_thinking_is_right_four_times_in_five(name):
    problems = arithmetic.make_problems(300, 1, name=TASKS[name].problems_name)
    rng = random.Random(0)
    drawn = [TASKS[name].make_thinking(question, rng)[1] for question in problems["question"]]
    # One in five has a slip: 240 ± 7. Some slips end at the right answer: a leg too few of nought.
    assert 225 <= sum(map(str.__eq__, drawn, problems["answer"])) <= 270


def test_legs():
    # Praying mantises have 6 legs, leeches none: 2 * 6 = 12, 1 * 0 = 0, 12 + 0 = 12
    question = "how many legs are there in total if you have 2 praying mantiss, 1 leech?"
    drawn = {count_legs(question, random.Random(seed)) for seed in range(30)}
    assert any("2*6=12." in thinking and "12+0=12." in thinking and answer == "12" for thinking, answer in drawn)


def test_a_length_discount():
    row = arithmetic.make_problems(1, 1)[0]
    right, wrong = row["answer"] + "}", "7777}"
    rewards = LengthDiscount(full_budget=80, discount=0.5)(
        thinking_length=[0, 40, 80, 200, 40],
        prompts=["question"] * 5,
        completions=[*[right] * 4, wrong],
        entry=[row["entry"]] * 5,
        well_formed=[True] * 5,
    )
    # A right answer loses half of its reward at 80 tokens, and no more beyond
    assert rewards == [1, 0.75, 0.5, 0.5, 0]


@pytest.mark.parametrize("name", ["main", "tuning"])
def test_configs(name):
    study = Study.load(CONFIGS / f"{name}.yaml")
    assert study.budgets("chain_sum", "ar_uniform") == [16, 32, 64, 96]
    assert study.budgets("chain_sum", "grpo") == [96]
    assert {job.task for job in study.jobs()} == set(TASKS)


@pytest.mark.slow
def test_a_study_in_miniature(tmp_path):
    values = yaml.safe_load((CONFIGS / "main.yaml").read_text())
    values["training"] |= {"updates": 1, "prompts_per_update": 1, "num_generations": 2, "eval_every": 1}
    values["training"]["eval_problems"] = 2
    values["tasks"]["leg_counting"] |= {"full_budget": 16, "warm_start_steps": 1}
    values["arms"] = {name: values["arms"][name] | {"updates": 1} for name in ("objective", "grpo_length")}
    values["stages"] = [{"cells": ["leg_counting/smollm2"], "arms": ["objective", "grpo_length"], "seeds": [0]}]
    save_chat_model(tmp_path / "models" / "base")
    results = tmp_path / "main.jsonl"
    assert run.run_study(Study(**values), results, 1) == []
    warm, *arms = map(json.loads, results.read_text().splitlines())
    assert warm["job"]["kind"] == "warm_start" and len(warm["accuracy"]) == 6
    assert [record["job"]["arm"] for record in arms] == ["objective", "grpo_length"]
    assert [record["budgets"] for record in arms] == [[3, 5, 11, 16], [16]]
    assert all(record["evaluations"][-1]["update"] == 1 for record in arms)
