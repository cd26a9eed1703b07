"""Tables as text for a terminal."""

from collections.abc import Container, Sequence
from itertools import zip_longest


def aligned(rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """
    Lay out a table in columns of equal width.

    Args:
        rows (`Sequence[Sequence[str]]`):
            Cells of each row. Rows may be shorter than others. A row of a single cell is a heading across all columns.
        left (`Container[int]`, *optional*, defaults to `(0,)`):
            Columns that are aligned to the left. The others are aligned to the right, as numbers are.
    """
    columns = zip_longest(*(row for row in rows if len(row) > 1), fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        cells = (
            row
            if len(row) == 1
            else [
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
