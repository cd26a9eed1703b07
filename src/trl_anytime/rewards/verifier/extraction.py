"""Where the answer stands in a completion: thinking markers, final-answer paragraphs, boxes. Pure string functions."""

import re
from typing import Any

# Braces as TeX counts them: an escaped character (`\{`, `\\`) is none, `\boxed{` opens a box, others open a group.
_BRACES = re.compile(r"(?P<box>\\boxed(?![A-Za-z])\s*(?P<open>\{)?)|\\.|[{}]", re.DOTALL)
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n")


def completion_text(completion: Any) -> str:
    """Return the text of a completion: a string, or the last message of a conversation, its text parts joined."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, `None` without one or if it is not complete. Linear in the length."""
    if "\\boxed" not in text:
        return None
    open_groups: list[int | None] = []  # start of the content for a box, None for any other group
    last: tuple[int, int | None] | None = None
    for match in _BRACES.finditer(text):
        if match["box"]:
            last = match.end(), None
            if match["open"]:
                open_groups.append(match.end())
        elif match[0] == "{":
            open_groups.append(None)
        elif match[0] == "}" and open_groups:
            start = open_groups.pop()
            if last is not None and start == last[0]:
                last = last[0], match.start()
    return None if last is None or last[1] is None else text[last[0] : last[1]]


def answer_paragraph(summary: str, answer_bridge: str) -> str:
    """First paragraph of `answer_bridge + summary` that starts with the final-answer text, `""` without one."""
    marker = answer_bridge.strip()
    for paragraph in _BLANK_LINES.split(answer_bridge + summary):
        if paragraph.strip().startswith(marker) and (marker or paragraph.strip()):
            return paragraph
    return ""


def after_thinking(text: str, end_of_thinking: str | None) -> str | None:
    """The part of a whole completion that follows the thinking, `None` if the marker is not there exactly once."""
    if not end_of_thinking:
        return text
    parts = text.split(end_of_thinking)
    return parts[1] if len(parts) == 2 else None


def answer_part(
    completion: Any, well_formed: bool | None, answer_bridge: str, end_of_thinking: str | None
) -> str | None:
    """Return the part of a completion to look for the answer in; `None` if its format is bad.

    `well_formed` is what the trainer says of a summary, which follows `answer_bridge`. It is `None` for a whole
    completion, which must hold the marker `end_of_thinking`, if there is one, exactly once.
    """
    text = completion_text(completion)
    if well_formed is None:
        return after_thinking(text, end_of_thinking)
    return answer_paragraph(text, answer_bridge) if well_formed else None
