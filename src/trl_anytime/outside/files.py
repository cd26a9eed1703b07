"""Files that others see whole."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
