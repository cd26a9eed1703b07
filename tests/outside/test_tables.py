"""Tables as text."""

from trl_anytime.outside.tables import aligned


def test_columns():
    rows = [["budget", "a", "b"], ["2", "0.1", "10.25"], ["ten", "1", "2"]]
    assert aligned(rows).split("\n") == [
        "budget    a      b",
        "2       0.1  10.25",
        "ten       1      2",
    ]
    assert aligned(rows, left=(2,)).split("\n") == [
        "budget    a  b",
        "     2  0.1  10.25",
        "   ten    1  2",
    ]


def test_headings_and_short_rows():
    rows = [["x", "1"], ["a heading that is longer"], ["yy", "22", "3"], ["z"]]
    assert aligned(rows, left=()).split("\n") == [
        " x   1",
        "a heading that is longer",
        "yy  22  3",
        "z",
    ]
