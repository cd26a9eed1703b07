"""The table of data sets in docs/evaluation.md. What else the page tells to type is run by test_docs.py."""

from pathlib import Path

from trl_anytime.data.problems import BENCHMARKS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text()


def test_the_table_of_data_sets():
    table = PAGE.partition("| `--dataset` |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {row[0].strip("`") for row in rows} == set(BENCHMARKS)
    for name, source, count in rows:
        benchmark = BENCHMARKS[name.strip("`")]
        assert benchmark.hub_id in source and (benchmark.config is None or benchmark.config in source)
        assert int(count) == benchmark.num_problems
