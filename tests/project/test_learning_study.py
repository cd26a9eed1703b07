"""A study in miniature, through the real runner and the real analysis."""

import json
import random
from itertools import product

import pytest
import yaml

from studies.learning import analysis, run
from studies.learning.study import Job, Study
from studies.learning.tasks import TASKS, RegisterProblem, make_register_thinking, values
from tests.support import ROOT

MAIN = ROOT / "studies" / "learning" / "configs" / "main.yaml"
NOISE_PARTS = ("none", "v2_others", "brpo_others", "adaptive", "answers", "all")
MINIATURE = {
    "tasks": {"pointers": {"full_budget": 16, "warm_start_steps": 2}},
    "families": {"llama": {"warm_start_learning_rate": 1e-3}},
    "training": {
        "updates": 2,
        "prompts_per_update": 2,
        "num_generations": 4,
        "eval_every": 1,
        "eval_problems": 4,
        "warm_start_problems": 8,
        "measure": {
            "prompts": 6,
            "group_sizes": [4],
            "gradient_prompts": 2,
            "gradient_priors": ["uniform"],
            "likelihood_priors": ["uniform"],
            "likelihood_budgets": [4, 8],
        },
    },
    "arms": {
        "grpo": {
            "num_budgets": 1,
            "prior": "base",
            "baseline": "v2",
            "num_summaries": 1,
            "summary_policy": "final",
            "updates": 3,
        },
        "ar_uniform": {"num_budgets": 4, "prior": "uniform", "baseline": "brpo", "num_summaries": 2},
    },
    "learning_rates": {"pointers/llama": {"default": 1e-3, "grpo": 2e-3}},
    "warm_start_seeds": [7],
    "stages": [
        {"cells": ["pointers/llama"], "arms": ["grpo", "ar_uniform"], "seeds": [0]},
        {"cells": ["pointers/llama"], "arms": ["warm_start"], "seeds": [0], "measure": True},
    ],
}


# Tasks


def test_registers():
    # a: 3, then 3 + 4 = 7 = 2 modulo 5. With 1 added by a slip in the first step: 4, then 8 = 3.
    assert values(("=3", "+4")) == [3, 2]
    assert values(("=3", "+4"), slip=0, error=1) == [4, 3]
    problem = RegisterProblem("q+3 b+4 p=1 c. a=3 r. a", (("=3", "+4"), ("=1", "+3")), asked=0)
    assert problem.answer == "2"
    right = 0
    for seed in range(400):
        thinking, answer = make_register_thinking(problem, random.Random(seed))
        steps = [word for word in thinking if word[0] in "abc"]
        assert steps[-1] == "c." and answer == [word for word in steps if word[0] == "b"][-1][1]
        right += answer == "2"
    # One chain in five has a slip, and no slip leaves this answer right: 320 ± 8
    assert 290 <= right <= 350


@pytest.mark.parametrize("name", TASKS)
def test_tasks_use_only_their_words(name):
    task, rng = TASKS[name], random.Random(0)
    for _ in range(200):
        problem = task.make_problem(rng)
        thinking, answer = task.make_thinking(problem, rng)
        assert {*problem.question.split(), *thinking, answer, problem.answer} <= set(task.words)


# Analysis


def test_intervals():
    # Of 1, 2, 3: deviation 1, so 4.303 / √3 = 2.484 (Student's t with 2 degrees of freedom)
    assert analysis.interval([1, 2, 3]) == pytest.approx((2, 2.484), abs=1e-3)
    assert analysis.text([1, 2, 3], signed=True) == "+2.000 ± 2.484"
    assert analysis.text([10, 11, 12], signed=True) == "**+11.000** ± 2.484"
    assert analysis.text([0.25, 0.75]) == "0.500"


def run_record(seed, arm, anytime, tokens):
    """A run of 40 updates of as many tokens each, evaluated every 20."""
    return {
        "job": {"kind": "train", "task": "t", "family": "f", "seed": seed, "warm_start_seed": 7, "arm": arm},
        "budgets": [8],
        "evaluations": [
            {
                "update": 20 * i,
                "tokens": 20 * i * tokens,
                "cpu_seconds": 20 * i * 0.5,
                "accuracy": [value] * 6,
                "thinking_length": 5,
            }
            for i, value in enumerate(anytime, start=1)
        ],
    }


@pytest.fixture
def by_hand(tmp_path):
    warm = {"kind": "warm_start", "task": "t", "family": "f", "seed": 7}
    records = [
        {"job": warm, "accuracy": [0.2] * 6, "thinking_length": 9},
        run_record(0, "grpo", [0.4, 0.6], tokens=10),
        run_record(0, "ar_uniform", [0.6, 0.8], tokens=15),
    ]
    (tmp_path / "main.jsonl").write_text("\n".join(map(json.dumps, records)))
    return analysis.Results(tmp_path)


def test_differences_by_hand(by_hand):
    cell = ("t", "f")
    # At equal updates 0.8 - 0.6. At equal tokens GRPO would be at 600 of its 400: its last evaluation stands in.
    assert analysis.differences(by_hand, cell, "ar_uniform", "update").tolist() == [pytest.approx([0.2] * 6)]
    assert analysis.differences(by_hand, cell, "ar_uniform", "tokens").tolist() == [pytest.approx([0.2] * 6)]
    # GRPO against AR-uniform: 400 tokens are 26.67 updates of it, 0.6 + 0.2 / 3 = 0.667
    reverse = analysis.differences(by_hand, cell, "grpo", "tokens", against="ar_uniform")
    assert reverse.tolist() == [pytest.approx([0.6 - 2 / 3] * 6)]
    # After 10 updates, half-way to the first evaluation: 0.4 and 0.3
    early = analysis.differences(by_hand, cell, "ar_uniform", "update", after=10)
    assert early.tolist() == [pytest.approx([0.1] * 6)]


def test_goals_by_hand(by_hand):
    *_, smallest, _, share = analysis.goals_table(by_hand, ("t", "f")).splitlines()
    # Equal time is equal updates here; AR-uniform is at 0.6 after 20 of 40
    assert smallest.endswith("smallest difference | +0.200: met |")
    assert share.endswith("median share | 0.50: met |")


def test_reach_by_hand(by_hand):
    progress = by_hand.progress(by_hand.runs["t", "f"]["ar_uniform"][0])
    assert analysis.reach(progress, 0.6, "update") == pytest.approx(20)
    assert analysis.reach(progress, 0.7, "tokens") == pytest.approx(30 * 15)  # half-way from 20 to 40 updates
    assert analysis.reach(progress, 0.1, "update") == 0
    assert analysis.reach(progress, 0.9, "update") == float("inf")


def write(folder, study, records):
    (folder / f"{study}.jsonl").write_text("\n".join(map(json.dumps, records)))


def rows_of(table):
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


WARM = {
    "job": {"kind": "warm_start", "task": "t", "family": "f", "seed": 7},
    "accuracy": [0.2] * 6,
    "thinking_length": 9,
}


def test_variants_by_hand(tmp_path):
    """Two of three seeds of one arm are there, one of another, none of the others."""
    main = [run_record(seed, "grpo", [0.4, 0.6], tokens=10) for seed in (0, 1, 2)]
    main += [run_record(seed, "ar_uniform", [0.6, 0.7 + 0.05 * seed], tokens=15) for seed in (0, 1, 2)]
    main += [run_record(0, "pairs_brpo", [0.5, 0.5], tokens=15)]
    write(tmp_path, "main", [WARM, *main])
    objective = [run_record(seed, "objective", [0.7, 0.9], tokens=20) for seed in (0, 2)]
    objective += [run_record(0, "pairs_objective", [0.3, 0.65], tokens=20)]
    write(tmp_path, "objective", [WARM, *objective])
    results = analysis.Results(tmp_path)
    rows = {row[""]: row for row in rows_of(analysis.variants_table(results, ("t", "f")))}
    assert {name: row["n"] for name, row in rows.items()} == {
        "GRPO": "3",
        "AR-uniform": "3",
        "AR-uniform, G = 2, V": "1",
        "weight P/A": "2",
        "weight P/A, G = 2, V": "1",
    }
    # 20 tokens and half a CPU second for each update
    weighted = rows["weight P/A"]
    assert (weighted["anytime"], weighted["tokens per update"], weighted["CPU seconds per update"]) == (
        "0.900", "20", "0.50",
    )  # fmt: skip
    # Seeds 0 and 2: 0.9 - 0.6, at equal time the same, and 0.9 minus 0.7 and 0.8
    assert (weighted["minus GRPO"], weighted["at equal time"]) == ("+0.300", "+0.300")
    assert (weighted["minus AR-uniform"], weighted["minus one summary trained"]) == ("+0.150", "")
    # Groups of two are compared with groups of two: 0.65 - 0.5
    pairs = rows["weight P/A, G = 2, V"]
    assert (pairs["minus GRPO"], pairs["minus AR-uniform"]) == ("+0.050", "+0.150")
    assert rows["AR-uniform"]["minus GRPO"] == "**+0.150** ± 0.124"  # 0.1, 0.15, 0.2: 4.303 · 0.05 / √3
    assert (rows["GRPO"]["minus GRPO"], rows["AR-uniform"]["minus AR-uniform"]) == ("", "")

    curves = rows_of(analysis.variants_curves_table(results, ("t", "f")))
    assert [(row[""], row["minus"], row["n"]) for row in curves] == [
        ("GRPO", "", "3"),
        ("AR-uniform", "", "3"),
        ("AR-uniform, G = 2, V", "", "1"),
        ("weight P/A", "", "2"),
        ("weight P/A", "GRPO", "2"),
        ("weight P/A", "AR-uniform", "2"),
        ("weight P/A, G = 2, V", "", "1"),
        ("weight P/A, G = 2, V", "GRPO", "1"),
        ("weight P/A, G = 2, V", "AR-uniform, G = 2, V", "1"),
    ]


def test_differences_over_two_sets_of_warm_starts_by_hand(tmp_path):
    write(tmp_path, "main", [WARM, *(run_record(seed, "grpo", [0.4, 0.6], tokens=10) for seed in (0, 1))])
    write(tmp_path, "objective", [WARM, *(run_record(seed, "objective", [0.7, 0.8], tokens=20) for seed in (0, 1))])
    # Another warm start of the same name, as on another processor
    other = {**WARM, "accuracy": [0.3] * 6}
    runs = [run_record(seed, "grpo", [0.4, 0.5], tokens=10) for seed in (5, 6)]
    runs += [run_record(seed, "objective", [0.7, 0.7 + 0.1 * (seed - 5)], tokens=20) for seed in (5, 6)]
    runs += [run_record(5, "likelihood", [0.7, 0.9], tokens=20)]  # which the first set does not have
    write(tmp_path, "variants", [other, *runs])
    both = [analysis.Results(tmp_path, studies) for studies in analysis.FROM_THE_SAME.values()]
    (row,) = rows_of(analysis.pooled_table(both, ("t", "f")))
    # 0.2, 0.2, 0.2, 0.3: 3.182 · 0.05 / 2
    assert (row[""], row["minus"], row["n"], row["anytime"]) == ("weight P/A", "GRPO", "4", "**+0.225** ± 0.080")


def test_studies_that_cannot_be_paired(tmp_path):
    write(tmp_path, "main", [WARM, run_record(0, "grpo", [0.4], tokens=1)])
    write(tmp_path, "objective", [{**WARM, "accuracy": [0.3] * 6}])
    with pytest.raises(ValueError, match="warm start 7"):
        analysis.Results(tmp_path)
    write(tmp_path, "objective", [WARM, run_record(0, "grpo", [0.4], tokens=1)])
    with pytest.raises(ValueError, match="seed 0 of grpo"):
        analysis.Results(tmp_path)


def test_noise_by_hand(tmp_path):
    def measured(seed, noise):
        rows = [("sampled", 4, 50.0, noise), ("likelihood", 14, 52.0, noise / 4)]
        return {
            "job": {"kind": "measure", "task": "t", "family": "f", "seed": seed, "warm_start_seed": 7, "arm": ""},
            "likelihood": {
                "uniform": [
                    {"reward": reward, "num_budgets": number, "tokens": tokens, "noise": dict.fromkeys(NOISE_PARTS, x)}
                    for reward, number, tokens, x in rows
                ]
            },
        }

    write(tmp_path, "noise", [WARM, measured(0, 1.0), measured(1, 2.0), measured(2, 4.0)])
    sampled, dense = rows_of(analysis.noise_table(analysis.Results(tmp_path, analysis.FROM_THE_SAME["variants"])))
    assert (sampled["budgets"], sampled["n"], sampled["packed tokens"], sampled["all"]) == (
        "4", "3", "50", "2.00 (1.00–4.00)",
    )  # fmt: skip
    assert (dense["reward"], dense["packed tokens"], dense["answers"]) == ("likelihood", "52", "0.50 (0.25–1.00)")


# The study's description


def test_jobs_come_in_order_and_know_what_they_need():
    jobs = Study(**MINIATURE).jobs()
    warm = Job("warm_start", "pointers", "llama", 7, 7)
    grpo = Job("train", "pointers", "llama", 0, 7, "grpo", 2e-3)
    assert jobs[:3] == [warm, grpo, Job("train", "pointers", "llama", 0, 7, "ar_uniform", 1e-3)]
    assert jobs[3:] == [Job("measure", "pointers", "llama", 0, 7)]
    assert [job.requires for job in jobs] == [None, warm, warm, warm]
    assert Job("measure", "pointers", "llama", 0, 7, "grpo", 2e-3).requires == grpo


def test_the_main_study_is_complete():
    study = Study.load(MAIN)
    trained = {(job.arm, f"{job.task}/{job.family}") for job in study.jobs() if job.kind == "train"}
    assert {arm for arm, _ in trained} == set(study.arms) == set(analysis.NAMES)
    assert set(study.tasks) == set(TASKS)
    assert study.budgets("pointers", "ar_uniform") == [14, 28, 42, 56]
    assert study.eval_budgets("pointers") == [7, 14, 21, 28, 42, 56]
    for job in study.jobs():
        assert job.requires is None or job.requires in study.jobs()


@pytest.mark.parametrize(
    ("name", "arms", "seeds", "warm_starts"),
    [
        ("objective", {"objective", "likelihood"}, range(5), range(100, 105)),
        ("variants", {*analysis.COMPARED, "pairs_brpo", *analysis.VARIANT_NAMES}, range(5, 10), range(105, 110)),
    ],
)
def test_the_studies_of_variants_are_complete(name, arms, seeds, warm_starts):
    """Every arm has five seeds on both tasks, and begins and learns as those of the main study."""
    study, main = Study.load(MAIN.with_name(f"{name}.yaml")), Study.load(MAIN)
    runs = [job for job in study.jobs() if job.kind == "train"]
    assert sorted((job.arm, job.task, job.seed) for job in runs) == sorted(product(arms, study.tasks, seeds))
    assert {(job.seed, job.warm_start_seed) for job in runs} == set(zip(seeds, warm_starts, strict=True))
    assert (study.tasks, study.families, study.learning_rates) == (main.tasks, main.families, main.learning_rates)
    assert all(study.arms[arm] == main.arms[arm] for arm in set(study.arms) & set(main.arms))


def test_the_study_of_noise_begins_as_the_variants():
    study, variants = (Study.load(MAIN.with_name(f"{name}.yaml")) for name in ("noise", "variants"))
    assert (study.tasks, study.families) == (variants.tasks, variants.families)
    assert {job.requires for job in study.jobs()} <= {None, *variants.jobs()}
    assert study.training["measure"]["likelihood_budgets"] == [4, 14]


# Runner


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The miniature study, run to its end."""
    output_dir = tmp_path_factory.mktemp("study")
    path = output_dir / "study.yaml"
    path.write_text(yaml.safe_dump(MINIATURE))
    assert run.run_study(Study.load(path), output_dir / "study.jsonl", num_workers=1) == []
    return output_dir / "study.jsonl"


@pytest.mark.slow
def test_every_job_has_a_line(finished):
    records = [json.loads(line) for line in finished.read_text().splitlines()]
    assert [Job(**record["job"]) for record in records] == Study(**MINIATURE).jobs()
    warm, grpo, uniform, measured = records
    assert len(warm["accuracy"]) == 6
    assert grpo["budgets"] == [16] and uniform["budgets"] == [4, 8, 12, 16]
    assert [e["update"] for e in grpo["evaluations"]] == [1, 2, 3]
    assert [e["update"] for e in uniform["evaluations"]] == [1, 2]
    for record in (grpo, uniform):
        for name in ("tokens", "seconds", "cpu_seconds"):  # so far
            so_far = [e[name] for e in record["evaluations"]]
            assert so_far[0] > 0 and so_far == sorted(set(so_far))
    # 2 prompts × 4 traces of 1 to 16 tokens, each with 1 summary, or with 4 × 2, of 1 to 4 tokens
    assert 3 * 8 * (1 + 1) <= grpo["evaluations"][-1]["tokens"] <= 3 * 8 * (16 + 4)
    assert 2 * 8 * (1 + 8 * 1) <= uniform["evaluations"][-1]["tokens"] <= 2 * 8 * (16 + 8 * 4)
    assert {(v["num_budgets"], v["prior"]) for v in measured["variance"]} == {
        (m, prior) for m in (4, 8) for prior in ("uniform", "linear", "base")
    }
    assert set(measured["gradient"]["uniform"]["noise"]) == {
        *("none", "v1", "v2", "brpo", "v2_others", "brpo_others", "adaptive"),
        *("summaries", "last_summary"),
    }
    sampled, *by_likelihood = measured["likelihood"]["uniform"]
    assert (sampled["reward"], sampled["num_budgets"]) == ("sampled", 4)
    assert [(row["reward"], row["num_budgets"]) for row in by_likelihood] == [("likelihood", 4), ("likelihood", 8)]
    for row in (sampled, *by_likelihood):
        assert set(row["noise"]) == set(row["signal"]) == set(NOISE_PARTS)
    # The same traces: at 8 cuts 4 more branches of one or two bridge tokens and an answer of two
    assert 4 * 3 <= by_likelihood[1]["tokens"] - by_likelihood[0]["tokens"] <= 4 * 4
    # 16 summaries of 1 to 4 tokens in place of 4 answers of two: the same bridges four times
    assert sampled["tokens"] > by_likelihood[0]["tokens"] + 4


@pytest.mark.slow
def test_the_page_is_filled(finished, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    for study in ("main", "variants"):
        (results / f"{study}.jsonl").write_text(finished.read_text())
    page = tmp_path / "page.md"
    cell = (
        "curves",
        "differences",
        "reach",
        "arms",
        "decayed",
        "objective",
        "objective curves",
        "variants",
        "variants curves",
        "pooled",
        "variance",
        "variance 8 budgets",
        "correlation",
        "goals",
    )
    names = ["tuning", "adaptive", "gradient", "noise", "variance goal", *(f"{name} pointers/llama" for name in cell)]
    page.write_text("\n".join(f"Before.\n<!-- table: {name} -->\nold\n<!-- end -->\nAfter." for name in names))
    analysis.write_page(results, page)
    text = page.read_text()
    assert "old" not in text and text.count("Before.\n") == text.count("\nAfter.") == len(names)
    assert "| GRPO | 1 | 0.000 |" in text  # two updates of a random model: one seed, nothing right
    assert (tmp_path / "images" / "learning_pointers_llama.png").exists()
    page.write_text("<!-- table: no such --><!-- end -->")
    with pytest.raises(ValueError, match="'no such'"):
        analysis.write_page(results, page)


@pytest.mark.slow
def test_lost_models_are_made_again(tmp_path):
    study = Study(**MINIATURE)
    warm, grpo, uniform, measure = study.jobs()
    done = {warm, grpo, uniform}
    assert measure.requires == warm
    assert run.jobs_to_do(study, done, tmp_path) == [warm, measure]
    assert run.jobs_to_do(study, {warm}, tmp_path) == [warm, grpo, uniform, measure]
    (tmp_path / warm.name).mkdir()
    assert run.jobs_to_do(study, done, tmp_path) == [measure]


@pytest.mark.slow
def test_finished_jobs_are_not_done_again(finished, monkeypatch):
    monkeypatch.setattr(run, "run_job", None)
    assert run.run_study(Study(**MINIATURE), finished, num_workers=1) == []
