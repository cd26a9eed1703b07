"""The command `trl-anytime`, from a checkpoint to curves, on a model that answers in boxes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import DATA
from tests.support.pages import table
from tests.support.servers import TinyServer, serving
from tests.support.tiny import byte_tokenizer, make_model, make_tokenizer
from trl_anytime import AnytimeConfig, Sampling
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT, FAILED, SERVER_FAILED, parse_budgets
from trl_anytime.evaluation.evaluate import Evaluation
from trl_anytime.evaluation.problems import ProblemSet, load_problems
from trl_anytime.evaluation.results import accuracies, limited_answers, load_results, results_of
from trl_anytime.inference.generate import anytime_generate
from trl_anytime.rewards import MathReward
from trl_anytime.rollout.markers import ThinkingMarkers
from trl_anytime.rollout.types import SUMMARY_FACTS

BOXES = tuple(rf"\boxed{{{digit}}}" for digit in range(10))
BUDGETS = [2, 4, 8, 16, 32]
NUM_PROBLEMS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model whose words are digits and boxes, its config, and problems."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(extra_words=BOXES)
    tokenizer.save_pretrained(folder)
    # Little likely to end anything, so that traces have many lengths
    model = make_model(vocab_size=len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 3]] = -5.0 * model.lm_head.weight[2]
    model.save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (5,), "so </think>", (9, 5), "answer", (8,))
    AnytimeConfig(markers, [4, 8], [0.5, 0.5], 3, Sampling(), [2]).save_pretrained(folder)
    with (folder / "problems.jsonl").open("w") as file:
        for i in range(NUM_PROBLEMS):
            answers = [str(digit) for digit in range(i, i + 5)]  # any of them is right
            file.write(json.dumps({"problem": " ".join("0123456789"[: i + 1]), "answer": answers}) + "\n")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A finished evaluation."""
    assert run(folder, "finished") == 0
    return folder / "finished"


def arguments(folder, output="output", *more):
    given = {
        "--dataset": folder / "problems.jsonl",
        "--budgets": "2,4,8,16,32",
        "--samples": 4,
        "--instruction": "",
        "--device": "cpu",
        "--output": folder / output,
    }
    return ["eval", str(folder), *(str(word) for pair in given.items() for word in pair), *map(str, more)]


def run(folder, output="output", *more):
    return main(arguments(folder, output, *more))


def records_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()[1:]]


# Curves


def test_a_curve(folder, finished, capsys):
    results = load_results(finished / "results.json")
    curve = results["curves"]["problems"]
    rows = load_dataset("parquet", data_files=str(finished / "samples.parquet"), split="train")
    assert len(rows) == NUM_PROBLEMS * 4
    # The rewards, graded once more from the texts
    reward = MathReward(answer_bridge="answer")
    accuracy = np.zeros((NUM_PROBLEMS, len(BUDGETS)))
    for row in rows:
        for cut in row["cuts"]:
            scores = reward([""], cut["answers"], answer=[json.loads(row["gold"])], well_formed=cut["well_formed"])
            assert scores == cut["rewards"]
            for budget in cut["budgets"]:
                accuracy[row["question"], BUDGETS.index(budget)] += scores[0] / 4
    assert np.array(results["questions"]["problems"]) == pytest.approx(accuracy)
    assert [e["mean"] for e in curve["accuracy"]] == pytest.approx(accuracy.mean(axis=0).tolist())
    assert curve["anytime_average"]["mean"] == pytest.approx(accuracy.mean())
    assert 0 < accuracy.mean() < 1
    assert all(e["low"] <= e["mean"] <= e["high"] for e in curve["accuracy"])
    lengths = [row["thinking_tokens"] for row in rows]
    assert curve["thinking"]["mean_tokens"] == pytest.approx(np.mean(lengths))
    assert len(set(lengths)) > 3 and max(lengths) <= 32
    assert (finished / "curve.png").stat().st_size > 0

    assert run(folder, "finished") == 0  # all is there, so nothing is drawn
    printed = capsys.readouterr()
    lines = printed.out.partition("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == [
        *("budget", *map(str, BUDGETS)),
        *("anytime", "area", "index", "stable", "flipped", "thinking", "finished"),
    ]
    assert "%|" not in printed.err  # no progress bars in a pipe
    assert load_results(finished / "results.json") == results


def test_budgets_that_share_a_cut_share_its_summaries(finished):
    for record in records_of(finished):
        assert sum(len(cut["budgets"]) for cut in record["cuts"]) == len(BUDGETS)
        shorter = [budget for budget in BUDGETS if budget < record["thinking_tokens"]]
        assert len(record["cuts"]) <= len(shorter) + 2
        assert [cut["thinking_tokens"] for cut in record["cuts"][: len(shorter)]] == shorter


def test_it_is_what_anytime_generate_answers(folder):
    assert run(folder, "greedy", "--temperature", 0, "--samples", 1, "--batch-size", 4) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    problems = load_problems(str(folder / "problems.jsonl"))
    prompts = [[{"role": "user", "content": question}] for question in problems.questions]
    outputs = anytime_generate(model, tokenizer, prompts, BUDGETS, sampling=Sampling(temperature=0))
    for record, output in zip(records_of(folder / "greedy"), outputs, strict=True):
        answers = {budget: cut["answers"] for cut in record["cuts"] for budget in cut["budgets"]}
        assert answers == {answer.budget: answer.answers for answer in output.answers}


def test_the_cost_is_counted(finished):
    cost = load_results(finished / "results.json")["cost"]
    records = records_of(finished)
    thinking = sum(record["thinking_tokens"] for record in records)
    bridges = sum(3 if cut["bridge_tokens"] == 3 else 1 for record in records for cut in record["cuts"])
    answers = sum(sum(cut["answer_tokens"]) for record in records for cut in record["cuts"])
    assert cost["thinking_tokens"] == thinking and cost["answer_tokens"] == bridges + answers
    assert cost["tokens_at_last_budget_alone"] < cost["tokens"]


def test_several_data_sets_with_an_average(folder, capsys):
    more = ["--dataset", f"again={folder / 'problems.jsonl'}"]
    assert run(folder, "two", *more, "--samples", 1, "--limit", 3) == 0
    results = load_results(folder / "two" / "results.json")
    assert list(results["curves"]) == ["problems", "again", "average"]
    means = [[e["mean"] for e in curve["accuracy"]] for curve in results["curves"].values()]
    assert np.mean(means[:2], axis=0) == pytest.approx(means[2])
    assert "average" in capsys.readouterr().out


def test_a_reward_of_the_user(folder):
    (folder / "reward.py").write_text(
        "def boxes(completions, answer, well_formed, **kwargs):\n"
        "    return [float('boxed' in c[0]['content']) for c in completions]\n"
    )
    assert run(folder, "boxes", "--reward", f"{folder / 'reward.py'}:boxes", "--samples", 1) == 0
    results = load_results(folder / "boxes" / "results.json")
    assert results["protocol"]["reward"] == "boxes"
    expected = [["boxed" in cut["answers"][0] for cut in record["cuts"]] for record in records_of(folder / "boxes")]
    found = [[cut["rewards"][0] for cut in record["cuts"]] for record in records_of(folder / "boxes")]
    assert found == expected


def test_a_reward_of_the_user_sees_where_the_thinking_was_cut(folder):
    """As in training. Budgets that share a cut share its summaries, which are of the first of them."""
    (folder / "facts.py").write_text(
        "def facts(budget, cut, thinking_length, finished, thinking, **kwargs):\n"
        "    assert all(c == min(b, n) for b, c, n in zip(budget, cut, thinking_length, strict=True))\n"
        "    return [float(c) for c in cut]\n"
    )
    assert run(folder, "facts", "--reward", f"{folder / 'facts.py'}:facts", "--samples", 2) == 0
    cuts = [cut for record in records_of(folder / "facts") for cut in record["cuts"]]
    assert [cut["rewards"] for cut in cuts] == [[cut["thinking_tokens"]] * len(cut["answers"]) for cut in cuts]
    assert len({cut["thinking_tokens"] for cut in cuts}) > 1


def test_the_preset_of_the_paper(folder):
    """Its budgets are beyond the context of this model, which is said with the settings of the preset."""
    output = ["--dataset", str(folder / "problems.jsonl"), "--output", str(folder / "paper")]
    assert main(["eval", str(folder), "--preset", "paper", *output]) == BAD_INPUT
    assert main(["eval", str(folder), "--preset", "paper", "--budgets", "4,8", "--device", "cpu", *output]) == 0
    protocol = load_results(folder / "paper" / "results.json")["protocol"]
    assert (protocol["budgets"], protocol["sampling"]["temperature"]) == ([4, 8], 0.6)
    assert (protocol["max_summary_length"], protocol["num_samples"]) == (118, 1)
    assert protocol["instruction"] == r"Let's think step by step and output the final answer within \boxed{}."


def test_problems_with_formulas(tmp_path):
    """Through a byte-level tokenizer, with the bridges of the paper; two sets."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.save_pretrained(tmp_path)
    make_model(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(tmp_path)
    path = DATA / "problems.jsonl"
    sets = [f"--dataset={name}={path}" for name in ("one", "two")]
    sampling = ["--budgets=8,16", "--max-summary-length=8", "--limit=20", "--batch-size=20", "--device=cpu"]
    assert main(["eval", str(tmp_path), *sets, *sampling, f"--output={tmp_path}"]) == 0
    results = load_results(tmp_path / "results.json")
    assert [len(values) for values in results["questions"].values()] == [20, 20]
    assert results["protocol"]["markers"]["truncation_bridge"] == "...\n\n...\n\n</think>"


# Going on after a crash


@pytest.mark.parametrize("kept", [0, 1, 9, NUM_PROBLEMS * 4])
def test_a_run_goes_on_where_it_stopped(folder, finished, kept):
    output = folder / f"stopped{kept}"
    output.mkdir()
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    # The protocol, some samples, and what a crash left of the next
    (output / "samples.jsonl").write_bytes(b"".join([*lines[: kept + 1], ([*lines, b""])[kept + 1][:30]]))
    assert run(folder, output.name) == 0
    written = (output / "samples.jsonl").read_bytes().splitlines(keepends=True)
    assert written[: kept + 1] == lines[: kept + 1]
    keys = [(record["question"], record["sample"]) for record in records_of(output)]
    assert len(keys) == len(set(keys)) == NUM_PROBLEMS * 4
    # New draws, not those at the beginning of the run once more
    traces = [record["thinking"] for record in records_of(output) if record["question"] == 5]
    assert len(set(traces)) == len(traces)


@pytest.mark.slow
def test_a_run_that_is_killed(folder):
    """The real thing: a process that is killed in the middle."""
    command = [sys.executable, "-m", "trl_anytime.cli", *arguments(folder, "killed", "--samples", 300)]
    command += ["--batch-size", "4"]
    journal = folder / "killed" / "samples.jsonl"
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        try:
            while not journal.exists() or journal.read_bytes().count(b"\n") < 10:  # or until the test's timeout
                assert process.poll() is None
                time.sleep(0.02)
        finally:
            process.kill()
    before = journal.read_bytes()
    complete = before[: before.rfind(b"\n") + 1]
    # Fewer samples are another protocol, so the file is told of it
    header, *rest = complete.splitlines(keepends=True)
    protocol = json.loads(header)
    protocol["protocol"]["num_samples"] = 30
    kept = [line for line in rest if json.loads(line)["sample"] < 30]
    journal.write_bytes(json.dumps(protocol).encode() + b"\n" + b"".join(kept))
    assert run(folder, "killed", "--samples", 30) == 0
    assert journal.read_bytes().splitlines(keepends=True)[1 : len(kept) + 1] == kept
    keys = {(record["question"], record["sample"]) for record in records_of(folder / "killed")}
    assert len(keys) == len(records_of(folder / "killed")) == NUM_PROBLEMS * 30


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", 0.5], r"\bsampling\b.*'temperature': 0\.5"),
        (["--samples", 5], r"\bnum_samples\b.*\b4\b.*\b5\b"),
        (["--limit", 2], r"\bproblems\b"),
        (["--budgets", "2,4"], r"\bbudgets\b.*\[2, 4\]"),
    ],
)
def test_results_of_another_protocol_are_refused(folder, finished, capsys, more, message):
    before = (finished / "samples.jsonl").read_bytes()
    assert run(folder, "finished", *more) == BAD_INPUT
    assert re.search(message, capsys.readouterr().err)
    assert (finished / "samples.jsonl").read_bytes() == before


def test_damaged_journals(folder, finished, capsys):
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    twice = b"".join([*lines, lines[1]])
    for content, message in ((b"no json\n", "samples.jsonl.*\\b1\\b.*JSON"), (twice, "samples.jsonl.*twice")):
        output = folder / "damaged"
        output.mkdir(exist_ok=True)
        (output / "samples.jsonl").write_bytes(content)
        assert run(folder, "damaged") == BAD_INPUT
        assert re.search(message, capsys.readouterr().err)


# Counters and answers


def test_the_counters_of_an_evaluation(folder, finished):
    """Counted once more from the tokens and the texts."""
    counts = load_results(finished / "results.json")["curves"]["problems"]["answers"]
    records = records_of(finished)
    for budget, count in zip(BUDGETS, counts, strict=True):
        places = [place for one in records for place in one["cuts"] if budget in place["budgets"]]
        assert count["answers"] == len(places) == NUM_PROBLEMS * 4
        assert count["ill_formed"] == sum(not place["well_formed"][0] for place in places)
        boxed = ["boxed" in place["answers"][0] for place in places]
        # A box in another paragraph does not occur in texts without line breaks
        assert count["no_box"] == sum(
            place["well_formed"][0] and not box for place, box in zip(places, boxed, strict=True)
        )
        assert sum(place["answer_tokens"][0] < 3 for place in places) <= count["answers"] - count["clipped"]
        assert count["zero"] == sum(place["rewards"][0] == 0 for place in places)
    assert 0 < sum(count["clipped"] for count in counts) < sum(count["answers"] for count in counts)
    assert sum(count["no_box"] for count in counts) > 0


def test_an_old_journal_goes_on(folder, finished, capsys):
    """One whose samples do not say what was cut off."""
    header, *samples = (finished / "samples.jsonl").read_text().splitlines()
    records = [json.loads(sample) for sample in samples[:5]]
    for place in (place for one in records for place in one["cuts"]):
        del place["clipped"], place["no_box"]
    (folder / "old").mkdir()
    (folder / "old" / "samples.jsonl").write_text("\n".join([header, *map(json.dumps, records)]) + "\n")
    assert run(folder, "old") == 0
    said = capsys.readouterr().err
    assert f"5 of {NUM_PROBLEMS * 4}" in said and "older" in said
    counts = load_results(folder / "old" / "results.json")["curves"]["problems"]["answers"]
    assert any(count["clipped"] is None for count in counts)
    rows = load_dataset("parquet", data_files=str(folder / "old" / "answers.parquet"), split="train")
    assert rows["clipped"].count(None) == 5 * len(BUDGETS)


def test_a_row_for_each_answer(finished):
    rows = load_dataset("parquet", data_files=str(finished / "answers.parquet"), split="train").to_pandas()
    documented = re.findall(
        r"`(\w+)`", " ".join(row[0] for row in table("docs/evaluation.md", "column of `answers.parquet`"))
    )
    assert list(rows.columns) == documented
    assert len(rows) == NUM_PROBLEMS * 4 * len(BUDGETS)
    curve = load_results(finished / "results.json")["curves"]["problems"]["accuracy"]
    means = rows.groupby("budget")["reward"].mean()
    assert means.to_dict() == pytest.approx(
        {budget: point["mean"] for budget, point in zip(BUDGETS, curve, strict=True)}
    )


def test_a_row_for_each_sample_says_when_it_stays_right(finished):
    rows = load_dataset("parquet", data_files=str(finished / "samples.parquet"), split="train").to_pandas()
    answers = load_dataset("parquet", data_files=str(finished / "answers.parquet"), split="train").to_pandas()
    key = ["dataset", "question", "sample"]
    stable = answers[answers["stays_right"]].groupby(key)["budget"].min()
    found = rows.set_index(key)["first_stable_budget"].dropna()
    assert found.sort_index().to_dict() == stable.to_dict() and len(found) > 0
    for place, count in rows.set_index(key)["flips"].items():
        rewards = answers.set_index(key).loc[place].sort_values("budget")["reward"].tolist()
        assert count == sum(a > b for a, b in pairwise(rewards))


# Baselines and pictures


def test_a_baseline(folder, finished, capsys):
    baseline = ["--baseline", finished / "results.json"]
    assert run(folder, "seeded", *baseline, "--seed", 1) == 0
    compared = load_results(folder / "seeded" / "results.json")["baseline"]["curves"]["problems"]
    ours, theirs = (
        np.array(load_results(folder / name / "results.json")["questions"]["problems"])
        for name in ("seeded", "finished")
    )
    assert compared["anytime_average"]["difference"]["mean"] == pytest.approx((ours - theirs).mean())
    assert all(0 < c["p_value"] <= 1 for c in compared["accuracy"])
    assert f"anytime, minus {folder}" in capsys.readouterr().out

    assert run(folder, "other", *baseline, "--temperature", 0.5) == BAD_INPUT
    assert re.search(r"results\.json.*\bsampling\b.*'temperature': 0\.5", capsys.readouterr().err)
    assert not (folder / "other").exists()  # said before anything is drawn
    assert run(folder, "other", "--baseline", folder / "config.json") == BAD_INPUT
    assert re.search("config.json.*`format`", capsys.readouterr().err)


def test_plots(folder, finished, tmp_path, capsys):
    results = str(finished / "results.json")
    assert main(["plot", results, results, "--output", str(tmp_path / "curves.png")]) == 0
    state = {"log_history": [{"step": s, "anytime/reward@4": 0.1 * s, "eval_anytime/reward@8": 0.5} for s in range(3)]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "training.png")]) == 0
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in ("curves", "training"))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    assert main(["plot", str(tmp_path)]) == BAD_INPUT
    assert main(["plot", str(folder)]) == BAD_INPUT
    assert str(folder) in capsys.readouterr().err


def test_results_of_an_older_version(folder, finished, tmp_path):
    """Those without areas, stability and frontiers. The picture of questions needs none of them."""
    results = json.loads((finished / "results.json").read_text())
    for name in ("right_at", "first_stable_budget", "flips"):
        del results[name]
    for curve in results["curves"].values():
        for name in ("area", "anytime_index", "stability"):
            del curve[name]
    old = tmp_path / "results.json"
    old.write_text(json.dumps(results))
    for name, more in (("curves", []), ("questions", ["--questions"])):
        assert main(["plot", str(old), *more, "--output", str(tmp_path / f"{name}.png")]) == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    assert run(folder, "finished", "--baseline", old) == 0
    assert load_results(finished / "results.json")["baseline"]["model"] == str(folder)


def test_a_frontier(folder, finished, tmp_path, capsys):
    (tmp_path / "frontier.csv").write_text("budget,accuracy\n2,0.5\n64,1\n")
    shutil.copytree(finished, folder / "gap")
    assert run(folder, "gap", "--frontier", tmp_path / "frontier.csv") == 0
    results = load_results(folder / "gap" / "results.json")
    gap = results["curves"]["problems"]["gap"]
    # At 32 the frontier is 0.5 + 0.5 · 30 / 62
    assert (gap["from"], gap["to"]) == (2, 32)
    mean = 0.5 + 0.25 * 30 / 62 - results["curves"]["problems"]["area"]["mean"]
    assert gap["mean"]["mean"] == pytest.approx(mean) and gap["area"]["mean"] == pytest.approx(30 * mean)
    assert "gap" in capsys.readouterr().out.partition("\n\n")[0].split()
    (tmp_path / "frontier.csv").write_text("budget,accuracy\n2,50\n64,100\n")
    assert run(folder, "none", "--frontier", tmp_path / "frontier.csv") == BAD_INPUT
    assert "frontier.csv" in capsys.readouterr().err
    assert not (folder / "none").exists()


def test_results_with_no_question_right(folder):
    """The columns keep their types, and there is no index."""
    (folder / "none.py").write_text("def none(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    assert run(folder, "zero", "--reward", f"{folder / 'none.py'}:none", "--limit", 2, "--samples", 1) == 0
    curve = load_results(folder / "zero" / "results.json")["curves"]["problems"]
    assert curve["anytime_index"] is None and curve["stability"]["never_right"] == 2
    rows = load_dataset("parquet", data_files=str(folder / "zero" / "samples.parquet"), split="train")
    assert rows.features["first_stable_budget"].dtype == "int64" and set(rows["first_stable_budget"]) == {None}


# Bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "aime42"], "aime24"),
        (["--dataset", "missing.jsonl"], "missing.jsonl"),
        (["--answer-column", "truth"], "'truth'"),
        (["--budgets", "100,5000"], " 5000 "),
        (["--temperature", 0], "`num_samples`"),
        (["--temperature", -1], "`temperature`"),
        (["--samples", 0], "`num_samples`"),
        (["--reward", "missing.py:f"], "'missing.py:f'"),
        (["--think-end", "</think>"], "think_end"),
        (["--base-url", "localhost"], "'localhost'"),
    ],
)
def test_bad_input(folder, capsys, more, message):
    assert run(folder, "bad", *more) == BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (folder / "bad").exists()


def test_models_that_cannot_be_evaluated(folder, tmp_path, capsys):
    problems = ["--dataset", str(folder / "problems.jsonl")]
    assert main(["eval", str(tmp_path / "missing"), *problems]) == BAD_INPUT
    plain = make_tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}").backend_tokenizer
    text = plain.to_str().replace("think>", "other>")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    make_model().save_pretrained(tmp_path)
    assert main(["eval", str(tmp_path), *problems]) == BAD_INPUT
    assert "think_end" in capsys.readouterr().err
    assert main(["eval", str(folder)]) == BAD_INPUT
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "budgets"),
    [
        ("250:1000:250", [250, 500, 750, 1000]),
        ("1,2,10", [1, 2, 10]),
        ("7", [7]),
        ("8:4:1", None),
        ("4,4", None),
        ("a,b", None),
        ("0,1", None),
        ("1:5", None),
        ("1:5:0", None),
    ],
)
def test_budgets(text, budgets, capsys):
    if budgets is not None:
        assert parse_budgets(text) == budgets
    else:
        with pytest.raises(SystemExit) as exit:
            main(["eval", "model", "--budgets", text])
        assert exit.value.code == BAD_INPUT
        assert repr(text) in capsys.readouterr().err


def test_help_comes_at_once():
    """No library is loaded for it, and every subcommand has examples."""
    for command in ([], ["eval"], ["generate"], ["probe"], ["serve-command"], ["plot"]):
        code = (
            "import sys, trl_anytime.cli as cli\n"
            f"try: cli.main({[*command, '--help']!r})\n"
            "except SystemExit as exit: assert exit.code == 0\n"
            "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        )
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | path)
        assert shown.returncode == 0, shown.stderr
        assert "exit codes:" in shown.stdout
        assert not command or f"trl-anytime {command[0]} " in shown.stdout.partition("examples:")[2]


# Servers


def test_a_server_and_the_model_agree(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    greedy = ["--temperature", 0, "--samples", 1]
    assert run(folder, "local", *greedy) == 0
    faults = ["drops", None, "overloaded", "breaks_off", None, "garbles", "rate_limited", "gives_up_early"]
    with serving(TinyServer(model, faults)) as server:
        # Faults cost a wait of a second each, half of them at the same time
        assert run(folder, "served", *greedy, "--base-url", server.url, "--concurrency", 4) == 0
    drop = ("seconds",)
    local, served = (
        [{name: value for name, value in record.items() if name not in drop} for record in records_of(folder / name)]
        for name in ("local", "served")
    )
    assert sorted(served, key=lambda record: record["question"]) == local


def test_a_server_that_fails_for_good_and_is_back(folder, capsys):
    model = AutoModelForCausalLM.from_pretrained(folder)
    output = ["--temperature", 0, "--samples", 1, "--concurrency", 1]
    with serving(TinyServer(model, [None] * 5 + ["overloaded"] * 100)) as server:
        address = ["--base-url", server.url, "--patience", "0.1"]
        assert run(folder, "failed", *output, *address) == SERVER_FAILED
    error = capsys.readouterr().err
    assert server.url in error and re.search(r"\b0\.1 s", error)
    assert not (folder / "failed" / "results.json").exists()
    before = (folder / "failed" / "samples.jsonl").read_bytes()
    assert before.count(b"\n") == 1 + 2  # two requests for each sample, so two samples are finished
    with serving(TinyServer(model)) as server:
        assert run(folder, "failed", *output, "--base-url", server.url) == 0
        assert len(server.bodies) == 2 * (NUM_PROBLEMS - 2)
    assert (folder / "failed" / "samples.jsonl").read_bytes().startswith(before)


def test_generate(folder, capsys):
    greedy = ["--temperature", "0", "--budgets", "2,8"]
    assert main(["generate", str(folder), "0 1 2", *greedy, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    answers = [re.findall(r"\d+", line) for line in printed.splitlines() if line.startswith("---")]
    assert answers[0] == ["2", "2"]  # thinking tokens, and the budget
    with serving(TinyServer(AutoModelForCausalLM.from_pretrained(folder))) as server:
        assert main(["generate", str(folder), "0 1 2", *greedy, "--base-url", server.url]) == 0
    assert capsys.readouterr().out == printed


def test_probe(folder, capsys):
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def enforce(body):
        return [*[11] * body["vllm_xargs"]["thinking_budget"], 9, 5, 8, 13, 2]

    for chat, code in ((enforce, 0), (lambda body: [*[11] * 99, 5, 13, 2], FAILED)):
        with serving(TinyServer(chat=chat, tokenizer=tokenizer)) as server:
            assert main(["probe", str(folder), "--base-url", server.url, "--budgets", "4,8"]) == code
        printed = capsys.readouterr().out
        assert (printed.count("enforced"), printed.count("ignored")) == ((2, 0) if code == 0 else (0, 2))


def test_serve_command(folder, capsys):
    assert main(["serve-command", str(folder), "--budget", "6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"vllm serve {folder} ") and '"max_tokens": 6' in printed


# From Python


def test_samples_are_asked_for_once(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = replace(AnytimeConfig.from_pretrained(folder), budgets=BUDGETS)
    problems = load_problems(str(folder / "problems.jsonl"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    evaluation = Evaluation(model, tokenizer, config, [problems], "tiny", num_samples=3, num_summaries=2)
    records = evaluation.run(tmp_path / "samples.jsonl")
    assert all(len(cut["answers"]) == len(cut["rewards"]) == 2 for record in records for cut in record["cuts"])
    assert accuracies(records, BUDGETS)["problems"].shape == (NUM_PROBLEMS, len(BUDGETS))
    assert results_of(evaluation.protocol, records)["protocol"]["num_summaries"] == 2
    assert Path(tmp_path / "samples.jsonl").read_text().count("\n") == 1 + NUM_PROBLEMS * 3


# Rewards


def own_reward(tmp_path, body: str) -> str:
    (tmp_path / "own.py").write_text(f"import sys\n\n\ndef own(prompts, **kwargs):\n    {body}\n")
    return f"{tmp_path / 'own.py'}:own"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit(0)", "sys.exit"),
        ("return dict.fromkeys(range(len(prompts)), 1.0)", "dict"),
        ("return [1.0] * (len(prompts) - 1)", " rewards "),
        ("return [float('nan')] * len(prompts)", "nan"),
        ("return [None] * len(prompts)", "--reward"),
    ],
)
def test_rewards_that_fail(folder, tmp_path, capsys, body, message):
    assert run(folder, tmp_path / "out", "--samples", 1, "--reward", own_reward(tmp_path, body)) == 2
    assert "`own`" in (said := capsys.readouterr().err) and message in said


def test_answers_that_hit_a_limit_are_counted(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = replace(AnytimeConfig.from_pretrained(folder), budgets=BUDGETS)
    problems = ProblemSet("long", ["0"], [r"\sqrt{2}"])
    model = AutoModelForCausalLM.from_pretrained(folder)

    def evaluate(**limits):
        evaluation = Evaluation(model, tokenizer, config, [problems], "tiny", reward=MathReward(**limits))
        told = {**dict.fromkeys(SUMMARY_FACTS), "well_formed": True}
        summaries = [(problems, 0, rf"\boxed{{{text}}}", [1], told, []) for text in (r"\sqrt[3]{8}", "2" * 99)]
        return evaluation._score(summaries), [rewards for *_, rewards in summaries]

    assert evaluate(max_answer_length=50, answer_bridge="") == ({"too_long": 1}, [[0.0], [0.0]])
    assert evaluate() == ({}, [[0.0], [0.0]])


def test_limits_stand_in_results(folder, tmp_path, finished):
    assert load_results(finished / "results.json")["limited"] == {
        "answers": sum(len(cut["answers"]) for record in records_of(finished) for cut in record["cuts"]),
        "timeouts": 0,
        "dead_workers": 0,
        "too_long": 0,
        "scorer_errors": 0,
        "bad_scores": 0,
        "unsafe_answers": 0,
    }
    records = [dict(record) for record in records_of(finished)]
    records[3]["limited"], records[7]["limited"] = {"timeouts": 2}, {"timeouts": 1, "too_long": 1}
    config = replace(AnytimeConfig.from_pretrained(folder), budgets=BUDGETS)
    problems = load_problems(str(folder / "problems.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    evaluation = Evaluation(None, tokenizer, config, [problems], "tiny", num_samples=4)
    results = results_of(evaluation.protocol, records)
    assert (results["limited"]["timeouts"], results["limited"]["too_long"]) == (3, 1)
    said = limited_answers(results)
    assert "3 timeouts" in said and "1 too_long" in said
    assert f"{4 / results['limited']['answers']:.2%}" in said
