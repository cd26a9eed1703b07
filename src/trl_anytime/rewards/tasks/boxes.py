r"""How the answer of a task stands in a `\boxed{}`: written for examples, and read from a model's text."""

import re

from ..verifier.extraction import answer_part, last_boxed

_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf)\s*\{(.*)\}", re.DOTALL)
_ESCAPED = re.compile(r"\\([{}_#$%&])")
_BRIDGE = "\n\nAnswer:\n"  # any will do


def write_box(answer: str) -> str:
    r"""
    Return a `\boxed{}` that is read as an answer, character for character.

    Args:
        answer (`str`):
            An answer of a task, as its scorer takes it.

    Raises:
        `ValueError`: If no box can hold it: it is empty, or has an empty line, which ends the final answer.
    """
    for inside in (answer, re.sub(r"([{}])", r"\\\1", answer)):
        box = rf"\boxed{{{inside}}}"
        if _is_balanced(inside) and answer.strip() in read_box(answer_part(box, True, _BRIDGE, None)):
            return box
    raise ValueError(
        f"The answer {answer[:200]!r} cannot stand in a box: it is empty, or has an empty line or an odd backslash."
    )


def _is_balanced(text: str) -> bool:
    depth = 0
    for match in _BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth < 0:
            return False
    return depth == 0


def read_box(text: str | None) -> list[str]:
    r"""
    Return the readings of the last box in a text, none if it has none that is complete and filled.

    The first reading is what stands there. If that is written as LaTeX, there is a second one, without `\text{}`
    around everything and without a backslash before one of `{}_#$%&`.
    """
    return readings((last_boxed(text or "") or "").strip())


def readings(answer: str) -> list[str]:
    """Return the readings of what stands in a box, see [`read_box`]."""
    wrapped = _WRAPPED.fullmatch(answer)
    plain = wrapped[1] if wrapped and _is_balanced(wrapped[1]) else answer
    plain = _ESCAPED.sub(r"\1", plain).strip()
    return [text for text in dict.fromkeys((answer, plain)) if text]
