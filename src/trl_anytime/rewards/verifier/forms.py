r"""Forms of an answer: a number, words, a choice, a list, an interval, a matrix, an equation, or another formula.

`read` turns an answer into one of the small dataclasses below. Formulas stay strings. They are compared as exact
fractions (`as_fraction`) or, in a worker process, by value.

This package has its own stage for this because libraries read formulas, not answers. Their parsers drop units, read
words as products of letters, keep one equation of several, and join coordinates to thousands. They do not distinguish
a choice from a variable, or the base of a number from an index. The stage runs in the training process. Its time is
linear in the length, except for lists in any order.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .latex import PLAIN, TOKEN, tokens


@dataclass(frozen=True)
class Formula:
    """Scalar: its text, its unit (`None` for none or an unknown one), and whether it had a percent sign."""

    text: str
    unit: str | None = None
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """Text such as a name or `even`, in lower case, with one space between words."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter marked as a choice, as in `(B)`."""

    letter: str


@dataclass(frozen=True)
class BasedNumber:
    """Digits with the number base as index: `52_8`. Base 10 is never kept."""

    digits: str
    base: int


@dataclass(frozen=True)
class Matrix:
    """Rows of the forms of a matrix or vector."""

    rows: tuple[tuple["Form", ...], ...]


@dataclass(frozen=True)
class Collection:
    r"""Several answers. The order counts only for pairs of brackets, quantities and lists with an ellipsis.

    `kind` is one of these:

    - the pair of brackets for tuples and intervals (`"()"`, `"[)"`, …),
    - `"{}"` for sets,
    - `""` for a bare list,
    - `"cup"`, `"cap"` and `"minus"` for unions, intersections and differences,
    - `"or"` for what may be a list of points or a union of intervals,
    - `"cases"` for a function by cases (tuples of value and condition),
    - `"quantity"` for `4 hours 10 minutes`.
    """

    kind: str
    items: tuple["Form", ...]


@dataclass(frozen=True)
class Named:
    r"""A value with a name: `x=5`, `f(x)=2x`, `x\in[1,2]`, `1<x<2` (an interval named x)."""

    name: str
    value: "Form"


@dataclass(frozen=True)
class Relation:
    r"""Any other equation or inequality, turned so that `operator` is `=`, `<`, `\le` or `\ne`.

    `left` is empty if there is none, as in `\ne 5`.
    """

    left: str
    operator: str
    right: str


@dataclass(frozen=True)
class Chain:
    r"""Any other chain of inequalities, turned so that its operators are `<`, `\le` or `=`."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


INTERVALS = ("()", "(]", "[)", "[]")
Form = Formula | Words | Choice | BasedNumber | Matrix | Collection | Named | Relation | Chain

# Units that are told apart: `10 cm` is not `10 m`. Other words after a number say what was counted and are dropped.
_UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm, millimeter, millimetre",
        "cm": "cm, centimeter, centimetre",
        "dm": "dm, decimeter, decimetre",
        "m": "m, meter, metre",
        "km": "km, kilometer, kilometre",
        "in": "in, inch, inches",
        "ft": "ft, foot, feet",
        "yd": "yd, yard",
        "mi": "mi, mile",
        "s": "s, sec, second",
        "ms": "ms, millisecond",
        "min": "min, minute",
        "h": "h, hr, hour",
        "day": "day",
        "week": "wk, week",
        "month": "month",
        "year": "yr, year",
        "mg": "mg, milligram",
        "g": "g, gram",
        "kg": "kg, kilogram",
        "lb": "lb, pound",
        "oz": "oz, ounce",
        "ml": "ml, milliliter, millilitre",
        "l": "l, liter, litre",
        "gal": "gal, gallon",
        "mol": "mol, mole",
        "n": "newton",
        "j": "joule",
        "w": "watt",
        "v": "volt",
        "a": "ampere, amp",
        "k": "kelvin",
        "hz": "hz, hertz",
        "pa": "pa, pascal",
        "h^-1 mi": "mph",
        "h^-1 km": "kmh, kph",
        "degree": "deg, degree",
        "celsius": "celsius, degrees celsius, degree celsius",
        "fahrenheit": "fahrenheit, degrees fahrenheit, degree fahrenheit",
        "radian": "rad, radian",
        "dollar": "dollar, usd",
        "cent": "cent",
        "euro": "euro, eur",
        "yen": "yen",
        "rupee": "rupee, rs, rs., inr",
        "am": "am, a.m",
        "pm": "pm, p.m",
    }.items()
    for name in names.split(", ")
}
# Symbols that are units in upright type only: `5mA` is a product. A capital counts: `\text{mW}` is not `\text{MW}`.
_SYMBOLS = {
    **{"A": "ampere", "J": "joule", "K": "kelvin", "N": "newton", "V": "volt", "W": "watt"},
    **{"Hz": "hertz", "Pa": "pascal"},
}
_PREFIXES = {"n": "nano", "m": "milli", "k": "kilo", "M": "mega", "G": "giga"}
_UNITS |= {prefix + unit: prefix + unit for prefix in _PREFIXES.values() for unit in _SYMBOLS.values()}
_SYMBOL = re.compile(rf"(?<![A-Za-z\\])([{''.join(_PREFIXES)}]?)({'|'.join(_SYMBOLS)})(?![A-Za-z])")
# Words after a number that change its meaning: `5 or more` is not 5.
_NO_UNITS = re.compile(
    r"\b(?:or|and|more|less|fewer|least|most|not|than|over|under|plus|minus|times|half|dozen|mod|base|to|only)\b"
)
_FAMILIES = (
    ("year", "month", "week", "day", "h", "min", "s"),
    ("mi", "yd", "ft", "in"),
    ("km", "m", "cm", "mm"),
    ("lb", "oz"),
    ("kg", "g"),
    ("dollar", "cent"),
)
_CONTINUATION = re.compile(r"\s*(?:[=<>]|\\[lg]e(?![A-Za-z]))")
_CONDITION = re.compile(r"[=<>]|\\(?:le|ge|ne|in|text)(?![A-Za-z])|\b(?:if|otherwise|when|for|even|odd)\b")
_CONDITION_WORDS = re.compile(r"\\text\s*\{[\s,]*(?:if|when|for|where|is)\s*\}|\b(?:if|when|for|where)\b")
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_MAX_DEPTH = 20  # of brackets in brackets: far above any answer, far below Python's recursion limit

_OPENING, _CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_LIST_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}"}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne"}
_MATRIX = re.compile(
    r"\\begin\s*\{([pbB]?(?:small)?matrix|array)\}((?:(?!\\end\s*\{(?:\1)\}).)*)\\end\s*\{\1\}(\^\s*\{?\s*(?:T|\\top)\s*\}?)?"
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|(?<![\d.,\s])[1-9]\d{0,2}(?: \d{3})+(?! ?\d)")
_LINES = re.compile(
    r"(?:\\\{\s*)?\\begin\s*\{(cases|dcases|rcases|aligned|align\*?|gathered|split|array)\}(.*)\\end\s*\{\1\}"
)
_BASED = re.compile(
    r"\(?\s*([-+]?\s*[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\s*\)?\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(?:base[\s-]*)?\}?\s*(\d{1,2}|[a-z]+)[\s}]*"
)
# Words of up to three letters that are answers. Other short ones are products unless they look like a syllable.
_SHORT_WORDS = re.compile(
    "yes|no|on|off|up|odd|one|two|six|ten|all|any|day|dry|sky|sea|tie|win|add|end|arc|pie|egg|ice|dne|jan|"
    "feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|mon|tue|wed|thu|fri|sat|sun|asa|sas|aas|ssa|sss|ada|ali|"
    "amy|ann|ari|ava|ben|eli|eva|eve|ian|ida|ira|ivy|jay|joe|joy|kai|kay|lea|lee|leo|lou|mia|noa|roy|ray|"
    "sue|una|zoe|"
    "ace|age|aid|ape|are|ash|ate|ear|eat|ego|ice|ore|owe|pea|roe|tea|toe|use|woe"
)
# Names of functions in plain text, besides those that `normalize` turns into control words
FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "log ln lg exp abs cbrt floor ceil sinh cosh tanh gcd lcm max min mod det arg sec csc cot")
)
_VOWEL = re.compile("[aeiouy]")
_SYLLABLE = re.compile("[^aeiou][aeiou][^aeiou]")
_TEXT_PIECE = re.compile(r"\\text\s*\{([^{}]*)\}")
_TEXT_WITH_NUMBER = re.compile(r"\\text\s*\{\s*([-+]?\d[^{}]*)\}")
_BARE_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9'’.:\- ]*")
_POWER_OF_UNIT = r"(?:\s*\^\s*(?:\{\s*[-+]?\d\s*\}|[-+]?\d))?"
_TEXT_ATOM = r"\\text\s*\{[^{}]*\}" + _POWER_OF_UNIT
_TEXT_UNIT = re.compile(
    rf"(.*?[^\s+\-*/^=,(\[{{])\s*({_TEXT_ATOM}(?:\s*[/*]\s*(?:{_TEXT_ATOM}|[A-Za-z]+{_POWER_OF_UNIT})|\s*{_TEXT_ATOM})*)"
)
_BARE_ATOM = r"[A-Za-z](?:[A-Za-z. ]*[A-Za-z.])?" + _POWER_OF_UNIT
_BARE_UNIT = re.compile(rf"(.*[\d}})])\s*(?<![A-Za-z\\])({_BARE_ATOM}(?:\s*[/*]\s*{_BARE_ATOM})*)")
_BARE_WORD_UNITS = re.compile(r"[A-Za-z][A-Za-z/. ]{3,}")
_SPACED_LETTER = re.compile(r"(.*[\d})])\s+([AJKLNVWghms](?:\s*/\s*[A-Za-z]{1,2}(?:\s*\^\s*(?:\{\s*\d\s*\}|\d))?)?)")
_COUNT = re.compile(r"[-+]?[\d., ]*\d|[-+]?\\frac\{\d+\}\{\d+\}|\d+/\d+")
_CURRENCY_FIRST = re.compile(r"([-+]?)\s*\\(dollar|euro|pound|yen|rupee)(?![A-Za-z])\s*(.+)")
_CURRENCY_LAST = re.compile(r"(.+?)\s*\\(dollar|euro|pound|yen|rupee)")
_DEGREES = re.compile(r"(.+?)\s*\^\s*\\circ(?:\s*\\text\s*\{\s*([CF])[a-z]*\s*\}|\s*([CF]))?")
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*(?:\\text\s*\{\s*([A-Za-z]+)[\s,]*(?:and)?\s*\}|([A-Za-z]+))[\s,]*")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_SIMPLE_NAME = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_(?:\{[^{}]*\}|\w))?'*(?:\([A-Za-z, ]*\))?")
_ABSOLUTE_VALUE = re.compile(r"\|\s*([A-Za-z])\s*\|")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_CONGRUENCE = re.compile(
    r"(.+?)\\equiv\s*(.+?)\s*[,(]*\s*(?:\\p?mod|\\bmod|\\text\s*\{\s*mod\s*\}|mod)(?![A-Za-z])\s*\{?\s*([^{}()]+?)\s*\}?[\s)]*"
)
_RESIDUE = re.compile(
    r"()(-?\d+)\s*(?:\\pmod\s*\{?|\(\s*(?:\\?mod|\\text\s*\{\s*mod\s*\})|\\text\s*\{\s*\(\s*mod\s*\})\s*(\d+)\s*\}?\)?"
)
_OUTWARD = re.compile(r"([\[\]])([^\[\]]*)([\[\]])")
_LETTER = re.compile("[A-Za-z]")
_ARITHMETIC = re.compile(r"(?:[\d\s.+\-*/^(){}!]|\\(?:frac|sqrt|pi|binom)(?![A-Za-z]))+")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)")
_FUNCTION_CALL = re.compile(r"[A-Za-z]\s*(?:\^\s*\{\s*-1\s*\}|'+)?\s*\(.*\)")


_REALS = Collection("()", (Formula(r"-\infty"), Formula(r"\infty")))
_EMPTY_SET = Collection("{}", ())
_POSITIVE = Collection("()", (Formula("0"), Formula(r"\infty")))
_NAMED_SETS: dict[str, "Form"] = {
    r"\mathbb{R}": _REALS,
    r"\emptyset": _EMPTY_SET,
    **dict.fromkeys((rf"\mathbb{{R}}{mark}" for mark in ("^+", "^{+}", "_+", "_{+}", "_{>0}")), _POSITIVE),
    **dict.fromkeys(
        (rf"\mathbb{{Z}}{mark}" for mark in ("^+", "^{+}", "_+", "_{+}", "_{>0}")), Formula(r"\mathbb{N}")
    ),
}
_SETS_IN_WORDS: tuple[tuple[re.Pattern[str], "Form"], ...] = (
    (re.compile(r"(?:x is |the set of )?(?:all|any) (?:the )?reals?(?: numbers?)?(?: x)?"), _REALS),
    (re.compile(r"(?:the set of )?all (?:the )?integers"), Formula(r"\mathbb{Z}")),
    (re.compile(r"(?:the set of )?all (?:the )?(?:positive integers|natural numbers)"), Formula(r"\mathbb{N}")),
    (re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?|(?:the )?empty set"), _EMPTY_SET),
)


@lru_cache(maxsize=512)  # as for `normalize`
def read(text: str) -> Form:
    """Read one answer, as [`normalize`] returns it, of at most a few thousand characters."""
    return Formula(text) if PLAIN.fullmatch(text) else _read(text, 0)


def _read(text: str, depth: int) -> Form:
    text = text.strip(" ,;:").removeprefix("=").lstrip()
    if depth > _MAX_DEPTH:
        return Formula(text)
    if match := _TEXT_WITH_NUMBER.fullmatch(text):
        text = match[1].strip()
    if r"\approx" in text:  # `\frac23 \approx 0.67` claims its first value
        text = next(filter(None, _parts(text, {r"\approx"})), text)
    if (words := _as_words(text)) is not None:
        return _read_words(words)
    if match := re.fullmatch(r"\(\s*([A-Za-z])\s*\)|([A-Z])\s*\)", text):
        return Choice((match[1] or match[2]).upper())
    if (match := _OUTWARD.fullmatch(text)) and (match[1] == "]" or match[3] == "["):  # `]1,2]` is `(1,2]`
        text = ("(" if match[1] == "]" else "[") + match[2] + (")" if match[3] == "[" else "]")
    if r"\equiv" in text and (match := _CONGRUENCE.fullmatch(text)):
        return _read_congruence(match)
    if "mod" in text and (match := _RESIDUE.fullmatch(text)):
        return _read_congruence(match)
    if match := _MATRIX.fullmatch(text):
        return _read_matrix(match, depth)
    if (match := _LINES.fullmatch(text)) and (lines := _read_lines(match[2], depth)) is not None:
        return lines
    if match := _BASED.fullmatch(text):
        digits = match[1].replace(" ", "").removeprefix("+")
        base = int(match[2]) if match[2].isdigit() else _BASE_WORDS.get(match[2], 0)
        if digits.lstrip("-")[0].isdigit() and 2 <= base <= 36:
            return Formula(digits) if base == 10 else BasedNumber(digits.upper(), base)
    return _read_parts(_join_thousands(text) if depth == 0 else text, depth)


def _read_parts(text: str, depth: int) -> Form:
    """Read a list, a quantity, a relation, a set or a formula."""
    for separators in ({";"}, {",", r"\lor"}):
        parts = [part for part in _split(text, separators) if part[0] and not part[0].startswith(r"\forall")]
        if len(parts) > 1:
            return _read_list(text, parts, depth)
        text = parts[0][0] if parts else text
    if quantity := _read_quantity(text):
        return quantity
    relation = _read_relation(text, depth)
    if relation is not None:
        return relation
    for separator, kind in ((r"\cup", "cup"), (r"\setminus", "minus"), (r"\cap", "cap")):
        operands = _parts(text, {separator})
        if len(operands) > 1 and (kind != "minus" or len(operands) == 2):
            return Collection(kind, _read_all(operands, depth))
    if (named_set := _NAMED_SETS.get(text.replace(" ", ""))) is not None:
        return named_set
    if brackets := _outer_brackets(text):
        return _read_brackets(text, brackets, depth)
    if _PLUS_MINUS.search(text):
        return Collection("", _read_items([text], depth))
    return _read_formula(text)


def _read_all(texts: Iterable[str], depth: int) -> tuple[Form, ...]:
    return tuple(_read(text, depth + 1) for text in texts)


def unnamed(form: Form) -> Form:
    """Return the value of a named form, and any other form unchanged."""
    return form.value if isinstance(form, Named) else form


def _read_congruence(match: re.Match[str]) -> Form:
    r"""
    Read `x \equiv 10 \pmod 7` as the value 3, named by `x` and `7`.

    `10 \pmod 7` is named by `7` alone.
    """
    name, value, modulus = _name(match[1]), match[2].strip(), match[3]
    if re.fullmatch(r"-?\d{1,99}", value) and re.fullmatch(r"[1-9]\d{0,98}", modulus):
        value = str(int(value) % int(modulus))
    return Named(rf"{name} \equiv {_name(modulus)}", Formula(value))


def _read_words(words: str) -> Form:
    """Read words, several of them, or a set that they describe."""
    for pattern, form in _SETS_IN_WORDS:
        if pattern.fullmatch(words):
            return form
    several = [part for part in re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", words) if part]
    return Words(words) if len(several) < 2 else Collection("", tuple(map(Words, several)))


def _join_thousands(text: str) -> str:
    """
    Join digits across commas or spaces.

    In brackets a comma may separate coordinates. There, digits are joined only if a comma or semicolon has a
    space after it.
    """
    out = []
    level = start = 0
    for match in TOKEN.finditer(text):
        if match[0] in _LIST_BRACKETS:
            if level == 0:
                out.append(_THOUSANDS.sub(_without_separators, text[start : match.start()]))
                start = match.start()
            level += 1
        elif match[0] in _LIST_BRACKETS.values() and level:
            level -= 1
            if level == 0:
                part = text[start : match.end()]
                out.append(_THOUSANDS.sub(_without_separators, part) if re.search(r"[,;] ", part) else part)
                start = match.end()
    rest = text[start:]
    return "".join(out) + (_THOUSANDS.sub(_without_separators, rest) if level == 0 else rest)


def _without_separators(match: re.Match[str]) -> str:
    return re.sub("[, ]", "", match[0])


def digit_groups(text: str) -> Collection | None:
    """
    Return the values that `100,200` has, in this order, if it is not the number 100200.

    Returns `None` for any other text.
    """
    if not re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+", text):
        return None
    return Collection("()", tuple(Formula(group) for group in text.split(",")))


def _read_list(text: str, parts: list[tuple[str, str]], depth: int) -> Form:
    """Read a list, or what its items make together: a union, intersection, quantity or assignments."""
    separators = {separator for _, separator in parts[:-1]}
    if separators == {",", r"\lor"}:  # `x>0, x<2 \lor x>5`
        options = _read_all(_parts(text, {r"\lor"}), depth)
        if all(map(_is_set, options)):
            return _union(options) or Collection("", options)
    items = _read_items([item for item, _ in parts], depth)
    if r"\lor" in separators:
        return _union(items) or Collection("or" if all(map(_is_set, items)) else "", _assignments(items))
    return _intersection(items) or _quantity(items) or Collection("", _assignments(items))


def _union(items: tuple[Form, ...]) -> Form | None:
    """
    Return the union of intervals and points in one variable.

    Returns `None` if there are no intervals and points, or if all may be points.
    """
    names = {item.name for item in items if isinstance(item, Named)}
    if len(names) > 1 or not any(_is_set(item) and not _may_be_point(item) for item in items):
        return None
    sets = map(unnamed, items)
    values = tuple(Collection("{}", (value,)) if isinstance(value, Formula) else value for value in sets)
    if not all(map(_is_set, values)):
        return None
    union = Collection("cup", values)
    return Named(names.pop(), union) if names else union


def _intersection(items: tuple[Form, ...]) -> Form | None:
    r"""
    Return the set that `x>0, x<2` or `x>0, x \ne 3` describe together for one variable.

    Returns `None` for other lists.
    """
    points: list[Form] = []
    rest: list[Form] = []
    for item in items:
        excluded = _excluded(item)
        if excluded is not None:
            points += excluded
        elif points and isinstance(item, Formula) and not rest:  # `x \ne 1, 2`
            points.append(item)
        else:
            rest.append(item)
    names = {item.name for item in items if isinstance(item, Named)}
    values = [item.value for item in rest if isinstance(item, Named)]
    if len(names) != 1 or len(values) != len(rest) or not all(_is_interval(value) for value in values):
        return None
    whole: Form | None = _REALS if not values else values[0] if len(values) == 1 else None
    if len(values) == 2:
        whole = _meet(*values) or _meet(*reversed(values))
    if whole is None or (not points and len(values) < 2):
        return None
    return Named(names.pop(), Collection("minus", (whole, Collection("{}", tuple(points)))) if points else whole)


def _excluded(form: Form) -> tuple[Form, ...] | None:
    r"""Return the points that `x \ne a` excludes, or `None` for any other form."""
    if isinstance(form, Named) and isinstance(form.value, Collection) and form.value.kind == "minus":
        whole, points = form.value.items
        if whole == _REALS and isinstance(points, Collection) and points.kind == "{}":
            return points.items
    return None


def _meet(below: Form, above: Form) -> Form | None:
    r"""
    Return the interval of `x>a` and `x<b`, in this order.

    Returns `None` if they are not of this kind or the interval is certainly empty.
    """
    assert isinstance(below, Collection) and isinstance(above, Collection)
    if below.items[1] != Formula(r"\infty") or above.items[0] != Formula(r"-\infty"):
        return None
    ends = [as_fraction(end.text) for end in (below.items[0], above.items[1]) if isinstance(end, Formula)]
    if len(ends) == 2 and ends[0] is not None and ends[1] is not None and ends[0] > ends[1]:
        return None
    return Collection(below.kind[0] + above.kind[1], (below.items[0], above.items[1]))


def _assignments(items: tuple[Form, ...]) -> tuple[Form, ...]:
    """
    Group items into solutions: `p=5, q=2, p=7, q=2` becomes two lists.

    Names that repeat mean several solutions. Other items are returned unchanged.
    """
    names = [item.name if isinstance(item, Named) else None for item in items]
    period = len(set(names))
    if None in names or not 1 < period < len(items) or names != names[:period] * (len(items) // period):
        return items
    return tuple(Collection("", items[start : start + period]) for start in range(0, len(items), period))


def _quantity(items: tuple[Form, ...]) -> Form | None:
    """Read `4 hours, 10 minutes`: units of one kind, from the largest to the smallest."""
    units = [item.unit if isinstance(item, Formula) else None for item in items]
    for family in _FAMILIES:
        places = [family.index(unit) for unit in units if unit in family]
        if len(places) == len(units) and places == sorted(set(places)):
            return Collection("quantity", items)
    return None


def _read_quantity(text: str) -> Form | None:
    """Read `4 hours 10 minutes`, without a comma."""
    items = []
    position = 0
    while match := _QUANTITY.match(text, position):
        items.append(Formula(match[1], _unit(match[2] or match[3])))
        position = match.end()
    return _quantity(tuple(items)) if position == len(text) and len(items) > 1 else None


def _is_set(form: Form) -> bool:
    """Return whether a form may be a set of real numbers."""
    value = unnamed(form)
    return isinstance(value, Collection) and (value.kind in ("cup", "cap", "minus", "or", "{}") or _is_interval(value))


def _may_be_point(form: Form) -> bool:
    """Return whether an interval without a name may also be one or several points of a plane."""
    if not isinstance(form, Collection):
        return False
    if form.kind == "or":
        return all(map(_may_be_point, form.items))
    return form.kind == "()" and not any(isinstance(item, Formula) and r"\infty" in item.text for item in form.items)


def _read_lines(body: str, depth: int) -> Form | None:
    """Read the lines of `cases` or `aligned`: a function by cases, or equations that hold together."""
    body = re.sub(r"^\s*\{[lcr|\s]*\}", "", body)
    rows: list[list[str]] = []
    for row in _parts(body, {r"\cr"}):
        cells = _parts(row, {"&"})
        if len(cells) > 1 and any(cells) and cells[0] == "" and rows and _CONTINUATION.match(cells[1]):
            rows[-1].append("".join(cells))
        elif any(cells):
            rows.append(cells)
    if rows and all(len(row) == 2 and _CONDITION.search(row[1]) and not _CONTINUATION.match(row[1]) for row in rows):
        branches = [(row[0].strip(" ,"), _CONDITION_WORDS.sub(" ", row[1]).strip(" ,.")) for row in rows]
        return Collection("cases", tuple(Collection("()", _read_all(branch, depth)) for branch in branches))
    lines = ["".join(row) for row in rows]
    return _read_list(", ".join(lines), [(line, ",") for line in lines], depth) if lines else None


def _is_interval(form: Form) -> bool:
    value = unnamed(form)
    return isinstance(value, Collection) and value.kind in INTERVALS


def _top_level(text: str) -> Iterator[re.Match[str]]:
    """
    Yield the tokens outside all brackets and braces.

    An opening bracket is included, its closing one is not.
    """
    level = 0
    for match in TOKEN.finditer(text):
        if match[0] in _CLOSING or match[0] == r"\end":
            level -= 1
        elif level == 0:
            yield match
        if match[0] in _OPENING or match[0] == r"\begin":
            level += 1


def _split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """
    Split at separators outside all brackets.

    Returns each part with the separator after it (`""` for the last).
    """
    parts = []
    start = 0
    for match in _top_level(text):
        if match[0] in separators:
            parts.append((text[start : match.start()].strip(), match[0]))
            start = match.end()
    return [*parts, (text[start:].strip(), "")]


def _parts(text: str, separators: set[str]) -> list[str]:
    """Return the parts between separators outside all brackets."""
    return [part for part, _ in _split(text, separators)]


def _outer_brackets(text: str) -> tuple[str, str] | None:
    """Return the pair of brackets around the whole text, or `None` if there is none."""
    level = 0
    opening = None
    for match in TOKEN.finditer(text):
        if match[0] in _OPENING:
            level += 1
            opening = opening or match[0]
        elif match[0] in _CLOSING:
            level -= 1
        if opening is None or level < 0:
            return None
        if level == 0:
            return (opening, match[0]) if match.end() == len(text) else None
    return None


def _read_brackets(text: str, brackets: tuple[str, str], depth: int) -> Form:
    opening, closing = brackets
    inner = text[len(opening) : -len(closing)].strip()
    if brackets == ("{", "}"):
        return _read(inner, depth + 1)
    items = _parts(inner, {",", ";"})
    if brackets == (r"\{", r"\}"):
        bar = next((token for token in _top_level(inner) if token[0] in {"|", r"\mid", ":"}), None)
        if bar is not None:
            return _read_condition(inner[: bar.start()], inner[bar.end() :], depth) or Formula(text)
        return Collection("{}", _read_items(items, depth))
    if len(items) == 1 and (brackets == ("(", ")") or _MATRIX.fullmatch(inner)):
        return _read(inner, depth + 1)
    if opening in "([" and closing in ")]" and len(items) > 1:
        return Collection(opening + closing, _read_all(items, depth))
    return _read_formula(text)


def _read_condition(variable: str, condition: str, depth: int) -> Form | None:
    r"""
    Read the set of `\{x \mid condition\}`.

    Returns `None` if the condition does not describe a set of real numbers.
    """
    match = re.fullmatch(r"\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?,?\s*", variable)
    form = _read(condition, depth + 1)
    if match and isinstance(form, Named) and form.name == match[1] and _is_set(form):
        return form.value
    return None


def _read_items(items: list[str], depth: int) -> tuple[Form, ...]:
    r"""Read the items of a list or set. Empty ones are dropped, and `a \pm b` becomes two."""
    forms = []
    for item in items:
        if _PLUS_MINUS.search(item):
            for plus, minus in (("+", "-"), ("-", "+")):
                signed = re.sub(r"\\pm(?![A-Za-z])", plus, re.sub(r"\\mp(?![A-Za-z])", minus, item))
                forms.append(_read(signed, depth + 1))
        elif item:
            forms.append(_read(item, depth + 1))
    return tuple(forms)


def _read_matrix(match: re.Match[str], depth: int) -> Form:
    body = re.sub(r"^\s*\{[lcr|\s]*\}", "", match[2]).replace(r"\hline", "")
    cells = [_read_all(_parts(row, {"&"}), depth) for row in _parts(body, {r"\cr"}) if row]
    if all(len(row) == 1 and isinstance(row[0], Named | Relation) for row in cells):  # a system of equations
        return Collection("", tuple(row[0] for row in cells))
    if match[3] and len({len(row) for row in cells}) == 1:
        cells = list(zip(*cells, strict=True))
    return Matrix(tuple(cells))


def _read_relation(text: str, depth: int) -> Form | None:
    parts = _split(text, _RELATIONS | {r"\in", r"\notin"})
    if len(parts) == 2 and parts[0] == ("", r"\ne") and parts[1][0]:
        return Relation("", r"\ne", parts[1][0])
    if len(parts) == 1 or not all(part for part, _ in parts):
        return None
    sides = [part for part, _ in parts]
    operators = [operator for _, operator in parts[:-1]]
    if operators == [r"\in"]:
        return Named(_name(sides[0]), _read(sides[1], depth + 1))
    if operators in ([r"\ne"], [r"\notin"]) and _SIMPLE_NAME.fullmatch(sides[0]):
        excluded = _read_excluded(sides[1], depth)
        if excluded is not None:
            return Named(_name(sides[0]), Collection("minus", (_REALS, excluded)))
    if set(operators) == {"="}:
        value = _read(sides[-1], depth + 1)
        names = _names_of_tuple(sides[0])
        if names and isinstance(value, Collection) and value.kind == "()" and len(names) == len(value.items):
            return Collection("", tuple(map(Named, names, value.items)))  # `(x,y)=(1,2)`
        if len(sides) > 2 and len(set(sides[:-1])) == len(sides) - 1 and all(map(_LETTER.fullmatch, sides[:-1])):
            return Collection("", tuple(Named(side, value) for side in sides[:-1]))  # `x=y=2`
        if _is_name(sides[0]):
            # `x = 2+3 = 5` is right if all of it is. Parts with letters, such as a rule that is applied, are trusted.
            steps = tuple(side for side in sides[1:-1] if _ARITHMETIC.fullmatch(side))
            return Named(_name(sides[0]), Chain((*steps, sides[-1]), ("=",) * len(steps)) if steps else value)
        if len(sides) == 2 and _SIMPLE_NAME.fullmatch(sides[1]):
            return Named(_name(sides[1]), _read(sides[0], depth + 1))
        return Relation(sides[0], "=", sides[-1]) if len(sides) == 2 else Chain(tuple(sides), tuple(operators))
    if set(operators) <= {">", r"\ge", "="}:
        sides.reverse()
        operators = [{">": "<", r"\ge": r"\le", "=": "="}[operator] for operator in reversed(operators)]
    if set(operators) <= {"<", r"\le"}:
        interval = _as_interval(sides, operators, depth)
        if interval is not None:
            return interval
    if len(sides) == 2 and operators[0] in {"<", r"\le", r"\ne"}:
        return Relation(sides[0], operators[0], sides[1])
    return Chain(tuple(sides), tuple(operators)) if set(operators) <= {"<", r"\le", "="} else Formula(text)


def _read_excluded(text: str, depth: int) -> Collection | None:
    r"""Read the points after `x \ne` or `x \notin` as a set. Return `None` for another variable."""
    if _SIMPLE_NAME.fullmatch(text) and not text.startswith("\\pi"):
        return None
    value = _read(text, depth + 1)
    if isinstance(value, Formula):
        return Collection("{}", (value,))
    if isinstance(value, Collection) and value.kind in ("", "{}"):
        return Collection("{}", value.items)
    return None


def _names_of_tuple(text: str) -> list[str]:
    """Return the names in `(x,y)`, or an empty list for anything else."""
    if _outer_brackets(text) != ("(", ")"):
        return []
    parts = _parts(text[1:-1], {","})
    return [_name(part) for part in parts] if all(map(_SIMPLE_NAME.fullmatch, parts)) else []


def _as_interval(sides: list[str], operators: list[str], depth: int) -> Named | None:
    r"""
    Read `a < x \le b`, `a < x` and `x \le b` as an interval named x.

    For `|x|` in place of x, the result is the set of numbers x.
    """
    if len(sides) == 2:
        if _is_variable(sides[0]) and not _is_variable(sides[1]):
            sides, operators = [r"-\infty", *sides], ["<", *operators]
        elif _is_variable(sides[1]) and not _is_variable(sides[0]):
            sides, operators = [*sides, r"\infty"], [*operators, "<"]
    if len(sides) != 3 or not _is_variable(sides[1]):
        return None
    kind = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    ends = _read_all(sides[::2], depth)
    if match := _ABSOLUTE_VALUE.fullmatch(sides[1]):
        return _mirrored(_name(match[1]), kind, *ends)
    return Named(_name(sides[1]), Collection(kind, ends))


def _is_variable(text: str) -> bool:
    return bool(_SIMPLE_NAME.fullmatch(text) or _ABSOLUTE_VALUE.fullmatch(text))


def _mirrored(name: str, kind: str, low: Form, high: Form) -> Named | None:
    """Return the set of numbers whose absolute value is between two numbers of at least 0."""
    if not isinstance(low, Formula) or not isinstance(high, Formula):
        return None
    infinite = Formula(r"\infty")
    smallest, largest = as_fraction(low.text), as_fraction(high.text)
    if (largest is None or largest < 0) and high != infinite:
        return None
    if low == Formula(r"-\infty"):
        opening = "(" if kind[1] == ")" else "["
        return Named(name, Collection(opening + kind[1], (_negative(high), high)))
    if smallest is None or smallest < 0:
        return None
    left = ("(" if kind[1] == ")" else "[") + (")" if kind[0] == "(" else "]")
    below = Collection(left, (_negative(high), _negative(low)))
    return Named(name, Collection("cup", (below, Collection(kind, (low, high)))))


def _negative(form: Formula) -> Formula:
    return Formula(f"-{form.text}")


def _name(text: str) -> str:
    return " ".join(tokens(text))


def _is_name(text: str) -> bool:
    """
    Return whether the left side of an equation names its right side.

    A name has no digits except in indices. The value of a function is a name too.
    """
    bare = _SUBSCRIPT.sub("", text)
    return bool(_FUNCTION_CALL.fullmatch(bare)) or (
        any(character.isalpha() for character in bare)
        and not any(character.isdigit() for character in bare)
        and r"\pi" not in bare
    )


def _as_words(text: str) -> str | None:
    r"""
    Return a text in lower case if it is words, else `None`.

    It is words if all of it is in `\text`, or if it is bare and does not read as a product.
    """
    if not text or not any(character.isalpha() for character in text):
        return None
    plain = _TEXT_PIECE.sub(r" \1 ", text)
    if "\\" in plain or "{" in plain:
        return None
    plain = " ".join(plain.split()).strip(" .,;:!")
    if not plain or not plain[0].isalpha() or (len(plain) == 1 and "\\text" not in text):
        return None
    marked = "\\text" in text and not _TEXT_PIECE.sub("", text).strip(" .,;:!")
    if not marked:
        words = plain.split()
        if not _BARE_WORDS.fullmatch(plain) or not any(map(_is_word, words)):
            return None
        if len(words) > 1 and words[0].lower() in FUNCTION_WORDS:
            return None
    return plain.casefold()


def _is_word(text: str) -> bool:
    """Return whether bare letters are a word. If not, they are a product.

    The order of a word's letters counts, but not their case.

    A word is a known short one, or has a vowel. With three letters, the vowel must be between two consonants. Capitals
    that repeat, as in `ASA` or `HHT`, are not a product either.
    """
    if not text.isalpha():
        return False
    lower = text.casefold()
    if _SHORT_WORDS.fullmatch(lower):
        return True
    if text.isupper() and len(text) > 2 and len(set(text)) < len(text):
        return True
    if set(lower) <= set("abcdxyz") or not _VOWEL.search(lower):
        return False
    if len(lower) == 3:
        return (text.islower() or text.istitle()) and bool(_SYLLABLE.fullmatch(lower))
    return len(lower) > 3


def _unit(words: str) -> str | None:
    """Return a unit in one spelling, as `cm^2` or `h^-1 km`, or `None` if it is not in the table."""
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", words).lower().replace("^ \\circ", "").replace("^\\circ", "")
    words = " ".join(re.sub(r"[{}]", "", words).split()).strip(" .")
    if words in ("c", "f"):
        return None
    over, *under = re.split(r"\s*/\s*|\s*\bper\b\s*", words)
    powers: dict[str, int] = {}
    for part, sign in ((over, 1), *((part, -1) for part in under)):
        found = _unit_factors(part)
        if found is None:
            return None
        for name, power in found:
            powers[name] = powers.get(name, 0) + sign * power
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in sorted(powers.items()) if power)


def _spelled(unit: str) -> str:
    """Return a unit with its symbols as words."""
    return _SYMBOL.sub(lambda found: _PREFIXES.get(found[1], "") + _SYMBOLS[found[2]], unit)


def _unit_factors(words: str) -> list[tuple[str, int]] | None:
    """Return the units and powers of a product such as `kg m^2`, `square inches` or `cm squared`."""
    power = 1
    for pattern, value in ((r"(?:square|sq\.?) (.*)|(.*) squared", 2), (r"(?:cubic|cu\.?) (.*)|(.*) cubed", 3)):
        if match := re.fullmatch(pattern, words):
            words, power = (match[1] or match[2]), value
    if (name := _known_unit(words)) is not None:
        return [(factor, int(exponent or 1) * power) for factor, exponent in _UNIT_POWER.findall(name)]
    found = []
    for factor in re.split(r"\s*\*\s*|\s+(?!\^)", words):
        match = re.fullmatch(r"([a-z.]+)\s*(?:\^?\s*([-+]?\d))?", factor)
        if match is None or (name := _known_unit(match[1])) is None:
            return None
        found += [(base, int(e or 1) * int(match[2] or 1) * power) for base, e in _UNIT_POWER.findall(name)]
    return found


def _known_unit(word: str) -> str | None:
    for candidate in (word, word.removesuffix("s"), word.removesuffix("es")):
        if candidate in _UNITS:
            return _UNITS[candidate]
    return None


def _read_formula(text: str) -> Formula:
    unit: str | None = None
    percent = False
    for _ in range(3):  # at most a currency, a percent sign and a unit
        if match := _CURRENCY_FIRST.fullmatch(text):
            text, unit = match[1] + match[3], match[2]
        elif match := _CURRENCY_LAST.fullmatch(text):
            text, unit = match[1], match[2]
        elif text.endswith("%") and len(text) > 1:
            text, percent = text[:-1].strip(), True
        elif (match := _TEXT_UNIT.fullmatch(text)) and not _NO_UNITS.search(match[2].lower()):
            text, unit = match[1], _unit(_spelled(match[2]))
        elif (match := _DEGREES.fullmatch(text)) and not _TRIGONOMETRIC.search(match[1]):
            text, unit = match[1], {"C": "celsius", "F": "fahrenheit"}.get(match[2] or match[3], "degree")
        elif (
            (match := _BARE_UNIT.fullmatch(text))
            and len(match[2].strip()) > 1
            and not _NO_UNITS.search(match[2].lower())
            and (
                (found := _unit(match[2]))
                or (_COUNT.fullmatch(match[1]) and _BARE_WORD_UNITS.fullmatch(match[2].strip()))
            )
        ):
            text, unit = match[1], found
        else:
            break
    text = text.strip(" .,;:")
    if _outer_brackets(text) in {("(", ")"), ("{", "}")}:
        text = text[1:-1].strip()
    return Formula(text, unit, percent)


def with_letter_as_unit(form: Formula) -> Formula | None:
    """
    Read `5 m` with its last letter, after a space, as a unit.

    Returns `None` for any other formula.
    """
    match = _SPACED_LETTER.fullmatch(form.text)
    if match is None or form.unit:
        return None
    return Formula(match[1], _unit(_spelled(match[2])), form.percent)


_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
_RATIONAL = re.compile(
    rf"""(?P<sign>[-+\s]*)(?:
        (?P<decimal>{_NUMBER})(?:\s*\*\s*10\s*\^\s*\{{?\s*(?P<exponent>[-+]?\d+)\s*\}}?|[eE](?P<e>[-+]?\d+))?
      | 10\s*\^\s*\{{?\s*(?P<ten>[-+]?\d+)\s*\}}?
      | (?P<base>\d+)\s*\^\s*\{{?\s*(?P<power>\d+)\s*\}}?
      | \\frac\{{(?P<top>\s*[-+]?\s*{_NUMBER}\s*)\}}\{{(?P<bottom>\s*[-+]?\s*{_NUMBER}\s*)\}}
      | \(?\s*(?P<upper>[-+]?\s*{_NUMBER})\s*\)?\s*/\s*\(?\s*(?P<lower>[-+]?\s*{_NUMBER})\s*\)?
      | (?P<whole>\d+)\s*\+?\s*\\frac\{{\s*(?P<part>\d+)\s*\}}\{{\s*(?P<of>\d+)\s*\}}
      | (?P<whole2>\d+)\s+(?P<part2>\d+)\s*/\s*(?P<of2>\d+)
      | (?P<start>\d+\.\d*)\\(?:overline|bar|dot)\s*\{{?\s*(?P<repeat>\d+)\s*\}}?
    )""",
    re.VERBOSE,
)
_DECIMAL = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
_UNIT_POWER = re.compile(r"([^\s^]+)(?:\^(-?\d+))?")
_MAX_EXPONENT = 1000  # beyond it a power of ten stays a formula


def as_fraction(text: str) -> Fraction | None:
    """
    Return the exact value of a formula that is a plain number, or `None` for any other.

    Plain numbers are integers, decimals, fractions, mixed numbers, powers of integers, scientific notation
    and repeating decimals.
    """
    if _DECIMAL.fullmatch(text) and len(text) <= _MAX_EXPONENT:
        return Fraction(text)
    match = _RATIONAL.fullmatch(text.strip())
    if match is None:
        return None
    found = {name: value.replace(" ", "") for name, value in match.groupdict().items() if value is not None}
    try:
        value = _rational_value(found)
    except (ZeroDivisionError, ValueError):  # ValueError: more digits than Python converts to an int
        return None
    if value is None:
        return None
    return -value if found["sign"].count("-") % 2 else value


def _rational_value(found: dict[str, str]) -> Fraction | None:
    exponent = int(found.get("exponent") or found.get("e") or found.get("ten") or 0)
    if abs(exponent) > _MAX_EXPONENT:
        return None
    if "decimal" in found:
        return Fraction(found["decimal"].rstrip(".")) * Fraction(10) ** exponent
    if "ten" in found:
        return Fraction(10) ** exponent
    if "base" in found:
        if len(found["power"]) > 4 or int(found["power"]) * len(found["base"]) > _MAX_EXPONENT:
            return None
        return Fraction(int(found["base"]) ** int(found["power"]))
    for top, bottom in (("top", "bottom"), ("upper", "lower")):
        if top in found:
            return Fraction(found[top].rstrip(".")) / Fraction(found[bottom].rstrip("."))
    for whole, part, of in (("whole", "part", "of"), ("whole2", "part2", "of2")):
        if whole in found:
            return int(found[whole]) + Fraction(int(found[part]), int(found[of]))
    shift = len(found["start"].partition(".")[2])
    digits = found["repeat"]
    return Fraction(found["start"].rstrip(".")) + Fraction(int(digits), (10 ** len(digits) - 1) * 10**shift)


_SHOWN_DECIMAL = re.compile(r"[-+\s]*\d*\.(\d+)(?:\s*\*\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?|[eE]([-+]?\d{1,3}))?")


def decimal_places(text: str) -> int:
    """
    Count the digits after the point of a decimal.

    Scientific notation counts as written out. Any other formula has 0.
    """
    match = _SHOWN_DECIMAL.fullmatch(text.strip())
    return max(0, len(match[1]) - int(match[2] or match[3] or 0)) if match else 0
