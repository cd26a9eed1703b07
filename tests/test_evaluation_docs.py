"""The page docs/evaluation.md: its Python runs, and its commands are ones that the command knows."""

import re
import shlex
from pathlib import Path

import pytest
from tiny import make_config, make_dataset, make_model, make_tokenizer, parity_reward

from trl_anytime import BRPOTrainer
from trl_anytime.cli import _parser
from trl_anytime.problems import BENCHMARKS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text()
PAGES = PAGE + (ROOT / "README.md").read_text()


def commands():
    for block in re.findall(r"```bash\n(.*?)```", PAGES, re.DOTALL):
        for line in re.split(r"\n| && ", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            if words[:1] == ["trl-anytime"]:
                yield words[1:]


def test_the_pages_are_read():
    assert {words[0] for words in commands()} == {"eval", "generate", "probe", "serve-command", "plot"}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands(words):
    assert _parser().parse_args(words).command == words[0]


def test_python(tmp_path, capsys):
    BRPOTrainer(
        make_model(),
        make_config(tmp_path),
        make_dataset(),
        reward_funcs=parity_reward,
        processing_class=make_tokenizer(),
    ).save_model()
    namespace: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block.replace('"outputs/quickstart/model"', repr(str(tmp_path))), namespace)
    assert len(capsys.readouterr().out.splitlines()) == 4  # one for each budget
    assert namespace["tokens"].size(0) == 1


def test_the_table_of_data_sets():
    table = PAGE.partition("| `--dataset` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {row[0].strip("`") for row in rows} == set(BENCHMARKS)
    for name, source, count in rows:
        benchmark = BENCHMARKS[name.strip("`")]
        assert benchmark.hub_id in source and (benchmark.config is None or benchmark.config in source)
        assert int(count) == benchmark.num_problems
