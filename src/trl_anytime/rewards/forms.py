r"""What an answer is: a number, words, a choice, a list, an interval, a matrix, an equation, or any other formula.

`read` turns an answer into one of the small dataclasses below. Formulas stay strings: they are compared as exact
fractions (`as_fraction`) or, in a worker process, by sympy.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .latex import PLAIN, TOKEN, tokens


@dataclass(frozen=True)
class Formula:
    """A scalar: its text, its unit (`None` for none or an unknown one), and whether it had a percent sign."""

    text: str
    unit: str | None = None
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """Text such as a name or `even`, in lower case, one space between words."""

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
    rows: tuple[tuple["Form", ...], ...]


@dataclass(frozen=True)
class Collection:
    r"""Several answers: `kind` is the pair of brackets for tuples and intervals (`"()"`, `"[)"`, …), `"{}"` for sets,
    `""` for a bare list, `"cup"` for a union. The order counts for pairs of brackets alone."""

    kind: str
    items: tuple["Form", ...]


@dataclass(frozen=True)
class Named:
    r"""A value with a name: `x=5`, `f(x)=2x`, `x\in[1,2]`, `1<x<2` (an interval named x)."""

    name: str
    value: "Form"


@dataclass(frozen=True)
class Relation:
    r"""Any other equation or inequality, turned so that `operator` is `=`, `<`, `\le` or `\ne`."""

    left: str
    operator: str
    right: str


Form = Formula | Words | Choice | BasedNumber | Matrix | Collection | Named | Relation

# Units that are told apart: `10 cm` is not `10 m`. Other words behind a number say what was counted and are dropped.
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
        "mph": "mph, mi/h, miles/hour, miles per hour",
        "km/h": "km/h, kmh, kph, km/hr, kilometers per hour",
        "m/s": "m/s, meters per second",
        "degree": "deg, degree",
        "radian": "rad, radian",
        "dollar": "dollar, usd",
        "cent": "cent",
        "euro": "euro",
        "am": "am, a.m",
        "pm": "pm, p.m",
    }.items()
    for name in names.split(", ")
}
# Words behind a number that change what it says: `5 or more` is not 5.
_NO_UNITS = re.compile(
    r"\b(?:or|and|more|less|fewer|least|most|not|than|over|under|plus|minus|times|half|dozen|mod|base|to|only)\b"
)
_BASE_WORDS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_MAX_DEPTH = 20  # of brackets in brackets: no answer comes near, Python's recursion limit stays far

_OPENING, _CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
_RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne"}
_MATRIX = re.compile(
    r"\\begin\s*\{([pbB]?matrix|smallmatrix|array)\}(.*)\\end\s*\{\1\}(\^\s*\{?\s*(?:T|\\top)\s*\}?)?"
)
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)|(?<![\d.,\s])[1-9]\d{0,2}(?: \d{3})+(?! ?\d)")
_BASED = re.compile(
    r"\(?\s*([0-9A-Za-z]+)\s*\)?\s*_\s*\{?\s*(?:\\text\s*\{\s*)?(?:base[\s-]*)?\}?\s*(\d{1,2}|[a-z]+)[\s}]*"
)
_TEXT_PIECE = re.compile(r"\\text\s*\{([^{}]*)\}")
_TEXT_WITH_NUMBER = re.compile(r"\\text\s*\{\s*([-+]?\d[^{}]*)\}")
_BARE_WORDS = re.compile(r"[A-Za-z][A-Za-z0-9'’.:\- ]*")
_TEXT_UNIT = re.compile(r"(.*[^\s+\-*/^=,(\[{])\s*\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?\s*(\d)\s*\}?)?")
_BARE_UNIT = re.compile(r"(.*[\d})])\s*(?<![A-Za-z\\])([A-Za-z][A-Za-z/. ]+?)\s*(?:\^\s*\{?\s*(\d)\s*\}?)?")
_COUNT = re.compile(r"[-+]?[\d., ]*\d|[-+]?\\frac\{\d+\}\{\d+\}|\d+/\d+")
_CURRENCY_FIRST = re.compile(r"([-+]?)\s*\\(dollar|euro|pound)(?![A-Za-z])\s*(.+)")
_CURRENCY_LAST = re.compile(r"(.+?)\s*\\(dollar|euro|pound)")
_DEGREES = re.compile(r"(.+?)\s*\^\s*\\circ(?:\s*\\text\s*\{\s*[CF]\s*\}|\s*[CF])?")
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_SIMPLE_NAME = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?:_(?:\{[^{}]*\}|\w))?'*(?:\([A-Za-z, ]*\))?")
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)")
_FUNCTION_CALL = re.compile(r"[A-Za-z]\s*\(.*\)")


_NAMED_SETS = {
    r"\mathbb{R}": Collection("()", (Formula(r"-\infty"), Formula(r"\infty"))),
    r"\emptyset": Collection("{}", ()),
}


@lru_cache(maxsize=512)  # as for `normalize`
def read(text: str) -> Form:
    """Read one answer.

    Args:
        text (`str`):
            What stood in the box, as [`normalize`] returns it, at most a few thousand characters.
    """
    return Formula(text) if PLAIN.fullmatch(text) else _read(text, 0)


def _read(text: str, depth: int) -> Form:
    text = text.strip(" ,;:").removeprefix("=").lstrip()
    if depth > _MAX_DEPTH:
        return Formula(text)
    if match := _TEXT_WITH_NUMBER.fullmatch(text):
        text = match[1].strip()
    if r"\approx" in text:  # `\frac23 \approx 0.67` claims its first value
        text = next((part for part, _ in _split(text, {r"\approx"}) if part), text)
    if (words := _as_words(text)) is not None:
        return Words(words)
    if match := re.fullmatch(r"\(\s*([A-Za-z])\s*\)|([A-Z])\s*\)", text):
        return Choice((match[1] or match[2]).upper())
    if match := _MATRIX.fullmatch(text):
        return _read_matrix(match, depth)
    if match := _BASED.fullmatch(text):
        base = int(match[2]) if match[2].isdigit() else _BASE_WORDS.get(match[2], 0)
        if base == 10:
            return Formula(match[1])
        if match[1][0].isdigit() and 2 <= base <= 36:
            return BasedNumber(match[1].upper(), base)
    text = _THOUSANDS.sub(lambda match: re.sub("[, ]", "", match[0]), text) if depth == 0 else text
    for separators in ({";"}, {",", r"\lor"}):
        parts = _split(text, separators)
        if len(parts) > 1:
            items = _read_items([item for item, _ in parts], depth)
            either = r"\lor" in {separator for _, separator in parts}
            return Collection("cup" if either and all(map(_is_interval, items)) else "", items)
    relation = _read_relation(text, depth)
    if relation is not None:
        return relation
    parts = _split(text, {r"\cup"})
    if len(parts) > 1:
        return Collection("cup", tuple(_read(part, depth + 1) for part, _ in parts))
    if text in _NAMED_SETS:
        return _NAMED_SETS[text]
    if brackets := _outer_brackets(text):
        return _read_brackets(text, brackets, depth)
    if r"\pm" in text or r"\mp" in text:
        return Collection("", _read_items([text], depth))
    return _read_formula(text)


def _is_interval(form: Form) -> bool:
    value = form.value if isinstance(form, Named) else form
    return isinstance(value, Collection) and value.kind in ("()", "(]", "[)", "[]")


def _top_level(text: str) -> Iterator[re.Match[str]]:
    """Tokens outside all brackets and braces, an opening bracket counted in, its closing one not."""
    level = 0
    for match in TOKEN.finditer(text):
        if match[0] in _CLOSING:
            level -= 1
        elif level == 0:
            yield match
        if match[0] in _OPENING:
            level += 1


def _split(text: str, separators: set[str]) -> list[tuple[str, str]]:
    """Parts between separators outside all brackets, each with the separator behind it (`""` for the last)."""
    parts = []
    start = 0
    for match in _top_level(text):
        if match[0] in separators:
            parts.append((text[start : match.start()].strip(), match[0]))
            start = match.end()
    return [*parts, (text[start:].strip(), "")]


def _outer_brackets(text: str) -> tuple[str, str] | None:
    """The pair of brackets around the whole text, `None` if there is none."""
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
    if brackets == (r"\{", r"\}"):
        if any(token[0] in {"|", r"\mid", ":"} for token in _top_level(inner)):
            return Formula(text)  # a set given by a condition
        items = [item for item, _ in _split(inner, {",", ";"})]
        return Collection("{}", _read_items(items, depth) if inner else ())
    items = [item for item, _ in _split(inner, {",", ";"})]
    if len(items) == 1 and (brackets == ("(", ")") or _MATRIX.fullmatch(inner)):
        return _read(inner, depth + 1)
    if opening in "([" and closing in ")]" and len(items) > 1:
        return Collection(opening + closing, tuple(_read(item, depth + 1) for item in items))
    return _read_formula(text)


def _read_items(items: list[str], depth: int) -> tuple[Form, ...]:
    r"""Items of a list or set: empty ones dropped, `a \pm b` as two."""
    forms = []
    for item in items:
        if item and (r"\pm" in item or r"\mp" in item):
            forms.append(_read(item.replace(r"\pm", "+").replace(r"\mp", "-"), depth + 1))
            forms.append(_read(item.replace(r"\pm", "-").replace(r"\mp", "+"), depth + 1))
        elif item:
            forms.append(_read(item, depth + 1))
    return tuple(forms)


def _read_matrix(match: re.Match[str], depth: int) -> Form:
    body = re.sub(r"^\s*\{[lcr|\s]*\}", "", match[2]).replace(r"\hline", "")
    rows = [row for row, _ in _split(body, {r"\cr"}) if row]
    cells = [tuple(_read(cell, depth + 1) for cell, _ in _split(row, {"&"})) for row in rows]
    if match[3] and len({len(row) for row in cells}) == 1:
        cells = list(zip(*cells, strict=True))
    return Matrix(tuple(cells))


def _read_relation(text: str, depth: int) -> Form | None:
    parts = _split(text, _RELATIONS | {r"\in"})
    if len(parts) == 1 or not all(part for part, _ in parts):
        return None
    sides = [part for part, _ in parts]
    operators = [operator for _, operator in parts[:-1]]
    if operators == [r"\in"]:
        return Named(_name(sides[0]), _read(sides[1], depth + 1))
    if set(operators) == {"="}:
        if _is_name(sides[0]):
            return Named(_name(sides[0]), _read(sides[-1], depth + 1))
        if len(sides) == 2 and _SIMPLE_NAME.fullmatch(sides[1]):
            return Named(_name(sides[1]), _read(sides[0], depth + 1))
        return Relation(sides[0], "=", sides[-1])
    if set(operators) <= {">", r"\ge"}:
        sides.reverse()
        operators = [{">": "<", r"\ge": r"\le"}[operator] for operator in reversed(operators)]
    if set(operators) <= {"<", r"\le"}:
        interval = _as_interval(sides, operators, depth)
        if interval is not None:
            return interval
    if len(sides) == 2 and operators[0] in {"<", r"\le", r"\ne"}:
        return Relation(sides[0], operators[0], sides[1])
    return Formula(text)


def _as_interval(sides: list[str], operators: list[str], depth: int) -> Named | None:
    r"""`a < x \le b`, `a < x` and `x \le b` as an interval named x."""
    if len(sides) == 2:
        if _SIMPLE_NAME.fullmatch(sides[0]) and not _SIMPLE_NAME.fullmatch(sides[1]):
            sides, operators = [r"-\infty", *sides], ["<", *operators]
        elif _SIMPLE_NAME.fullmatch(sides[1]) and not _SIMPLE_NAME.fullmatch(sides[0]):
            sides, operators = [*sides, r"\infty"], [*operators, "<"]
    if len(sides) != 3 or not _SIMPLE_NAME.fullmatch(sides[1]):
        return None
    kind = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    return Named(_name(sides[1]), Collection(kind, (_read(sides[0], depth + 1), _read(sides[2], depth + 1))))


def _name(text: str) -> str:
    return " ".join(tokens(text))


def _is_name(text: str) -> bool:
    """Whether the left side of an equation names its right side: no digits but in indices, or a function's value."""
    bare = _SUBSCRIPT.sub("", text)
    return bool(_FUNCTION_CALL.fullmatch(bare)) or (
        any(character.isalpha() for character in bare)
        and not any(character.isdigit() for character in bare)
        and r"\pi" not in bare
    )


def _as_words(text: str) -> str | None:
    r"""Text in lower case if it is words: all of it in `\text`, or bare words with one of four letters or more."""
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
        long_word = any(len(word) >= 4 and word.isalpha() for word in plain.split())
        if not (_BARE_WORDS.fullmatch(plain) and long_word):
            return None
    return plain.casefold()


def _unit(words: str, power: str | None) -> str | None:
    """Unit with its power as in `cm^2`; `None` for words that are not in the table."""
    words = " ".join(words.lower().replace("per", " per ").split()).strip(" .")
    exponent = power or "1"
    for pattern, value in ((r"(?:square|sq\.?) (.*)|(.*) squared", "2"), (r"(?:cubic|cu\.?) (.*)|(.*) cubed", "3")):
        if match := re.fullmatch(pattern, words):
            words, exponent = (match[1] or match[2]), value
    if match := re.fullmatch(r"(.*?)\s*\^\s*\{?(\d)\}?", words):
        words, exponent = match[1], match[2]
    for candidate in (words, words.removesuffix("s"), words.removesuffix("es")):
        if candidate in _UNITS:
            return _UNITS[candidate] + ("" if exponent == "1" else f"^{exponent}")
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
            text, unit = match[1], _unit(match[2], match[3])
        elif (match := _DEGREES.fullmatch(text)) and not _TRIGONOMETRIC.search(match[1]):
            text, unit = match[1], "degree"
        elif ((match := _BARE_UNIT.fullmatch(text)) and not _NO_UNITS.search(match[2].lower())) and (
            (found := _unit(match[2], match[3])) or (_COUNT.fullmatch(match[1]) and len(match[2]) >= 4)
        ):
            text, unit = match[1], found
        else:
            break
    text = text.strip(" .,;:")
    if _outer_brackets(text) in {("(", ")"), ("{", "}")}:
        text = text[1:-1].strip()
    return Formula(text, unit, percent)


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
_MAX_EXPONENT = 1000  # beyond it a power of ten stays a formula


def as_fraction(text: str) -> Fraction | None:
    """Exact value of a formula that is a plain number (integer, decimal, fraction, mixed number, power of integers,
    scientific notation, repeating decimal), `None` for any other."""
    if _DECIMAL.fullmatch(text) and len(text) <= _MAX_EXPONENT:
        return Fraction(text)
    match = _RATIONAL.fullmatch(text.strip())
    if match is None:
        return None
    found = {name: value.replace(" ", "") for name, value in match.groupdict().items() if value is not None}
    try:
        value = _rational_value(found)
    except (ZeroDivisionError, ValueError):  # ValueError: more digits than Python turns into an int
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


_DECIMAL_PLACES = re.compile(r"[-+\s]*\d*\.(\d+)(?:\s*\*\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?|[eE]([-+]?\d{1,3}))?")


def decimal_places(text: str) -> int:
    """Digits behind the point of a decimal (in scientific notation: once written out), 0 for any other formula."""
    match = _DECIMAL_PLACES.fullmatch(text.strip())
    return max(0, len(match[1]) - int(match[2] or match[3] or 0)) if match else 0
