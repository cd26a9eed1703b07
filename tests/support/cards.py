"""Reads the tables of a model card, whatever its sentences say."""

import re

from huggingface_hub import ModelCard


def curve_tables(card: ModelCard) -> list[tuple[list[list[int]], dict[int, list[str]]]]:
    """Return each table of rewards: the steps that its columns name, and its cells by budget."""
    found = []
    for lines in re.findall(r"^\|.*\|\n\|[ :|-]+\|\n(?:\|.*\|\n?)+", card.text, flags=re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines.splitlines())
        if header[0] == "thinking budget (tokens)":
            steps = [[int(step) for step in re.findall(r"\d+", cell)] for cell in header[1:]]
            found.append((steps, {int(row[0]): row[1:] for row in rows}))
    return found


def metrics_of_headings(card: ModelCard) -> set[str]:
    """Return the metrics that headings of the card name."""
    headings = re.findall(r"^#+ (.+)$", card.text, flags=re.MULTILINE)
    return {metric for metric in ("accuracy", "mean reward") for heading in headings if metric in heading.lower()}
