"""Files that are broken, huge, deep, of another kind or of other types: one line that names file and field."""

import copy
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.anytime import make_anytime_config
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import AnytimeConfig, Sampling
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.evaluation.frontier import Frontier
from trl_anytime.evaluation.journal import Journal
from trl_anytime.evaluation.problems import load_problems
from trl_anytime.evaluation.protocol import Protocol
from trl_anytime.evaluation.results import load_results, results_of
from trl_anytime.inference.anytime_config import generation_eos_token_ids
from trl_anytime.outside.validation import Unfit

INFINITY, NAN = float("inf"), float("nan")
NUMBERS = ["1", True, None, [], {}, INFINITY, -INFINITY, NAN, 10**400]
BUDGETS = [3, 7, 11, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with its config and a problem."""
    folder = tmp_path_factory.mktemp("model")
    make_tokenizer().save_pretrained(folder)
    make_model().save_pretrained(folder)
    make_anytime_config().save_pretrained(folder)
    (folder / "problems.jsonl").write_text('{"problem": "1 2", "answer": "3"}\n')
    return folder


@pytest.fixture
def model(folder, tmp_path):
    """The same in a folder of its own, without the weights, which are never reached."""
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def refused(arguments, capsys, *names):
    """The command ends with a line that has these names in it."""
    code = main([str(argument) for argument in arguments])
    said = capsys.readouterr().err.strip()
    assert code == BAD_INPUT, said
    (line,) = (line for line in said.splitlines() if line.startswith("trl-anytime: "))
    assert said.endswith(line)  # and nothing behind it, such as a traceback
    assert all(name in line for name in names), line
    assert len(line) < 2000


def put(values, path, value):
    """A copy of nested values in which one is another; `...` removes it."""
    values = copy.deepcopy(values)
    place = values
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return values


def name_of(path):
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


# Kinds of files


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def huge(path):
    with path.open("wb") as file:
        file.truncate(2**42)  # without a byte on the disk


KINDS = {
    "a folder": Path.mkdir,
    "a pipe": fifo,
    "a device": device,
    "huge": huge,
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(b"\x80\xff\x00" * 100),
    "UTF-16": lambda path: path.write_bytes('{"format": 1}'.encode("utf-16")),
    "cut": lambda path: path.write_text('{"format": 1, "mark'),
    "two": lambda path: path.write_text("{}{}"),
    "deep lists": lambda path: path.write_text("[" * 200_000 + "]" * 200_000),
    "deep objects": lambda path: path.write_text('{"a":' * 200_000 + "1" + "}" * 200_000),
    "a list": lambda path: path.write_text("[1]"),
    "a text": lambda path: path.write_text('"x"'),
    "null": lambda path: path.write_text("null"),
    "nothing in it": lambda path: path.write_text("{}"),
    "digits": lambda path: path.write_text('{"format": ' + "9" * 10_000 + "}"),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def write(request):
    """Writes something that is not the file wanted."""

    def write(path):
        path.unlink(missing_ok=True)
        request.param(path)

    return write


def test_anytime_configs(model, write, capsys):
    write(model / "anytime_config.json")
    refused(["serve-command", model], capsys, "anytime_config.json")


def test_generation_configs(model, write):
    path = model / "generation_config.json"
    write(path)
    if path.is_file() and path.stat().st_size == len("{}"):
        assert generation_eos_token_ids(str(model)) == []
    else:
        with pytest.raises(ValueError, match="generation_config.json"):
            generation_eos_token_ids(str(model))


def test_results(tmp_path, write, capsys):
    write(tmp_path / "results.json")
    if (tmp_path / "results.json").is_dir():
        refused(["plot", tmp_path / "results.json"], capsys, "results.json")  # where a trainer_state.json would be
        return
    refused(["plot", tmp_path / "results.json", "--output", tmp_path / "x.png"], capsys, "results.json")
    with pytest.raises(ValueError, match="results.json"):
        load_results(tmp_path / "results.json")


def test_training_logs(tmp_path, write, capsys):
    write(tmp_path / "trainer_state.json")
    refused(["plot", tmp_path, "--output", tmp_path / "x.png"], capsys, "trainer_state.json")


def test_journals(tmp_path, write):
    path = tmp_path / "samples.jsonl"
    write(path)
    if path.is_file() and path.stat().st_size < 2**40:
        path.write_bytes(path.read_bytes() + b"\n")  # else it would be part of a line, which a crash may leave
    with pytest.raises(ValueError, match="samples.jsonl"):
        Journal(path, PROTOCOL)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_problems(tmp_path, write, suffix):
    path = tmp_path / f"problems.{suffix}"
    write(path)
    with pytest.raises(ValueError, match=f"problems.{suffix}") as raised:
        load_problems(str(path))
    assert len(str(raised.value).splitlines()) == 1


def test_recipes_and_launch_files(tmp_path, write, capsys):
    write(tmp_path / "recipe.yaml")
    refused(["doctor", tmp_path / "recipe.yaml"], capsys, "recipe.yaml")
    (tmp_path / "good.yaml").write_text("{model_name_or_path: x, dataset_name: y}")
    refused(["doctor", "--accelerate-config", tmp_path / "recipe.yaml", tmp_path / "good.yaml"], capsys, "recipe.yaml")


@pytest.mark.parametrize("kind", ["a pipe", "a device", "huge", "empty", "binary", "cut", "deep lists"])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_what_transformers_reads(model, name, kind, capsys):
    (model / name).unlink()
    KINDS[kind](model / name)
    refused(["generate", model, "1", "--device", "cpu"], capsys, str(model))


# Fields of a config

with TemporaryDirectory() as temporary:
    CONFIG = json.loads(make_anytime_config().save_pretrained(temporary).read_text())
TEXTS = [3, None, [], {}, "", "\ud800", "x" * 20_000]
IDS = [None, "5", [], {}, [None], ["5"], [5.0], [True], [-1], [2**40], [[5]], [INFINITY]]
FIELDS = {
    ("format",): [*NUMBERS, 1.0, 0, -1, 2],
    ("markers",): [None, [], "x", ...],
    ("markers", "think_end"): [None, "</think>", ...],
    **{("markers", name, "text"): TEXTS for name in ("think_end", "truncation_bridge", "answer_bridge")},
    **{("markers", name, "ids"): IDS for name in ("think_end", "truncation_bridge", "answer_bridge")},
    ("markers", "think_end", "in_text"): ["true", None, 1, [], {}],
    ("budgets",): [*IDS, [0], [3, 3], [7, 3], ...],
    ("prior",): [
        *NUMBERS,
        "uniform",
        [-1, 1, 1, 1],
        [0, 0, 0, 0],
        [1],
        [INFINITY] * 4,
        [NAN] * 4,
        [True] * 4,
        ["1"] * 4,
    ],
    ("max_summary_length",): [*NUMBERS, 0, -1, 1.5, 2**40, ...],
    ("sampling",): [None, [], "x", ..., {}],
    ("sampling", "temperature"): [*NUMBERS, -1, 1e9, ...],
    ("sampling", "top_p"): [*NUMBERS, 0, -1, 2],
    ("sampling", "top_k"): [*NUMBERS, -2, 1.5],
    ("sampling", "min_p"): [*NUMBERS, -1, 2],
    ("sampling", "repetition_penalty"): [*NUMBERS, 0, -1],
    ("sampling", "further"): [1],
    ("eos_token_ids",): [*IDS, ...],
    ("chat_template_kwargs",): [None, [], "x", ...],
    ("chat_template_kwargs", "tokenize"): [True],
    ("chat_template_kwargs", "add_generation_prompt"): [False],
    ("chat_template_kwargs", "return_tensors"): ["pt"],
    ("chat_template_kwargs", "x"): ["\ud800", json.loads("[" * 500 + "]" * 500)],
    ("versions",): [None, [], {"trl": 1}, ...],
}


@pytest.mark.parametrize("path", FIELDS, ids=name_of)
def test_fields_of_an_anytime_config(path, tmp_path):
    for value in FIELDS[path]:
        (tmp_path / "anytime_config.json").write_text(json.dumps(put(CONFIG, path, value)))
        with pytest.raises(Unfit, match="anytime_config.json") as raised:
            AnytimeConfig.from_pretrained(tmp_path)
        assert path[0] in str(raised.value) and len(str(raised.value).splitlines()) == 1
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", "1"), ("temperature", INFINITY), ("temperature", True), ("top_p", NAN), ("top_k", 1.5)],
)
def test_sampling_from_python(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Sampling(**{name: value})


@pytest.mark.parametrize("value", [*(v for v in NUMBERS if v is not None and v != []), -1, ["2"], [-1], 2.0], ids=repr)
def test_eos_tokens_of_a_model(model, value, capsys):
    (model / "anytime_config.json").unlink()
    (model / "generation_config.json").unlink()
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    refused(["serve-command", model], capsys, "generation_config.json", "eos_token_id")


# Fields of results and journals


def estimate(mean):
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}


PROTOCOL = Protocol("m", make_anytime_config(), {"a": ("0123", 2)}, "", 1, 2, "r", 0)


def sample(question):
    cut = {
        "budgets": BUDGETS,
        "thinking_tokens": 2,
        "bridge_tokens": 1,
        "answer_tokens": [1, 1],
        "answers": ["3", "4"],
        "well_formed": [True, True],
        "rewards": [1.0, 0.0],
    }
    whole = {"dataset": "a", "question": question, "sample": 0, "thinking": "1 2", "thinking_tokens": 2}
    return {**whole, "prompt_tokens": 3, "finished": True, "seconds": 0.5, "cuts": [cut]}


RESULTS = results_of(PROTOCOL, [sample(0), sample(1)], frontiers={"a": Frontier([3, 12], [0.1, 0.9])})
RESULT_FIELDS = {
    ("format",): [*NUMBERS, 0, 2, 1.0, ...],
    ("protocol",): [None, [], "x", {}, ...],
    ("protocol", "model"): [None, 3, [], ..., "\ud800"],
    ("protocol", "budgets"): [*IDS, [3], ...],
    ("protocol", "problems"): [None, [], {}, {"a": 3}, {"a": ["0123"]}, {"a": ["0123", 3]}, {"b": ["0123", 2]}],
    ("protocol", "instruction"): ["\ud800", json.loads("[" * 500 + "]" * 500)],
    ("curves",): [None, [], {}, "x", ..., {"a": None}, {str(i): RESULTS["curves"]["a"] for i in range(100)}],
    ("curves", "a", "accuracy"): [None, {}, [], [estimate(0.5)], ...],
    ("curves", "a", "accuracy", 0): [None, 0.5, [], {}],
    ("curves", "a", "accuracy", 0, "mean"): [*NUMBERS, 1e300, ...],
    ("curves", "a", "anytime_average"): [None, 0.5, ...],
    ("frontier",): [None, [], {"a": None}, {"a": []}, {"a": [[3]]}, {"a": [[3, "1"]]}, {"a": [[3, NAN]]}],
    ("right_at",): NUMBERS,
    ("questions",): [None, [], {}, ..., {"b": [[1.0] * 4] * 2}],
    ("questions", "a"): [None, {}, [], [[1.0] * 4], [[1.0] * 3] * 2],
    ("questions", "a", 0): [None, 1.0, [], [1.0], ["1"] * 4],
    ("questions", "a", 0, 0): [*NUMBERS, 1e300],
}


@pytest.mark.parametrize("path", RESULT_FIELDS, ids=name_of)
def test_fields_of_results(path, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(RESULTS))
    assert load_results(file) == RESULTS
    for value in RESULT_FIELDS[path]:
        file.write_text(json.dumps(put(RESULTS, path, value)))
        with pytest.raises(Unfit, match="results.json") as raised:
            load_results(file)
        assert any(f"`{name}" in str(raised.value) for name in RESULTS) or "format" in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1 and len(str(raised.value)) < 1000


COUNTS = [*NUMBERS, -1, 1.5]
SAMPLE_FIELDS = {
    ("dataset",): [None, 3, "b", ...],
    ("question",): [*COUNTS, 2, ...],
    ("sample",): [*COUNTS, 1, ...],
    ("thinking",): [None, 3, "\ud800", ...],
    ("thinking_tokens",): [*COUNTS, ...],
    ("prompt_tokens",): [*COUNTS, ...],
    ("finished",): [None, 0, "true", ...],
    ("seconds",): [*NUMBERS, -1, ...],
    ("cuts",): [None, {}, [], "x", ...],
    ("cuts", 0): [None, [], {}],
    ("cuts", 0, "budgets"): [*IDS, [3], [3, 3, 7, 11, 12], ...],
    ("cuts", 0, "thinking_tokens"): [*COUNTS, ...],
    ("cuts", 0, "bridge_tokens"): [*COUNTS, ...],
    ("cuts", 0, "answer_tokens"): [None, [], [1], [1, 1, 1], ["1", "1"], ...],
    ("cuts", 0, "answers"): [None, [], ["x"], [3, 4], ...],
    ("cuts", 0, "well_formed"): [None, [], [True], [0, 1], ...],
    ("cuts", 0, "rewards"): [None, [], [1.0], ["1", "1"], [NAN, 1.0], [INFINITY, 1.0], [None, None], ...],
}


@pytest.mark.parametrize("path", SAMPLE_FIELDS, ids=name_of)
def test_fields_of_a_journal(path, tmp_path):
    file = tmp_path / "samples.jsonl"
    header = json.dumps({"protocol": PROTOCOL.as_dict()})
    file.write_text(f"{header}\n{json.dumps(sample(0))}\n")
    journal = Journal(file, PROTOCOL)
    journal.close()
    assert journal.records == [sample(0)]
    for value in SAMPLE_FIELDS[path]:
        file.write_text(f"{header}\n{json.dumps(put(sample(0), path, value))}\n")
        with pytest.raises(Unfit, match="samples.jsonl, line 2") as raised:
            Journal(file, PROTOCOL)
        assert path[0] in str(raised.value) and len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", [None, [], "x", 3, {"model": json.loads("[" * 500 + "]" * 500)}, ...], ids=str)
def test_a_journal_of_a_strange_protocol(protocol, tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({} if protocol is ... else {"protocol": protocol})[:100_000] + "\n")
    with pytest.raises(Unfit, match="line 1"):
        Journal(file, PROTOCOL)


# Training logs

LOG = {"step": 1, "anytime/reward@4": 0.5, "eval_anytime/reward@8": 0.5, "thinking/mean_length": 3.0, "loss": 1.0}


@pytest.mark.parametrize("name", [name for name in LOG if name != "loss"])
def test_fields_of_a_training_log(name, tmp_path, capsys):
    file = tmp_path / "trainer_state.json"
    values = [
        "1",
        True,
        [],
        {},
        INFINITY,
        -INFINITY,
        10**400,
        *([None, NAN, -1, 1.5, ...] if name == "step" else [1e300]),
    ]
    for value in values:
        file.write_text(json.dumps({"log_history": [LOG, put(LOG, (name,), value)]}))
        refused(["plot", tmp_path, "--output", tmp_path / "x.png"], capsys, "trainer_state.json", name)
    assert not (tmp_path / "x.png").exists()


def test_what_is_not_drawn_may_be_anything(tmp_path):
    log = {**LOG, "loss": "x", "note": {"a": [None]}, "eval_anytime/reward@8": NAN, "anytime/reward@" + "9" * 900: 1.0}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [log], "further": 1}))
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 0


@pytest.mark.parametrize("history", [None, {}, "x", 3, [None], [3], ["x"], [[]], ...], ids=str)
def test_a_history_that_is_none(history, tmp_path, capsys):
    state = {} if history is ... else {"log_history": history}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    refused(["plot", tmp_path, "--output", tmp_path / "x.png"], capsys, "trainer_state.json", "log_history")


# Rows of problems


@pytest.mark.parametrize(
    "row",
    ["1", "null", "[]", "{}", '"x"', '{"problem": "\\ud800", "answer": "2"}', '{"problem": "x", "answer": 1e999}']
    + [f'{{"problem": "x", "answer": {"[" * depth}1{"]" * depth}}}' for depth in (40, 500, 100_000)]
    + [f'{{"problem": {value}, "answer": "2"}}' for value in ("null", "3", "[]", "{}", '""', '"  "', "true")],
    ids=lambda row: row[:40],
)
@pytest.mark.parametrize("before", ["", '{"problem": "1 2", "answer": "3"}\n'], ids=["alone", "second"])
def test_rows_of_problems(row, before, tmp_path):
    (tmp_path / "mine.jsonl").write_text(before + row + "\n")
    with pytest.raises(ValueError, match="mine.jsonl") as raised:
        load_problems(str(tmp_path / "mine.jsonl"))
    assert len(str(raised.value)) < 1000


def test_a_file_is_not_a_pattern(tmp_path):
    for name in ("[a].jsonl", "a*.jsonl", "ab.jsonl"):
        (tmp_path / name).write_text(json.dumps({"problem": name, "answer": "2"}) + "\n")
    assert load_problems(str(tmp_path / "[a].jsonl")).questions == ["[a].jsonl"]
    assert load_problems(str(tmp_path / "a*.jsonl")).questions == ["a*.jsonl"]


# Rewards that a journal could not be read with


def test_a_reward_that_is_no_number_is_an_error(folder, tmp_path, capsys):
    (tmp_path / "reward.py").write_text(
        "def nan(completions, **kwargs):\n    return [float('nan')] * len(completions)\n"
    )
    arguments = ["eval", folder, "--dataset", folder / "problems.jsonl", "--device", "cpu", "--output", tmp_path]
    refused([*arguments, "--reward", f"{tmp_path / 'reward.py'}:nan"], capsys, "nan")


def test_names_in_errors_are_escaped(tmp_path, capsys):
    name = "a\x1b[31m\nb.json"
    (tmp_path / name).write_text(json.dumps({"format": "\x1b[31m"}))
    assert main(["plot", str(tmp_path / name)]) == BAD_INPUT
    assert "\x1b" not in capsys.readouterr().err
