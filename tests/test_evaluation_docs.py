"""The table of data sets in docs/evaluation.md. What else the page tells to type is run by test_docs.py."""

from pathlib import Path

from trl_anytime.problems import BENCHMARKS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text()


def test_the_table_of_data_sets():
