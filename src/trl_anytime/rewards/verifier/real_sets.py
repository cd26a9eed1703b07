r"""Sets of real numbers: intervals, points, unions, intersections, differences.

Two sets are cut at all their end points. They are equal if they hold the same points and gaps. So `(1,2]\cup(2,3)`
equals `(1,3)`, and `x \ne 2` equals `(-\infty,2)\cup(2,\infty)`. No library does this with end points that can only be
compared, and plain numbers do not need one.
"""

from collections.abc import Callable
from functools import cmp_to_key

from .forms import INTERVALS, Collection, Form, Formula, unnamed

_MAX_END_POINTS = 24  # sets with more are compared item by item


class _Unknown(Exception):
    """An end point cannot be put in order."""


def equal_sets(a: Form, b: Form, order: Callable[[str, str], int | None]) -> bool | None:
    """Return whether two forms are the same set of real numbers. The name of a variable does not count.

    `order` compares two formulas. It returns a negative number, 0 or a positive one if the first is less than, equal
    to or greater than the second, and `None` if that is unknown. Returns `None` if one of the two is not such a set,
    or if its end points cannot be put in order.
    """
    ends: set[str] = set()
    if not (_collect(a, ends) and _collect(b, ends)) or len(ends) > _MAX_END_POINTS:
        return None

    def compare(x: str, y: str) -> int:
        found = order(x, y)
        if found is None:
            raise _Unknown
        return found

    try:
        ordered = sorted(ends, key=cmp_to_key(compare))
        place: dict[str, int] = {}
        last = -1
        for index, end in enumerate(ordered):
            last += index == 0 or compare(ordered[index - 1], end) != 0
            place[end] = last
    except _Unknown:
        return None
    # The even number 2p is end point p. The odd number 2p - 1 is the gap below it.
    return all(_holds(a, cell, place, last) == _holds(b, cell, place, last) for cell in range(-1, 2 * last + 2))


def _infinite(form: Form) -> int:
    text = form.text.replace(" ", "") if isinstance(form, Formula) else ""
    return {r"\infty": 1, r"+\infty": 1, r"-\infty": -1}.get(text, 0)


def _collect(form: Form, ends: set[str]) -> bool:
    """Add the end points of a set, and return whether the form is one."""
    form = unnamed(form)
    if not isinstance(form, Collection):
        return False
    if (form.kind in INTERVALS and len(form.items) == 2) or form.kind == "{}":
        points = [item for item in form.items if form.kind == "{}" or not _infinite(item)]
        if not all(isinstance(item, Formula) and not item.percent for item in points):
            return False
        ends.update(item.text for item in points if isinstance(item, Formula))
        return True
    return form.kind in ("cup", "cap", "minus", "or") and all(_collect(item, ends) for item in form.items)


def _holds(form: Form, cell: int, place: dict[str, int], last: int) -> bool:
    form = unnamed(form)
    assert isinstance(form, Collection)
    if form.kind == "minus":
        return _holds(form.items[0], cell, place, last) and not _holds(form.items[1], cell, place, last)
    if form.kind in ("cup", "or"):
        return any(_holds(item, cell, place, last) for item in form.items)
    if form.kind == "cap":
        return all(_holds(item, cell, place, last) for item in form.items)
    cells = [
        2 * place[item.text] if not _infinite(item) else -1 if _infinite(item) < 0 else 2 * last + 1
        for item in form.items
        if isinstance(item, Formula)
    ]
    if form.kind == "{}":
        return cell in cells
    low = cells[0] + (form.kind[0] == "(" and not _infinite(form.items[0]))
    high = cells[1] - (form.kind[1] == ")" and not _infinite(form.items[1]))
    return low <= cell <= high
