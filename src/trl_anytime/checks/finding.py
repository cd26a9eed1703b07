"""Findings of the checks of a training run, as text or JSON."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..outside.tables import aligned

OK, WARNING, ERROR = "OK", "WARNING", "ERROR"


@dataclass(frozen=True)
class Finding:
    """
    Result of one check.

    Args:
        check (`str`):
            Name of the check.
        level (`str`):
            `"OK"`, `"WARNING"` (the run works, but perhaps not as intended) or `"ERROR"` (it would fail).
        message (`str`):
            What was found.
        fix (`str`, *optional*):
            What to change. Every warning and error has it.
    """

    check: str
    level: str
    message: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert bool(self.fix) == (self.level != OK), "every warning and error says what to change"

    def __str__(self) -> str:
        return f"{self.check}: {self.message} {self.fix}".strip()


def as_text(findings: Sequence[Finding], tables: Sequence[str]) -> str:
    """Return findings and tables as text for a terminal."""
    room = 119 - sum(max(map(len, column)) + 2 for column in zip(*((f.level, f.check) for f in findings), strict=True))
    rows = []
    for finding in findings:
        lines = textwrap.wrap(finding.message, room, break_on_hyphens=False)
        lines += textwrap.wrap(
            finding.fix, room, initial_indent="-> ", subsequent_indent="   ", break_on_hyphens=False
        )
        rows += [[finding.level, finding.check, lines[0]], *(["", "", line] for line in lines[1:])]
    counts = {level: sum(finding.level == level for finding in findings) for level in (ERROR, WARNING)}
    summary = f"Errors: {counts[ERROR]}. Warnings: {counts[WARNING]}."
    return "\n\n".join([aligned(rows, left=range(3)), *tables, summary])


def as_json(findings: Sequence[Finding], tables: Sequence[str]) -> str:
    """Return findings and tables as JSON."""
    return json.dumps({"findings": [asdict(finding) for finding in findings], "tables": list(tables)}, indent=1)
