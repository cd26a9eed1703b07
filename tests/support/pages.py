"""Reads the tables of the documentation, which are found by the cells of their headers."""

import re

from tests.support import ROOT


def tables(page: str, *header: str) -> list[list[list[str]]]:
    """Return the cells of each table of a page whose header begins with these cells, row by row."""
    found = re.findall(r"^\|.*\|\n\| ?-.*\|\n(?:\|.*\|\n)*", (ROOT / page).read_text(), re.MULTILINE)
    rows = [[_cells(line) for line in table.splitlines()] for table in found]
    return [table[2:] for table in rows if table[0][: len(header)] == list(header)]


def table(page: str, *header: str) -> list[list[str]]:
    """Return the cells of the one table of a page whose header begins with these cells, row by row."""
    (found,) = tables(page, *header)
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]
