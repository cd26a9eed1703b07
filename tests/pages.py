"""Reads the tables of the documentation, which are found by the cells of their headers."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def table(page: str, *header: str) -> list[list[str]]:
    """Return the cells of the one table of a page whose header begins with these cells, row by row."""
    tables = re.findall(r"^\|.*\|\n\| ?-.*\|\n(?:\|.*\|\n)*", (ROOT / page).read_text(), re.MULTILINE)
    cells = [[_cells(line) for line in found.splitlines()] for found in tables]
    (found,) = (rows for rows in cells if rows[0][: len(header)] == list(header))
    return found[2:]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
