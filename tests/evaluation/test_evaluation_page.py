"""The tables of data sets and of counters in docs/evaluation.md. What else it tells to type is run by test_docs.py."""

from tests.support.pages import table
from trl_anytime.data.problems import BENCHMARKS
from trl_anytime.evaluation.zeros import COUNTERS


def test_the_table_of_counters():
    assert {row[0].strip("`"): row[1] for row in table("docs/evaluation.md", "counter")} == COUNTERS


def test_the_table_of_data_sets():
    rows = table("docs/evaluation.md", "`--dataset`")
    assert {row[0].strip("`") for row in rows} == set(BENCHMARKS)
    for name, source, count in rows:
        benchmark = BENCHMARKS[name.strip("`")]
        assert benchmark.hub_id in source and (benchmark.config is None or benchmark.config in source)
        assert int(count) == benchmark.num_problems
