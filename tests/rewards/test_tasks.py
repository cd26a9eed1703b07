"""Tasks of reasoning-gym: every one is loaded and scored or refused for its reason, and scorers cannot do harm."""

import itertools
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tests.support.tiny import make_tokenizer
from trl_anytime.data.problems import read_rows, split_name
from trl_anytime.data.tasks import AnswerLengths, check_lengths
from trl_anytime.evaluation.problems import load_problems
from trl_anytime.rewards import TaskReward
from trl_anytime.rewards.tasks.boxes import read_box, write_box
from trl_anytime.rewards.tasks.library import open_task, score_readings
from trl_anytime.rewards.tasks.plain import EXECUTING, is_plain
from trl_anytime.rewards.tasks.source import REFUSED, TaskSource, entry_id, split_entry_id
from trl_anytime.rewards.verifier.pool import python_module

CHAIN_SUM = "reasoning_gym:chain_sum?min_terms=3&max_terms=4&size=6&seed=1"


def graded(rows, answers, **settings):
    """Rewards, and the counters that are not 0."""
    counts = {}
    rewards = TaskReward(**settings)(
        [""] * len(answers),
        [rf"\boxed{{{answer}}}" for answer in answers],
        well_formed=[True] * len(answers),
        entry=[row["entry"] for row in rows],
        log_metric=counts.__setitem__,
    )
    return rewards, {name.rpartition("/")[2]: int(count) for name, count in counts.items() if count}


def output_of(module: str) -> str:
    command, environment = python_module(module)
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


# Without the library


@pytest.mark.parametrize(
    ("text", "source", "written"),
    [
        ("reasoning_gym:chain_sum", TaskSource("chain_sum"), "reasoning_gym:chain_sum?size=500&seed=0"),
        (
            "reasoning_gym:chain_sum?min_terms=3&seed=2&size=7",
            TaskSource("chain_sum", {"min_terms": "3"}, 7, 2),
            "reasoning_gym:chain_sum?min_terms=3&size=7&seed=2",
        ),
        (
            "reasoning_gym:a?b=['%26','+']",
            TaskSource("a", {"b": "['&','+']"}),
            "reasoning_gym:a?b=['%26','+']&size=500&seed=0",
        ),
    ],
)
def test_sources(text, source, written):
    assert TaskSource.parse(text) == source
    assert str(source) == written and TaskSource.parse(written) == source
    assert split_entry_id(entry_id(source, 12, "0" * 12)) == (written, 12, "0" * 12)


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        ("", "names no task"),
        ("a?b", "'b'"),
        ("a?b=1&b=2", "twice"),
        ("a?size=0", "`size`"),
        ("a?size=1000001", "`size`"),
        ("a?size=1.5", "`size`"),
        ("a?seed=-1", "`seed`"),
        ("a?seed=4294", "`seed`"),
    ],
)
def test_sources_that_are_none(behind, named):
    with pytest.raises(ValueError, match=named):
        TaskSource.parse(f"reasoning_gym:{behind}")


def test_seeds_share_no_seed_of_the_library():
    """Problem i is made from the library's seed plus i."""
    ends = [(TaskSource("a", size=1_000_000, seed=s).library_seed, 1_000_000) for s in range(4)]
    for (first, size), (second, _) in itertools.pairwise(ends):
        assert first + size <= second
    assert TaskSource("a", seed=4293).library_seed + 1_000_000 <= 2**32


@pytest.mark.parametrize("value", [None, 3, "", "7", "owner/set#0:000000000000", "reasoning_gym:a#1"])
def test_what_is_not_an_entry(value):
    assert split_entry_id(value) is None
    with pytest.raises(ValueError, match="Row 0: column 'entry'"):
        TaskReward()([""], [r"\boxed{1}"], well_formed=[True], entry=[value])


@pytest.mark.parametrize(
    "answer",
    ["7", "Wednesday", "1 0\n0 1", r"$\dfrac{1}{2}$", '{"a": [1, 2]}', "_ Q _", "a}b", "}{", "#A B#", r"a\\b", "50%"],
)
def test_answers_come_back_from_their_box(answer):
    assert answer in read_box(f"The answer is {write_box(answer)}.")


@pytest.mark.parametrize("answer", ["", " ", "1\n\n2", "1\n \n2"])
def test_answers_that_no_box_holds(answer):
    with pytest.raises(ValueError, match="box"):
        write_box(answer)


def test_boxes_are_read_as_they_stand_and_without_latex():
    assert read_box(r"\boxed{\text{Wednesday}}") == [r"\text{Wednesday}", "Wednesday"]
    assert read_box(r"\boxed{50\%}") == [r"50\%", "50%"]
    assert read_box(r"\boxed{1} \boxed{ 2 }") == ["2"]
    assert read_box(r"\boxed{\text{a}\text{b}}") == [r"\text{a}\text{b}"]
    assert read_box(r"\boxed{1") == read_box("1") == read_box(None) == []


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        *(
            (text, True)
            for text in ("1 0\n0 1", "_ _ Q", "ABCD", "[[1, 0], [0, -1]]", "['A', 'B']", "40*(94 - 90) + 83")
        ),
        *((text, True) for text in ("x*asin(3*x) + sqrt(1 - 9*x**2)/3 + C", "-x**9/2 + exp(x)", "2*y^2", "[_, Q]")),
        *((text, False) for text in ("open('a')", "__import__('os')", "oracle_answer", "[entry]", "answer", "x.args")),
        *(
            (text, False)
            for text in ("sin('__import__(1)')", "exec(1)", "integrate(x)", "(lambda: 1)()", "[c for c in y]")
        ),
        *((text, False) for text in ("open(1)!", "f'{x}'", "x = open(1)", "abs(x, key=x)", "a if b else c", "x[0]")),
    ],
)
def test_what_is_executed(answer, plain):
    assert is_plain(answer) == plain


@pytest.mark.parametrize(
    ("source", "name", "where"),
    [
        (CHAIN_SUM, "", CHAIN_SUM),
        (f"sums={CHAIN_SUM}", "sums", CHAIN_SUM),
        ("sums = a.jsonl", "sums ", "a.jsonl"),
        ("a.jsonl", "", "a.jsonl"),
    ],
)
def test_names_of_sources(source, name, where):
    assert split_name(source) == (name, where)


def test_room_for_answers():
    tokenizer = make_tokenizer(extra_words=(r"\boxed{1}",))
    tokens = len(tokenizer(r"\boxed{1 2 3}", add_special_tokens=False)["input_ids"])
    assert tokens == 3
    answers = ["1 2 3"] + ["1"] * 9
    assert AnswerLengths.measure(answers, tokenizer, 2) == AnswerLengths(10, 1, 3)
    with pytest.warns(UserWarning, match="1 of 10"):  # a tenth is the most
        check_lengths("a", answers, tokenizer, 2)
    with pytest.raises(ValueError, match=r"2 of 10.*`max_summary_length`"):
        check_lengths("a", [*answers[:9], "1 2 3"], tokenizer, 2)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("trl_anytime.rewards.tasks.source.version", missing)
    for use in (lambda: read_rows(CHAIN_SUM), lambda: TaskReward().check_dataset(Dataset.from_list([{"entry": "a"}]))):
        with pytest.raises(ValueError, match=r"trl-anytime\[tasks\]"):
            use()


def missing(name):
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


# With the library


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("reasoning_gym", reason="the extra `tasks`")


@pytest.fixture(scope="module")
def rows(library):
    return read_rows(CHAIN_SUM).rows.to_list()


@pytest.mark.slow
def test_every_task(library):
    """Two problems of each: its own answers, written in boxes, score 1 in other processes than made them."""
    problems = json.loads(output_of("tests.support.every_task"))
    assert problems.keys() | REFUSED.keys() == library.factory.DATASETS.keys()
    made = [row for of_task in problems.values() for row in of_task]
    boxes = [write_box(row["answer"]) for row in made]
    counts = {}
    rewards = TaskReward()(
        [""] * len(made),
        boxes,
        well_formed=[True] * len(made),
        entry=[row["entry"] for row in made],
        log_metric=counts.__setitem__,
    )
    assert {row["entry"] for row, reward in zip(made, rewards, strict=True) if reward != 1.0} == set()
    assert {name for name, count in counts.items() if count} == {"rewards/TaskReward/graded"}


def test_refused_tasks_have_their_reason(library):
    def score(task, answer, index=0):
        dataset = library.create_dataset(task, size=20, seed=0)
        return dataset.score_answer(answer, dataset[index])

    reasons = {
        "boxnet": library.create_dataset("boxnet", size=1, seed=0)[0]["answer"] is None,
        "coin_flip": any(score("coin_flip", "0", index) == 1 for index in range(3)),
        "complex_arithmetic": score("complex_arithmetic", "nan") == 1,
        "composite": True,  # its configuration is a list of tasks
        "futoshiki": any(
            not line.strip() for line in library.create_dataset("futoshiki", seed=0)[0]["answer"].split("\n")
        ),
        "game_of_life_halting": score("game_of_life_halting", "anything") == 1,
        "puzzle24": all(score("puzzle24", "6*4*1*1", index) == 1 for index in range(3)),
        "rush_hour": library.create_dataset("rush_hour", size=1, seed=0)[0]["answer"] is None,
    }
    assert reasons == dict.fromkeys(REFUSED, True)
    for task in REFUSED:
        with pytest.raises(ValueError, match=task):
            open_task(TaskSource(task))


@pytest.mark.slow
def test_the_tasks_that_execute_answers_are_known(library):
    assert {*output_of("tests.support.executing").split()} == EXECUTING


def test_answers_are_not_executed(library, tmp_path):
    """Nor may one look at the scorer's own variables."""
    row = read_rows("reasoning_gym:string_insertion?size=1").rows[0]
    target = tmp_path / "executed"
    answers = [f"open('{target}', 'w').close()", "[oracle_answer]", row["answer"]]
    rewards, counts = graded([row] * 3, answers)
    assert (rewards, counts) == ([0.0, 0.0, 1.0], {"graded": 3, "unsafe_answers": 2})
    assert not target.exists()


def test_problems_are_the_same_in_every_process(rows):
    assert read_rows(CHAIN_SUM).rows.to_list() == rows
    assert [row["entry"].rpartition("#")[2].partition(":")[0] for row in rows] == [*"012345"]
    other = read_rows(CHAIN_SUM.replace("seed=1", "seed=2")).rows.to_list()
    assert not {row["question"] for row in rows} & {row["question"] for row in other}


def test_they_survive_a_file(rows, tmp_path):
    Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    back = read_rows(str(tmp_path / "a.parquet")).rows.to_list()
    assert back == rows
    assert graded(back, [row["answer"] for row in back])[0] == [1.0] * 6


def test_scores(rows):
    """Right, LaTeX around it, wrong, and without a box; parts of 1 for an answer that holds the right one."""
    reward = TaskReward()
    answer = rows[0]["answer"]
    texts = [write_box(answer), rf"\boxed{{\text{{{answer}}}}}", rf"\boxed{{{answer}{'0' * len(answer)}}}", answer]
    found = reward([""] * 4, texts, well_formed=[True] * 4, entry=[rows[0]["entry"]] * 4)
    assert found == [1.0, 1.0, 0.5, 0.0]
    assert reward([""], texts[:1], well_formed=[False], entry=[rows[0]["entry"]]) == [0.0]
    assert pickle.loads(pickle.dumps(reward)) == reward


def test_word_answers_of_a_scorer_that_fails(library):
    row = read_rows("reasoning_gym:prime_factorization?size=1").rows[0]
    with pytest.warns(UserWarning, match=r"1 of 2 answers \(50.0%\)"):
        rewards, counts = graded([row] * 2, [row["answer"], "two"], cpu_limit=1.9)  # warned once for each settings
    assert (rewards, counts) == ([1.0, 0.0], {"graded": 2, "scorer_errors": 1})


@pytest.mark.slow
def test_time_is_counted(library):
    """Also where the scorer swallows every exception."""
    rows = [read_rows(f"reasoning_gym:{task}?size=1").rows[0] for task in ("countdown", "simple_integration")]
    with pytest.warns(UserWarning, match="limits on time or memory"):
        rewards, counts = graded(rows, ["9**9**9**9"] * 2, cpu_limit=0.5)
    assert (rewards, counts) == ([0.0, 0.0], {"graded": 2, "timeouts": 2})


@pytest.mark.parametrize(
    ("returned", "by"),
    [
        (float("nan"), "bad_scores"),
        (1.5, "bad_scores"),
        (-0.1, "bad_scores"),
        (None, "bad_scores"),
        ("1", "bad_scores"),
    ],
)
def test_scores_that_are_none(returned, by):
    assert score_readings("chain_sum", lambda text, entry: returned, {}, ["a"])["by"] == by
    # The other reading counts if it has a score
    scores = iter([returned, 0.25])
    assert score_readings("chain_sum", lambda text, entry: next(scores), {}, ["a", "b"]) == 0.25


def test_another_problem_than_the_one_that_was_made(rows):
    changed = rows[0]["entry"][:-12] + "0" * 12
    beyond = rows[0]["entry"].replace("#0:", "#6:")
    for entry in (changed, beyond):
        with pytest.raises(ValueError, match="another problem"):
            graded([{"entry": entry}], ["1"])


@pytest.mark.parametrize(
    ("behind", "named"),
    [
        ("chain_sums", "Did you mean chain_sum"),
        ("chain_sum?min_term=3", "Did you mean min_terms"),
        ("chain_sum?min_terms=9&max_terms=3", "max_terms must be >= min_terms"),
        ("chain_sum?min_terms=three", "`min_terms`"),
        ("chain_sum?min_terms=true", "`min_terms`"),
        ("time_intervals?min_time=3", "`min_time`"),
        ("word_ladder?size=100000", "too large"),
    ],
)
def test_settings_that_are_refused(library, behind, named):
    with pytest.raises(ValueError, match=named) as refused:
        open_task(f"reasoning_gym:{behind}")
    assert "\n" not in str(refused.value)


def test_a_configuration_or_split_is_refused():
    for words in ({"config": "main"}, {"split": "test"}):
        with pytest.raises(ValueError, match="has no"):
            read_rows(CHAIN_SUM, **words)


def test_problems_of_an_evaluation(rows):
    problems = load_problems(f"sums={CHAIN_SUM}", limit=2)
    assert (problems.name, problems.questions) == ("sums", [row["question"] for row in rows[:2]])
    assert problems.entries == [row["entry"] for row in rows[:2]]
    assert problems.answers == [row["answer"] for row in rows[:2]]


def test_importing_the_reward_does_not_import_the_library():
    code = "import sys, trl_anytime.rewards; print('reasoning_gym' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert run.stdout.strip() == "False"
