r"""Equality of two answers. The comparison of two formulas is a parameter.

The structure is compared here, in pure Python: lists, sets, tuples, intervals, unions, matrices, equations, units,
number bases, words, choices. Two formulas are compared by an object with two methods:

- `equal(a, b)` says whether two scalars have the same value.
- `proportional(a, b, positive)` says whether a is a (positive) constant multiple of b, for equations (inequalities).
  It is False for two numbers, which always are multiples of each other.

Each returns True, False, or None for "cannot tell". `Exact` below knows plain numbers and runs in the training
process. `symbolic.Symbolic` uses sympy and runs in the workers.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from typing import Protocol

from .forms import (
    FUNCTION_WORDS,
    INTERVALS,
    Chain,
    Choice,
    Collection,
    Form,
    Formula,
    Matrix,
    Named,
    Relation,
    Words,
    as_fraction,
    decimal_places,
    digit_groups,
    read,
    with_letter_as_unit,
)
from .latex import normalize, tokens
from .real_sets import equal_sets

Verdict = bool | None


class FormulaComparison(Protocol):
    """Comparison of two formulas, with the two methods that this module's docstring describes."""

    def equal(self, a: str, b: str) -> Verdict: ...

    def proportional(self, a: str, b: str, positive: bool) -> Verdict: ...


# Sets and matrices that may have to be computed: `\mathbb{R}\setminus\{0\}` is a union, `2A` a matrix.
_ALGEBRA = re.compile(r"\\(?:setminus|cap|mathbb)(?![A-Za-z])|matrix\}")

# Digits with a base within a formula. The value is not computed. Digits and bases must be the same.
_BASED_DIGITS = re.compile(r"[\d)]\s*_\s*\{?\s*\d")
_DOMAIN = re.compile(r",\s*\\forall\s*([A-Za-z]?)\s*(\\mathbb\{[A-Z]\}(?:_0)?)?")
_CALL = re.compile(r"(\S+(?: [_^] (?:\{[^{}]*\}|\S)| ')*) \( ([A-Za-z](?: , [A-Za-z])*) \)")
_VARIABLES = frozenset("kmnrstuvwxyz")  # a function of one of these is one of any other; P(A) is not P(B)
_SUBSCRIPT = re.compile(r"\s*_.*")
_CLOCK = re.compile(r"\s*([01]?\d|2[0-4])\s*:\s*([0-5]\d)\s*")  # a time of day: 7:00 is not a ratio

_WORD = re.compile(r"\\[A-Za-z]+|[A-Za-z]+")
_SAME_DEGREES = ({"degree", "celsius"}, {"degree", "fahrenheit"})  # a plain degree can be either

MIN_DECIMALS = 6
"""A decimal with at least that many places and significant digits equals an exact value that rounds to it."""


def rounds_to(value: Fraction, decimal: Fraction, places: int) -> bool:
    """
    Return whether `decimal`, written with `places` digits after the point, is `value` rounded.

    A decimal with fewer than `MIN_DECIMALS` places or significant digits is not.
    """
    half_unit = Fraction(1, 2 * 10**places)
    significant = abs(decimal) * 10**places >= 10 ** (MIN_DECIMALS - 1)
    return places >= MIN_DECIMALS and significant and abs(value - decimal) <= half_unit


class Exact:
    """Comparison of formulas that are plain numbers or have the same tokens. Returns None for all others."""

    def equal(self, a: str, b: str) -> Verdict:
        if tokens(a) == tokens(b):
            return True
        times = _CLOCK.fullmatch(a), _CLOCK.fullmatch(b)
        if times[0] and times[1]:
            return [int(part) for part in times[0].groups()] == [int(part) for part in times[1].groups()]
        left, right = as_fraction(a), as_fraction(b)
        if left is None or right is None:
            return None
        if left == right:
            return True
        places_a, places_b = decimal_places(a), decimal_places(b)
        if bool(places_a) == bool(places_b):
            return False
        return rounds_to(left, right, places_b) if places_b else rounds_to(right, left, places_a)

    def proportional(self, a: str, b: str, positive: bool) -> Verdict:
        return True if tokens(a) == tokens(b) else None


def answers_equal(gold: str, answer: str, comparison: FormulaComparison) -> Verdict:
    r"""Return whether an answer equals a gold answer, by the given comparison of formulas.

    In a gold answer, `a \approx b` accepts both values. In an answer, it claims a.

    Args:
        gold (`str`):
            One alternative of a gold answer.
        answer (`str`):
            Content of the answer's box.
        comparison ([`FormulaComparison`]):
            Comparison of two formulas.

    Returns:
        `bool`, *optional*: `None` if the comparison cannot tell, or if the answer is nested too deeply.
    """
    try:
        return _answers_equal(gold, answer, comparison)
    except RecursionError:
        return None


def _answers_equal(gold: str, answer: str, comparison: FormulaComparison) -> Verdict:
    normal_answer, normal_gold = normalize(answer), normalize(gold)
    if not normal_answer or not normal_gold:
        return False
    if tokens(normal_answer) == tokens(normal_gold):
        return True
    answer_domain, gold_domain = _DOMAIN.search(normal_answer), _DOMAIN.search(normal_gold)
    if answer_domain and gold_domain:
        if answer_domain[2] and gold_domain[2] and answer_domain[2] != gold_domain[2]:
            return False
        if answer_domain[1] and gold_domain[1] and gold_domain[1] not in tokens(normal_answer):
            normal_answer = _renamed_text(normal_answer, {answer_domain[1]: gold_domain[1]})
    claimed = read(normal_answer)
    alternatives = [part for part in normal_gold.split(r"\approx") if part.strip()]
    verdict = _any(_equal(read(part), claimed, comparison) for part in alternatives)
    if verdict is False and (pair := _as_lists(normal_gold, read(normal_gold), normal_answer, claimed)):
        return _equal(*pair, comparison)
    if verdict is False and (_ALGEBRA.search(normal_gold) or _ALGEBRA.search(normal_answer)):
        return comparison.equal(normal_gold, normal_answer)
    return verdict


def _as_lists(gold_text: str, gold: Form, answer_text: str, answer: Form) -> tuple[Form, Form] | None:
    """
    Return both as lists, if one is a list and the other a number that may also be one.

    Such a number is `100,200`. The order of the two is kept. Returns `None` for all others.
    """
    groups, claims = digit_groups(gold_text), digit_groups(answer_text)
    if groups and not claims and isinstance(answer, Collection) and answer.kind == "":
        return groups, answer
    if claims and not groups and isinstance(gold, Collection) and gold.kind == "":
        return gold, claims
    return None


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    found = set(verdicts)
    return True if True in found else None if None in found else False


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    found = set()
    for verdict in verdicts:
        if verdict is False:
            return False
        found.add(verdict)
    return None if None in found else True


def _equal(gold: Form, answer: Form, comparison: FormulaComparison) -> Verdict:
    if gold == answer:
        return True
    gold, answer = _with_name(gold, answer), _with_name(answer, gold)
    if isinstance(gold, Chain) or isinstance(answer, Chain):
        return _equal_chains(gold, answer, comparison)
    if isinstance(gold, Named | Relation) and isinstance(answer, Named | Relation):
        return _equal_relations(gold, answer, comparison)
    if isinstance(gold, Named):
        # `x+y=1` is more than 1, `\text{Area}=1` is not.
        return not {"+", "-"} & set(gold.name.replace("{ - 1 }", "").split()) and _equal(
            gold.value, answer, comparison
        )
    if isinstance(answer, Named):
        return _equal(gold, answer.value, comparison)
    if isinstance(gold, Formula) and isinstance(answer, Relation) and answer.operator == "=":
        # `\frac34 = 0.75` is right if both sides are. A side that is again an equation is not read further.
        sides = [read(side) for side in (answer.left, answer.right)]
        return _all(not isinstance(side, Relation) and _equal(gold, side, comparison) for side in sides)
    if isinstance(gold, Words | Choice) or isinstance(answer, Words | Choice):
        return _letters(gold) == _letters(answer) != ""
    if isinstance(gold, Formula) and isinstance(answer, Formula):
        return _equal_formulas(gold, answer, comparison)
    if isinstance(gold, Collection) and isinstance(answer, Collection):
        return _equal_collections(gold, answer, comparison)
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        cells = zip(chain.from_iterable(gold.rows), chain.from_iterable(answer.rows), strict=True)
        return _all(_equal(a, b, comparison) for a, b in cells)
    return False


def _letters(form: Form) -> str:
    """
    Return the letters of words, of a choice, or of a formula that has nothing else, in lower case.

    Returns `""` for any other form.
    """
    if isinstance(form, Words):
        return form.text
    if isinstance(form, Choice):
        return form.letter.casefold()
    if isinstance(form, Formula) and form.text.replace(" ", "").isalpha():
        return form.text.casefold()
    return ""


def _equal_formulas(gold: Formula, answer: Formula, comparison: FormulaComparison) -> Verdict:
    if gold.unit and answer.unit and gold.unit != answer.unit and {gold.unit, answer.unit} not in _SAME_DEGREES:
        return False
    if (gold.percent and answer.unit) or (answer.percent and gold.unit):
        return False
    if _BASED_DIGITS.search(gold.text) or _BASED_DIGITS.search(answer.text):
        return tokens(gold.text) == tokens(answer.text)
    if as_fraction(gold.text) is not None and (with_unit := with_letter_as_unit(answer)):
        return _equal_formulas(gold, with_unit, comparison)
    if answer.unit and as_fraction(answer.text) is not None and (with_unit := with_letter_as_unit(gold)):
        return _equal_formulas(with_unit, answer, comparison)
    if ":" in gold.text or ":" in answer.text:
        return _equal_ratios(gold.text, answer.text, comparison)
    verdict = comparison.equal(gold.text, answer.text)
    if verdict is True or gold.percent == answer.percent:
        return verdict
    # One of the two is in per cent: 17% is right both for 17 and for 0.17.
    a, b = (f"\\frac{{{form.text}}}{{100}}" if form.percent else form.text for form in (gold, answer))
    return _any([verdict, comparison.equal(a, b)])


def _equal_ratios(gold: str, answer: str, comparison: FormulaComparison) -> Verdict:
    """Return whether two ratios or times are equal. A ratio of two numbers is also their quotient."""
    if _CLOCK.fullmatch(gold) and _CLOCK.fullmatch(answer):
        return comparison.equal(gold, answer)
    a, b = gold.split(":"), answer.split(":")
    if len(a) == len(b) > 2:
        return _all(comparison.equal(f"({x})*({b[0]})", f"({y})*({a[0]})") for x, y in zip(a[1:], b[1:], strict=True))
    if max(len(a), len(b)) > 2:
        return False
    quotients = [rf"\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else parts[0] for parts in (a, b)]
    return comparison.equal(*quotients)


def _equal_collections(gold: Collection, answer: Collection, comparison: FormulaComparison) -> Verdict:
    if not {gold.kind, answer.kind} & {"cup", "minus", "cap"}:
        return _equal_items(gold, answer, comparison)
    verdict = equal_sets(gold, answer, lambda a, b: _order(a, b, comparison))
    return verdict if verdict is not None else _equal_items(gold, answer, comparison) or None


def _equal_items(gold: Collection, answer: Collection, comparison: FormulaComparison) -> Verdict:
    kinds = {gold.kind, answer.kind}
    if gold.kind == answer.kind or kinds == {"", "{}"}:
        ordered = gold.kind not in ("", "{}", "cup", "or", "cases")
    elif kinds == {"", "()"}:
        ordered = True  # a tuple without its brackets
    elif "or" in kinds and kinds <= {"", "{}", "cup", "or"}:
        ordered = False
    else:
        return False
    a, b = gold.items, answer.items
    if "{}" in kinds:
        a, b = tuple(dict.fromkeys(a)), tuple(dict.fromkeys(b))
    if len(a) != len(b):
        return False
    if ordered or _has_ellipsis(a) or _values_in_order(a, b) or _values_in_order(b, a):
        return _all(_equal(x, y, comparison) for x, y in zip(a, b, strict=True))
    return _equal_in_any_order(a, list(b), comparison)


def _has_ellipsis(items: tuple[Form, ...]) -> bool:
    r"""Return whether a list continues, as in `1, 3, \ldots`. The order of such a list counts."""
    return any(isinstance(item, Formula) and item.text == r"\ldots" for item in items)


def _values_in_order(named: tuple[Form, ...], others: tuple[Form, ...]) -> bool:
    """
    Return whether `4, 7` stands for `x=4, y=7`. Then the order counts.

    In `x_1=4, x_2=7` the names are just numbered, so the order does not count.
    """
    names = [_SUBSCRIPT.sub("", item.name) for item in named if isinstance(item, Named)]
    return len(set(names)) == len(named) > 1 and not all(isinstance(item, Named) for item in others)


def _order(a: str, b: str, comparison: FormulaComparison) -> int | None:
    """Return -1, 0 or 1 if a formula is less than, equal to or greater than another, `None` if unknown."""
    left, right = as_fraction(a), as_fraction(b)
    if left is not None and right is not None:
        return (left > right) - (left < right)
    equal = comparison.equal(a, b)
    if equal is not False:
        return None if equal is None else 0
    for sign, (low, high) in ((-1, (a, b)), (1, (b, a))):
        if comparison.proportional(f"x*(({high})-({low}))", "x", True):
            return sign
    return None


def _equal_in_any_order(gold: tuple[Form, ...], answer: list[Form], comparison: FormulaComparison) -> Verdict:
    unmatched = []
    for item in gold:
        verdicts = [_equal(item, other, comparison) for other in answer]
        if True in verdicts:
            answer.pop(verdicts.index(True))
        else:
            unmatched.append(item)
    left = [[_equal(item, other, comparison) for other in answer] for item in unmatched]
    if not left:
        return True
    # Each remaining item, on either side, needs a partner that it may be equal to
    return None if all(None in verdicts for verdicts in [*left, *zip(*left, strict=True)]) else False


def _equal_relations(gold: Named | Relation, answer: Named | Relation, comparison: FormulaComparison) -> Verdict:
    if isinstance(gold, Named) and isinstance(answer, Named):
        names = sorted((gold.name, answer.name), key=len)
        if names[0] == names[1] or (names[0].startswith(r" \equiv") and names[1].endswith(names[0])):
            return _equal(gold.value, answer.value, comparison)
        calls = _CALL.fullmatch(gold.name), _CALL.fullmatch(answer.name)
        if calls[0] and calls[1] and calls[0][1] == calls[1][1]:  # the name of a function's variable does not count
            given, wanted = calls[1][2].split(" , "), calls[0][2].split(" , ")
            if len(given) != len(wanted) or len(set(given)) != len(given):
                return False
            renamed = _renamed(answer.value, dict(zip(given, wanted, strict=True)))
            if renamed == answer.value and not {*given, *wanted} <= _VARIABLES:
                return False
            return renamed is not None and _equal(gold.value, renamed, comparison)
        if {"y"} < {gold.name, answer.name} and any(calls):  # `y=x^2` and `f(x)=x^2`
            return _equal(gold.value, answer.value, comparison)
        if not (isinstance(gold.value, Formula) and isinstance(answer.value, Formula)):
            return False
    a, b = _as_relation(gold), _as_relation(answer)
    if a is None or b is None or a.operator != b.operator:
        return False
    if not a.left or not b.left:
        return a.left == b.left and _equal(read(a.right), read(b.right), comparison)
    return _equal_links((a.left, a.operator, a.right), (b.left, b.operator, b.right), comparison)


def _as_relation(form: Named | Relation) -> Relation | None:
    if isinstance(form, Relation):
        return form
    value = form.value
    if isinstance(value, Formula):
        return Relation(form.name, "=", value.text)
    sides = _sides(form)
    if sides and len(sides[1]) == 1:
        return Relation(sides[0][0], sides[1][0], sides[0][1])
    if isinstance(value, Collection) and value.kind == "minus" and isinstance(value.items[1], Collection):
        points = value.items[1].items
        if _sides(Named(form.name, value.items[0])) == ((form.name,), ()) and len(points) == 1:
            return Relation(form.name, r"\ne", points[0].text) if isinstance(points[0], Formula) else None
    return None


def _sides(form: Form) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return sides and operators of a chain, or of an interval with a name, `None` for any other form."""
    if isinstance(form, Chain):
        return form.sides, form.operators
    if not isinstance(form, Named) or not isinstance(form.value, Collection) or len(form.value.items) != 2:
        return None
    kind, (low, high) = form.value.kind, form.value.items
    if kind not in INTERVALS or not isinstance(low, Formula) or not isinstance(high, Formula):
        return None
    sides, operators = [form.name], []
    if low.text != r"-\infty":
        sides, operators = [low.text, *sides], ["<" if kind[0] == "(" else r"\le"]
    if high.text != r"\infty":
        sides, operators = [*sides, high.text], [*operators, "<" if kind[1] == ")" else r"\le"]
    return tuple(sides), tuple(operators)


def _equal_chains(gold: Form, answer: Form, comparison: FormulaComparison) -> Verdict:
    """
    Return whether two chains of inequalities are equivalent, link by link.

    They may run in opposite directions, as `-3<-x<-1` does.
    """
    if isinstance(answer, Chain) and set(answer.operators) == {"="} and not isinstance(gold, Chain | Named | Relation):
        return _all(_equal(gold, read(side), comparison) for side in answer.sides)
    if isinstance(gold, Chain) and set(gold.operators) == {"="} and not isinstance(answer, Chain | Named | Relation):
        return _all(_equal(read(side), answer, comparison) for side in gold.sides)
    a, b = _sides(gold), _sides(answer)
    if a is None or b is None or len(a[1]) != len(b[1]):
        return False
    links = [list(zip(sides, operators, sides[1:], strict=False)) for sides, operators in (a, b)]
    return _any(
        _all(map(_equal_links, links[0], other, [comparison] * len(other))) for other in (links[1], links[1][::-1])
    )


def _equal_links(a: tuple[str, str, str], b: tuple[str, str, str], comparison: FormulaComparison) -> Verdict:
    if a[1] != b[1]:
        return False
    scaled = comparison.proportional(f"({a[0]})-({a[2]})", f"({b[0]})-({b[2]})", a[1] not in ("=", r"\ne"))
    if scaled is True:
        return True
    return _any([scaled, _all(comparison.equal(x, y) for x, y in ((a[0], b[0]), (a[2], b[2])))])


def _with_name(form: Form, other: Form) -> Form:
    r"""
    Give a set the name of the only variable in an inequality: `(-\infty,3)` beside `2x<6`.

    Other forms are returned unchanged.
    """
    if not isinstance(form, Collection) or not isinstance(other, Relation | Chain):
        return form
    sides = (other.left, other.right) if isinstance(other, Relation) else other.sides
    letters = {token for side in sides for token in tokens(side) if len(token) == 1 and token.isalpha()}
    return Named(letters.pop(), form) if len(letters) == 1 else form


def _renamed(form: Form, names: dict[str, str]) -> Form | None:
    """
    Return a form with variables renamed.

    Returns `None` if it already contains a new name, or is not a formula, collection or named value.
    """
    if isinstance(form, Formula):
        taken = {letter for word in _WORD.findall(form.text) for letter in _letters_of(word)} - set(names)
        return None if taken & set(names.values()) else replace(form, text=_renamed_text(form.text, names))
    if isinstance(form, Collection):
        items = [_renamed(item, names) for item in form.items]
        return None if None in items else replace(form, items=tuple(item for item in items if item is not None))
    if isinstance(form, Named):
        value = _renamed(form.value, names)
        return None if value is None else Named(_renamed_text(form.name, names), value)
    return None


def _renamed_text(text: str, names: dict[str, str]) -> str:
    return _WORD.sub(lambda word: "".join(names.get(letter, letter) for letter in _letters_of(word[0])), text)


def _letters_of(word: str) -> list[str]:
    """Return the letters of a word. A control word or the name of a function stays whole."""
    return [word] if word[0] == "\\" or word in FUNCTION_WORDS else list(word)
