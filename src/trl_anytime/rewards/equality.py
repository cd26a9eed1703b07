r"""When two answers are equal, up to the comparison of two formulas, which is a parameter.

The structure (lists, sets, tuples, intervals, unions, matrices, equations, units, number bases, words, choices) is
compared here, in pure Python. Two formulas are compared by an object with two methods:

- `equal(a, b)`: whether two scalars have one value;
- `proportional(a, b, positive)`: whether a is a (positive) constant multiple of b, for equations (inequalities).

Each says True, False, or None for "cannot tell". `Exact` below knows plain numbers and is what runs in the training
process; `symbolic.Symbolic`, with sympy, runs in the workers.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from typing import Protocol

from .forms import (
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
    read,
)
from .latex import normalize, tokens

Verdict = bool | None


class FormulaComparison(Protocol):
    def equal(self, a: str, b: str) -> Verdict: ...

    def proportional(self, a: str, b: str, positive: bool) -> Verdict: ...


# Sets and matrices that may have to be computed: `\mathbb{R}\setminus\{0\}` is a union, `2A` a matrix.
_ALGEBRA = re.compile(r"\\(?:setminus|cap|mathbb)(?![A-Za-z])|matrix\}")

_CLOCK = re.compile(r"\s*([01]?\d|2[0-4])\s*:\s*([0-5]\d)\s*")  # a time of day: 7:00 is no ratio

_FUNCTION_HEAD = re.compile(r"(\S+) \( ([A-Za-z](?: , [A-Za-z])*) \)")  # as a name's tokens are joined
_WORD = re.compile(r"\\[A-Za-z]+|[A-Za-z]+")
_FUNCTION_WORDS = frozenset(
    ["ln", "lg", "log", "exp", "abs", "cbrt", "sec", "csc", "cot", "max", "min", "gcd", "lcm", "mod", "floor", "ceil"]
)

MIN_DECIMALS = 6
"""A decimal with at least that many places and significant digits equals an exact value that rounds to it."""


def rounds_to(value: Fraction, decimal: Fraction, places: int) -> bool:
    """Whether `decimal`, written with `places` digits behind the point, is `value` rounded."""
    half_unit = Fraction(1, 2 * 10**places)
    significant = abs(decimal) * 10**places >= 10 ** (MIN_DECIMALS - 1)
    return places >= MIN_DECIMALS and significant and abs(value - decimal) <= half_unit


class Exact:
    """Compares formulas that are plain numbers or have the same tokens; says None for all others."""

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
    r"""Whether an answer equals a gold answer.

    Args:
        gold (`str`):
            The right answer. `a \approx b` in it offers both values.
        answer (`str`):
            What the model wrote in the box. `a \approx b` in it claims a.
        comparison (`FormulaComparison`):
            How formulas are compared.

    Returns:
        `bool` or `None`: None if the comparison cannot tell, or if the answer is nested too deeply to be looked at.
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
    claimed = read(normal_answer)
    alternatives = [part for part in normal_gold.split(r"\approx") if part.strip()]
    verdict = _any(_equal(read(part), claimed, comparison) for part in alternatives)
    if verdict is False and (_ALGEBRA.search(normal_gold) or _ALGEBRA.search(normal_answer)):
        return comparison.equal(normal_gold, normal_answer)
    return verdict


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
    if isinstance(gold, Named | Relation) and isinstance(answer, Named | Relation):
        return _equal_relations(gold, answer, comparison)
    if isinstance(gold, Named):
        # `x+y=1` is more than 1, `\text{Area}=1` is not.
        return not {"+", "-"} & set(gold.name.split()) and _equal(gold.value, answer, comparison)
    if isinstance(answer, Named):
        return _equal(gold, answer.value, comparison)
    if isinstance(gold, Formula) and isinstance(answer, Relation) and answer.operator == "=":
        # `\frac34 = 0.75`: right if both sides are. A side that is an equation again is not read on and on.
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
        return _all(
            _equal(a, b, comparison)
            for row_a, row_b in zip(gold.rows, answer.rows, strict=True)
            for a, b in zip(row_a, row_b, strict=True)
        )
    if isinstance(gold, Formula) and isinstance(answer, Collection):
        return _equal_digit_groups(gold, answer)
    if isinstance(gold, Collection) and isinstance(answer, Formula):
        return _equal_digit_groups(answer, gold)
    return False


def _letters(form: Form) -> str:
    """Letters of words, a choice or a formula that has nothing else, in lower case; `""` for any other form."""
    if isinstance(form, Words):
        return form.text
    if isinstance(form, Choice):
        return form.letter.casefold()
    if isinstance(form, Formula) and form.text.replace(" ", "").isalpha():
        return form.text.casefold()
    return ""


def _equal_formulas(gold: Formula, answer: Formula, comparison: FormulaComparison) -> Verdict:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    if ":" in gold.text or ":" in answer.text:
        return _equal_ratios(gold.text, answer.text, comparison)
    verdict = comparison.equal(gold.text, answer.text)
    if verdict is True or gold.percent == answer.percent:
        return verdict
    # One of the two is in per cent: 17% is right both for 17 and for 0.17.
    a, b = (f"\\frac{{{form.text}}}{{100}}" if form.percent else form.text for form in (gold, answer))
    return _any([verdict, comparison.equal(a, b)])


def _equal_ratios(gold: str, answer: str, comparison: FormulaComparison) -> Verdict:
    """Whether two ratios or times are equal; a ratio of two numbers is also their quotient."""
    if _CLOCK.fullmatch(gold) and _CLOCK.fullmatch(answer):
        return comparison.equal(gold, answer)
    a, b = gold.split(":"), answer.split(":")
    if len(a) == len(b) > 2:
        return _all(comparison.equal(f"({x})*({b[0]})", f"({y})*({a[0]})") for x, y in zip(a[1:], b[1:], strict=True))
    if max(len(a), len(b)) > 2:
        return False
    quotients = [rf"\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 else parts[0] for parts in (a, b)]
    return comparison.equal(*quotients)


def _equal_digit_groups(number: Formula, items: Collection) -> bool:
    """Whether a list such as `100, 200` is the digits of 100200: both are written `100,200`."""
    groups = [item.text for item in items.items if isinstance(item, Formula)]
    return (
        items.kind == ""
        and len(groups) == len(items.items)
        and all(group.isdecimal() and len(group) == 3 for group in groups[1:])
        and "".join(groups) == number.text
    )


def _equal_collections(gold: Collection, answer: Collection, comparison: FormulaComparison) -> Verdict:
    if gold.kind == answer.kind or {gold.kind, answer.kind} == {"", "{}"}:
        ordered = gold.kind not in ("", "{}", "cup")
    elif {gold.kind, answer.kind} == {"", "()"}:
        ordered = True  # a tuple without its brackets
    else:
        return False
    a, b = gold.items, answer.items
    if "{}" in (gold.kind, answer.kind):
        a, b = tuple(dict.fromkeys(a)), tuple(dict.fromkeys(b))
    if len(a) != len(b):
        return False
    if ordered:
        return _all(_equal(x, y, comparison) for x, y in zip(a, b, strict=True))
    return _equal_in_any_order(a, list(b), comparison)


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
    # Whatever is left, on either side, needs a partner that it may be equal to
    return None if all(None in verdicts for verdicts in [*left, *zip(*left, strict=True)]) else False


def _equal_relations(gold: Named | Relation, answer: Named | Relation, comparison: FormulaComparison) -> Verdict:
    if isinstance(gold, Named) and isinstance(answer, Named):
        answer = _with_variables_of(gold, answer)
        if gold.name == answer.name:
            return _equal(gold.value, answer.value, comparison)
        if not (isinstance(gold.value, Formula) and isinstance(answer.value, Formula)):
            return False
    a, b = _as_relation(gold), _as_relation(answer)
    if a is None or b is None or a.operator != b.operator:
        return False
    return comparison.proportional(
        f"({a.left})-({a.right})", f"({b.left})-({b.right})", a.operator not in ("=", "\\ne")
    )


def _with_variables_of(gold: Named, answer: Named) -> Named:
    """`f(t)=t^2` as `f(x)=x^2` if the gold defines f(x); the answer itself if that cannot be."""
    heads = _FUNCTION_HEAD.fullmatch(gold.name), _FUNCTION_HEAD.fullmatch(answer.name)
    if not (heads[0] and heads[1] and heads[0][1] == heads[1][1] and isinstance(answer.value, Formula)):
        return answer
    wanted, given = heads[0][2].split(" , "), heads[1][2].split(" , ")
    text = answer.value.text
    captured = {letter for word in _WORD.findall(text) for letter in _variables(word)} & set(wanted) - set(given)
    if len(wanted) != len(given) or len(set(given)) != len(given) or captured:
        return answer
    letters = dict(zip(given, wanted, strict=True))
    text = _WORD.sub(lambda word: "".join(letters.get(letter, letter) for letter in _variables(word[0])), text)
    return Named(gold.name, replace(answer.value, text=text))


def _variables(word: str) -> list[str]:
    """Letters of a word; a control word, or the name of a function, is kept whole."""
    return [word] if word[0] == "\\" or word in _FUNCTION_WORDS else list(word)


def _as_relation(form: Named | Relation) -> Relation | None:
    if isinstance(form, Relation):
        return form
    return Relation(form.name, "=", form.value.text) if isinstance(form.value, Formula) else None
