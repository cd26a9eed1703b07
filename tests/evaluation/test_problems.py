"""Problems from benchmarks, the Hub and files, and what is said when there are none."""

import re

import pytest
from datasets import Dataset

from tests.support import DATA
from trl_anytime.data.problems import BENCHMARKS
from trl_anytime.evaluation.problems import load_problems
from trl_anytime.rewards import grade_answers

ROWS = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "a half?", "answer": "0.5"}]


def write(path, rows=ROWS):
    {".jsonl": Dataset.to_json, ".csv": Dataset.to_csv, ".parquet": Dataset.to_parquet, ".json": Dataset.to_json}[
        path.suffix
    ](Dataset.from_list(rows), str(path))
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_files(tmp_path, suffix):
    problems = load_problems(write(tmp_path / f"mine.{suffix}"))
    assert problems.name == "mine"
    assert problems.questions == ["1 + 1?", "a half?"]
    assert [float(answer) for answer in problems.answers] == [2, 0.5]


def test_names_columns_and_limits(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"q": "1?", "truth": 1}, {"q": "2?", "truth": 2}])
    problems = load_problems(f"ones={path}", "q", "truth", limit=1)
    assert (problems.name, problems.questions, problems.answers) == ("ones", ["1?"], [1])
    assert problems.fingerprint != load_problems(path, "q", "truth").fingerprint


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("aime42", r"'aime42'.*\baime24\b.*\baime24, aime25, amc"),  # near names first, then all
        ("math-5000", r"\bmath500\b.*\bmath500\b"),
        ("nothing_like_it", "'nothing_like_it'.*aime24, aime25, amc"),
        ("missing/mine.jsonl", "missing/mine.jsonl"),
    ],
)
def test_what_there_is_not(source, message):
    with pytest.raises(ValueError, match=message):
        load_problems(source)


def test_a_file_with_a_near_name(tmp_path):
    write(tmp_path / "problems.jsonl")
    with pytest.raises(ValueError, match="problem.jsonl.*problems.jsonl"):
        load_problems(str(tmp_path / "problem.jsonl"))


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ROWS, {"answer_column": "answers"}, r"'answers'.*\banswer\b.*`answer_column`"),
        ([{"text": "?", "answer": "1"}], {}, "'problem'.*'question'.*'prompt'.*'text', 'answer'"),
        ([*ROWS, {"problem": "?", "answer": None}], {}, "[Rr]ow 2.*'answer'.*None.*`on_bad_gold`"),
        ([*ROWS, {"problem": "", "answer": "1"}], {}, "[Rr]ow 2.*'problem'.*''"),
    ],
)  # fmt: skip
def test_bad_rows_and_columns(tmp_path, rows, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_problems(write(tmp_path / "mine.jsonl", rows), **arguments)


def test_bad_answers_can_be_left_out(tmp_path, caplog):
    path = write(tmp_path / "mine.jsonl", [*ROWS, {"problem": "?", "answer": None}])
    assert len(load_problems(path, on_bad_gold="skip").questions) == 2
    assert re.search(r"\b1 of 3\b.*mine.jsonl", caplog.text)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "1?", "answ')
    with pytest.raises(ValueError, match="mine.jsonl"):
        load_problems(str(path))


def test_benchmarks_are_named_as_on_the_hub():
    assert BENCHMARKS["amc"].hub_id == "AI-MO/aimo-validation-amc" and BENCHMARKS["amc"].num_problems == 83
    assert BENCHMARKS["math500"].hub_id == "HuggingFaceH4/MATH-500" and BENCHMARKS["math500"].split == "test"


def test_the_answers_of_a_set_are_right():
    path = DATA / "problems.jsonl"
    problems = load_problems(f"sample={path}", on_bad_gold="skip")
    assert (problems.name, len(problems.questions)) == ("sample", 24)
    assert grade_answers(problems.answers, problems.answers) == [1.0] * 24
