"""Find the answer in a completion: thinking markers, final-answer paragraphs, boxes. Pure string functions."""

import re
from typing import Any

# Braces as TeX counts them. An escaped character (`\{`, `\\`) does not count, `\boxed{` opens a box, others open a
# group.
_BRACES = re.compile(r"(?P<box>\\boxed(?![A-Za-z])\s*(?P<open>\{)?)|\\.|[{}]", re.DOTALL)
_BLANK_LINES = re.compile(r"\n[ \t\r]*\n")


def completion_text(completion: Any) -> str:
    """Return the text of a completion.

    A completion is a string or a conversation. Of a conversation, these are the text parts of the last message,
    joined.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, in linear time. `None` if missing or not complete."""
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


def all_boxed(text: str) -> list[str]:
    r"""Return the contents of all complete `\boxed{...}` that stand in no other box, in linear time."""
    if "\\boxed" not in text:
        return []
    open_groups: list[int | None] = []  # as in `last_boxed`
    found: list[str] = []
    num_open = 0  # boxes
    for match in _BRACES.finditer(text):
        if match["box"]:
            if match["open"]:
                open_groups.append(match.end())
                num_open += 1
        elif match[0] == "{":
            open_groups.append(None)
        elif match[0] == "}" and open_groups:
            start = open_groups.pop()
            if start is not None:
                num_open -= 1
                if not num_open:
                    found.append(text[start : match.start()])
    return found


def answer_paragraph(summary: str, answer_bridge: str) -> str:
    """
    Return the first paragraph of `answer_bridge + summary` that starts with the final-answer text.

    Returns `""` if there is none.
    """
    marker = answer_bridge.strip()
    for paragraph in _BLANK_LINES.split(answer_bridge + summary):
        if paragraph.strip().startswith(marker) and (marker or paragraph.strip()):
            return paragraph
    return ""


def after_thinking(text: str, end_of_thinking: str | None) -> str | None:
    """Return the text after the thinking. `None` if the marker does not occur exactly once."""
    if not end_of_thinking:
        return text
    parts = text.split(end_of_thinking)
    return parts[1] if len(parts) == 2 else None


def answer_part(
    completion: Any, well_formed: bool | None, answer_bridge: str, end_of_thinking: str | None
) -> str | None:
    """Return the part of a completion that may contain the answer, or `None` if its format is bad.

    Args:
        completion (`str` or `list[dict]`):
            A summary, or a whole completion.
        well_formed (`bool`, *optional*):
            The trainer's verdict on a summary. `None` for a whole completion.
        answer_bridge (`str`):
            Text that precedes a summary.
        end_of_thinking (`str`, *optional*):
            Marker that a whole completion must contain exactly once, if set.
    """
    text = completion_text(completion)
    if well_formed is None:
        return after_thinking(text, end_of_thinking)
    return answer_paragraph(text, answer_bridge) if well_formed else None
