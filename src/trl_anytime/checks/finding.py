"""What a check of a training run says."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass

OK, WARNING, ERROR = "OK", "WARNING", "ERROR"


@dataclass(frozen=True)
class Finding:
    """
    One thing that a check has found.

    Args:
        check (`str`):
            Name of the check.
        level (`str`):
            `"OK"`; `"WARNING"`, the run works but perhaps not as meant; `"ERROR"`, it would fail.
        found (`str`):
            What was found.
        change (`str`, *optional*):
            What to change; every warning and error says it.
    """

    check: str
    level: str
    found: str
    change: str = ""

    def __post_init__(self) -> None:
        assert bool(self.change) == (self.level != OK), "what is wrong comes with what to change"

    def __str__(self) -> str:
        return f"{self.check}: {self.found} {self.change}".strip()


def report(findings: Sequence[Finding], tables: Sequence[str]) -> str:
    """Findings and tables as text for a terminal."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lead = f"{finding.level:<8} {finding.check:<{width}}  "
        lines += textwrap.wrap(
            finding.found, 119, initial_indent=lead, subsequent_indent=" " * len(lead), break_on_hyphens=False
        )
        if finding.change:
            lines += textwrap.wrap(
                finding.change,
                119,
                initial_indent=f"{' ' * len(lead)}-> ",
                subsequent_indent=" " * (len(lead) + 3),
                break_on_hyphens=False,
            )
    counts = {level: sum(finding.level == level for finding in findings) for level in (ERROR, WARNING)}
    summary = f"Errors: {counts[ERROR]}. Warnings: {counts[WARNING]}."
    return "\n\n".join(["\n".join(lines), *tables, summary])


def as_json(findings: Sequence[Finding], tables: Sequence[str]) -> str:
    """The same as JSON."""
    return json.dumps({"findings": [asdict(finding) for finding in findings], "tables": list(tables)}, indent=1)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )
