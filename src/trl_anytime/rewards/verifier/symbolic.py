r"""Compares formulas with sympy. Imported in worker processes only: parsing can hang, and sympy is slow to import.

Both formulas are parsed by `latex2sympy2_extended` and evaluated at a few points to many digits. That decides in
milliseconds what `sympy.simplify` needs seconds for, and it never expands anything.
"""

import random
import re
from typing import Any

import mpmath
from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import (
    Basic,
    Expr,
    Float,
    I,
    Limit,
    MatrixBase,
    MatrixExpr,
    Mod,
    Product,
    Rational,
    Set,
    Sum,
    Symbol,
    UnevaluatedExpr,
    binomial,
    factorial,
)
from sympy.core.function import AppliedUndef, Derivative

from .equality import MIN_DECIMALS, Exact, Verdict
from .forms import decimal_places

_DIGITS = 50
mpmath.mp.dps = _DIGITS
_TOLERANCE = mpmath.mpf(10) ** -40  # relative; leaves ten digits for rounding errors
_ZERO = mpmath.mpf(10) ** -60  # what sympy leaves of an exact zero is far smaller
_MAX_LOG10 = 1e6

# The parser would read these wrongly, without an error: `f'` as f, `2 3` as 5, `5!!` as (5!)!.
_REFUSED = re.compile(r"'|!!|\d\s+\d|\\text|\\[lc]?dots|\\euro|\\dollar|\\pound|[^\x20-\x7e]|[`\"#@?;]")

_REPAIRS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\^\s*\\circ", r"\\cdot\\frac{\\pi}{180}"),
        (r"%", r"\\cdot\\frac{1}{100}"),
        (r"(?<![\d.}\\A-Za-z])(\d+)\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}", r"(\1+\\frac{\2}{\3})"),  # mixed number
        # The parser adds an integer and a rational behind it, taking `2(3)` and `2\binom42` for mixed numbers.
        (r"(?<=[\d)])\s*(?=\()", r"\\cdot "),
        (r"(?<=\))\s*(?=\d)", r"\\cdot "),
        (r"(?<=\d)\s*(?=\\(?:binom|frac|gcd|lcm|max|min))", r"\\cdot "),
        (r"\\log_\s*(\d)", r"\\log_{\1} "),
        # `1/2\pi` from left to right, as a calculator does; the parser takes 2\pi together.
        (
            r"(\d\)?)\s*/\s*\(?(\d+)\)?\s*(?=[A-Za-z]|\\(?:pi|sqrt|theta|ln|log|sin|cos|tan)(?![A-Za-z]))",
            r"\1/\2\\cdot ",
        ),
        (r"\\lg(?![A-Za-z])", r"\\log_{10}"),
        (r"\*", r"\\cdot "),
        (r"\\cr ", r"\\\\"),
    ]
]

# Values of the symbols, by their order, at which formulas are compared: all in (0, 1), for inverse sines; all
# positive, for roots; of both signs. Random, so that no formula was made to agree, but the same in every process.
_RANDOM = random.Random(0)
_POINTS = [
    [Rational(_RANDOM.randint(low, high), 1009) for _ in range(50)]
    for low, high in ((200, 900), (1100, 3200), (-3000, 3000), (-900, 900))
]

_POWER = re.compile(r"\^\s*(\d+|[A-Za-z]|\\[A-Za-z]+|\{[^{}]*\})")
_TOWER = re.compile(rf"(?:{_POWER.pattern}\s*){{2,}}")
_ALGEBRAIC = (MatrixBase, MatrixExpr, Set)


class TooLarge(Exception):
    """A number with more than a million digits, which nothing here can evaluate in reasonable time."""


class Symbolic:
    """Compares formulas by value; False for what cannot be parsed."""

    def __init__(self) -> None:
        self._exact = Exact()

    def equal(self, a: str, b: str) -> Verdict:
        verdict = self._exact.equal(a, b)
        if verdict is not None:
            return verdict
        left, right = _parse(a), _parse(b)
        if isinstance(left, Expr) and isinstance(right, Expr) and not isinstance(left, MatrixExpr):
            return _equal_values(left, right, _decimals_shown(a, b))
        if isinstance(left, _ALGEBRAIC) and isinstance(right, _ALGEBRAIC):
            return verify(left, right, timeout_seconds=None)
        return False

    def proportional(self, a: str, b: str, positive: bool) -> Verdict:
        left, right = _parse(a), _parse(b)
        if not isinstance(left, Expr) or not isinstance(right, Expr):
            return False
        symbols = _symbols(left, right)
        ratios = [_value(left / right, symbols, point) for point in _POINTS]
        first = ratios[0]
        if first is None or abs(first) < _ZERO or abs(first.imag) > _TOLERANCE or (positive and first.real < 0):
            return False
        return all(ratio is not None and _agree(ratio, first) for ratio in ratios)


def _decimals_shown(a: str, b: str) -> int:
    """Places of the decimal if exactly one of the two formulas is a decimal long enough to stand for a value."""
    shown = [decimal_places(formula) for formula in (a, b)]
    return max(shown) if min(shown) == 0 and max(shown) >= MIN_DECIMALS else 0


def _parse(formula: str) -> Any:
    for pattern, replacement in _REPAIRS:
        formula = pattern.sub(replacement, formula)
    if _REFUSED.search(formula):
        return None
    try:
        parsed = latex2sympy(
            _right_associative(formula),
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (RecursionError, MemoryError, OverflowError):
        raise
    except Exception:  # the parser raises plain Exceptions for what it does not understand
        return None
    if isinstance(parsed, Expr):
        _log10(parsed)
        decimals = {number: Rational(str(number)) for number in parsed.atoms(Float)}
        calls = {call: Symbol(str(call)) for call in parsed.atoms(AppliedUndef)}
        parsed = parsed.xreplace(decimals | calls)
        if parsed.has(Limit, Derivative, Mod, UnevaluatedExpr) or (parsed.free_symbols and parsed.has(Sum, Product)):
            parsed = parsed.doit()
    return parsed


def _right_associative(formula: str) -> str:
    """Write `a^b^c`, which is not TeX, as `a^{b^{c}}`; the parser would read it as (a^b)^c."""

    def fold(match: re.Match[str]) -> str:
        powers = _POWER.findall(match[0])
        return "".join(f"^{{{power.strip('{} ')}" for power in powers) + "}" * len(powers)

    return _TOWER.sub(fold, formula)


def _log10(expr: Basic) -> float:
    """Rough upper bound for the decimal logarithm of a number, symbols taken as 10; raises `TooLarge`."""
    if expr.is_Number:
        bound = 0.0 if expr.is_zero or not expr.is_finite else abs(float(mpmath.log10(mpmath.mpf(abs(expr)))))
        return bound
    parts = [_log10(part) for part in expr.args]
    if expr.is_Pow:
        bound = max(parts[0], 0.1) * 10 ** min(parts[1], 300.0)
    elif isinstance(expr, factorial):
        bound = parts[0] * 10 ** min(parts[0], 300.0)
    elif isinstance(expr, binomial):
        bound = parts[0] * 10 ** min(*parts, 300.0)
    elif expr.is_Mul:
        bound = sum(parts)
    else:
        bound = max(parts, default=1.0)
    if bound > _MAX_LOG10:
        raise TooLarge
    return bound


def _symbols(left: Expr, right: Expr) -> list[Symbol]:
    return sorted(left.free_symbols | right.free_symbols - {Symbol("i")}, key=str)


def _value(expr: Expr, symbols: list[Symbol], point: list[Rational]) -> Any:
    """Value at a point as an `mpmath.mpc`, the symbol i as the imaginary unit; `None` if it has no finite value."""
    if len(symbols) > len(point):
        return None
    values = dict(zip(symbols, point, strict=False))
    if Symbol("i") in expr.free_symbols:
        values[Symbol("i")] = I
    try:
        real, imaginary = expr.evalf(_DIGITS, subs=values).as_real_imag()
        value = mpmath.mpc(mpmath.mpf(real), mpmath.mpf(imaginary))
    except (TypeError, ValueError, ZeroDivisionError, ArithmeticError, NotImplementedError):
        return None
    return value if mpmath.isfinite(value) else None


def _agree(a: Any, b: Any) -> bool:
    size = max(abs(a), abs(b))
    return size < _ZERO or abs(a - b) <= _TOLERANCE * size


def _is_real(value: Any) -> bool:
    return abs(value.imag) <= _TOLERANCE * abs(value)


def _equal_values(left: Expr, right: Expr, decimals: int) -> bool:
    """Whether two expressions have the same values, at every point where both are real if there is one."""
    if left == right:
        return True
    symbols = _symbols(left, right)
    points = _POINTS if symbols else _POINTS[:1]
    pairs = []
    for point in points:
        a, b = _value(left, symbols, point), _value(right, symbols, point)
        if a is None or b is None:
            if a is not b:
                return False
            continue
        if _is_real(a) and _is_real(b) and not _agree(a, b) and not (decimals and _rounds(a, b, decimals)):
            return False
        pairs.append((a, b))
    real = [(a, b) for a, b in pairs if _is_real(a) and _is_real(b)]
    return bool(pairs) and (bool(real) or all(_agree(a, b) for a, b in pairs))


def _rounds(a: Any, b: Any, decimals: int) -> bool:
    significant = min(abs(a), abs(b)) * 10**decimals >= 10 ** (MIN_DECIMALS - 1)
    return significant and abs(a - b) <= mpmath.mpf(10) ** -decimals / 2
