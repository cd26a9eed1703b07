r"""Compare two formulas by their values: exactly where they are rational, else to as many digits as needed.

A formula is evaluated at points, which give each letter a rational number. A value is a `Fraction` as long as
possible, then an `mpmath` number. Values that agree in fifty digits are computed again. Then the digits suffice for
the largest and the smallest number that occurred: `e^{-1000}+1` is not 1.

Letters are real numbers. A formula that takes the root or the logarithm of a negative number has no value at that
point. Values are complex only if there is no real point at all, or if the letter i occurs. A letter that must be an
integer for the formula to make sense (in a factorial, an upper limit, an exponent of -1) only gets integers.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

import mpmath
from sympy import Basic, Expr, Float, I, Product, Rational, Sum, Symbol, Tuple, integer_nthroot, preorder_traversal
from sympy.core.function import AppliedUndef

from .equality import MIN_DECIMALS
from .grammar import TooLarge

Value: TypeAlias = Any  # Fraction, mpmath.mpf or mpmath.mpc

_DIGITS = 50
_MAX_DIGITS = 20_000  # about a second of CPU for a few functions
_MAX_LOG10 = 1e6
_MAX_BITS = 3_400_000  # of exact integers: a million digits
_MAX_BITS_AT_POINTS = 2**18
_THOROUGH_POINTS = 2  # the first ones, which are small: there, a large size comes from the formula
_MIN_POINTS = 3  # or an ordinary one: the roots of x and of -x meet only in 0
_MAX_TERMS = 5_000  # of sums and products
_OPAQUE_SIZE = 20.0  # taken for the size of what is not seen inside an integral: \int_0^{100} e^{-x} dx is not 1
_LOG10_2 = math.log10(2)
_IMAGINARY = Symbol("i")

# Formulas with these may agree at a few points and differ at others, so they are compared at many more.
_STEPPED = {"floor", "ceiling", "Mod", "Gcd", "Lcm", "factorial", "binomial"}
_FOLDED = {"Abs", "Max", "Min", "sign"}
_SUMMED = {"Sum", "Product"}
_INTEGER_ARGUMENTS = {"factorial", "binomial", "Gcd", "Lcm"}
_ROUNDED = {"floor", "ceiling", "Mod"}
_INTEGER_LETTERS = frozenset("nmkNMK")  # integers by convention where they are rounded


class Undefined(Exception):
    """A formula has no value at a point."""


class Formula:
    """Formula with what is known about its letters, and its values so far."""

    def __init__(self, expr: Expr) -> None:
        nodes = list(preorder_traversal(expr))
        kinds = {type(node).__name__ for node in nodes}
        self.expr = expr
        self.letters = frozenset(symbol.name for symbol in expr.free_symbols if symbol != _IMAGINARY)
        self.functions = frozenset(node.func.__name__ for node in nodes if isinstance(node, AppliedUndef))
        self.is_complex = _IMAGINARY in expr.free_symbols or I in nodes
        self.is_opaque = not all(isinstance(node, _LEAVES) or type(node).__name__ in _METHODS for node in nodes)
        self.integers = frozenset(name for node in nodes for name in _integer_letters(node))
        self.is_summed = bool(kinds & _SUMMED)
        self.is_stepped = bool(self.integers or kinds & _STEPPED)
        self.is_folded = bool(kinds & _FOLDED) or any(
            node.is_Pow and not (node.exp.is_Integer or node.exp.is_Symbol) and node.base.free_symbols
            for node in nodes
            if isinstance(node, Expr)
        )
        self.constants = {number for node in nodes if node.is_Rational for number in (abs(int(node.p)), int(node.q))}
        self.is_too_large = False  # at a point where it was evaluated
        self._values: dict[Any, tuple[Value, float, float] | None] = {}

    def at(self, key: Any, point: dict[str, Fraction], real: bool) -> tuple[Value, float, float] | None:
        """
        Return the value at a point, with its loss and its size (see `_Evaluator`).

        Returns `None` if it has no finite value there.
        """
        key = (key, real)
        if key not in self._values:
            try:
                self._values[key] = _evaluate(self.expr, point, real, _DIGITS)
            except Undefined:
                self._values[key] = None
            except TooLarge:
                self._values[key] = None
                self.is_too_large = True
        return self._values[key]


def _integer_letters(node: Basic) -> Iterator[str]:
    kind = type(node).__name__
    if kind in _INTEGER_ARGUMENTS:
        yield from (symbol.name for symbol in node.free_symbols if "'" not in symbol.name)
    elif kind in _SUMMED:
        yield from (s.name for limit in node.args[1:] for bound in limit.args[1:] for s in bound.free_symbols)
    elif kind in _ROUNDED:
        yield from (symbol.name for symbol in node.free_symbols if symbol.name in _INTEGER_LETTERS)
    elif kind == "Pow" and node.args[1].free_symbols and not node.args[0].free_symbols:
        try:
            base, _, _ = _evaluate(node.args[0], {}, True, 15)
        except (Undefined, TooLarge):
            return
        if base < 0:
            yield from (symbol.name for symbol in node.args[1].free_symbols if "'" not in symbol.name)


# ---------------------------------------------------------------------------------------------------------------------


@mpmath.workdps(_DIGITS)
def equal_values(left: Formula, right: Formula, decimals: int = 0) -> bool:
    """Return whether two formulas have the same values wherever both have one, and have one somewhere.

    Args:
        left, right ([`Formula`]):
            The formulas.
        decimals (`int`, *optional*, defaults to `0`):
            Places of the decimal, if one of the two is a decimal. It also equals the value that it is rounded from.

    Raises:
        `TooLarge`: If the values are too large to be compared.
    """
    if left.is_opaque and left.expr == right.expr:
        return True
    if not left.letters | right.letters:
        return _equal_numbers(left.expr, right.expr, decimals)
    for real in (True, False):
        compared = ordinary = 0
        for key, point, a, b in _common_values(left, right, real):
            try:
                if not _same(left.expr, right.expr, a, b, point, real, compared < _THOROUGH_POINTS):
                    return False
            except (Undefined, TooLarge):
                continue
            compared += 1
            ordinary += isinstance(key[0], int)
        if ordinary or compared >= _MIN_POINTS:
            return True
    return _differ_or_too_large(left, right)


@mpmath.workdps(_DIGITS)
def proportional_values(left: Formula, right: Formula, positive: bool) -> bool:
    """
    Return whether one formula is a constant multiple of the other, a positive one if `positive`.

    This is False for two numbers, which always are multiples.
    """
    if not left.letters | right.letters | left.functions | right.functions:
        return False
    for real in (True, False):
        first: tuple[Value, Value, dict[str, Fraction]] | None = None
        compared = 0
        for _, point, a, b in _common_values(left, right, real):
            x, y = _clean(a), _clean(b)
            if (x == 0) != (y == 0):
                return False
            if x == 0:
                continue
            if first is None:
                ratio = _inexact(x) / _inexact(y)
                if isinstance(ratio, mpmath.mpc) or (positive and ratio < 0):
                    return False
                first = x, y, point
                continue
            products = _times(x, first[1]), _times(y, first[0])
            exact = all(isinstance(product, Fraction) for product in products)
            if not _close(*products):
                return False
            size = max(a[2], b[2])
            if not exact and compared < _THOROUGH_POINTS and size > 5:
                digits = int(min(_MAX_DIGITS, 60 + 8 * size))
                with mpmath.workdps(digits):
                    (x0, y0), (x, y) = (
                        [_inexact(_evaluate(formula.expr, where, real, digits)[0]) for formula in (left, right)]
                        for where in (first[2], point)
                    )
                    if abs(x * y0 - y * x0) > abs(x * y0) * mpmath.mpf(10) ** -(digits * 5 // 8):
                        return False
            compared += 1
        if first is not None:
            return True
    return _differ_or_too_large(left, right)


def _common_values(left: Formula, right: Formula, real: bool) -> Iterator[tuple[Any, dict[str, Fraction], Any, Any]]:
    """Yield points, each with its key, at which both formulas have a value, and these values."""
    if real and (left.is_complex or right.is_complex):
        return
    for key, point in _points(left, right):
        a, b = left.at(key, point, real), right.at(key, point, real)
        if a is not None and b is not None:
            yield key, point, a, b


def _differ_or_too_large(left: Formula, right: Formula) -> bool:
    """Return False for formulas without a common value. Raise `TooLarge` if values were too large to tell."""
    if left.is_too_large or right.is_too_large:
        raise TooLarge("too large at every point")
    return False


def _equal_numbers(left: Expr, right: Expr, decimals: int) -> bool:
    for real in (True, False):
        try:
            a, b = (_evaluate(expr, {}, real, _DIGITS) for expr in (left, right))
            return _same(left, right, a, b, {}, real, True) or (decimals > 0 and _rounds(a[0], b[0], decimals))
        except Undefined:
            continue
    return False


def _same(
    left: Expr,
    right: Expr,
    a: tuple[Value, float, float],
    b: tuple[Value, float, float],
    point: dict[str, Fraction],
    real: bool,
    thorough: bool,
) -> bool:
    """Return whether two values, computed with the usual digits, are the same.

    If that is in doubt, they are computed again.

    If not `thorough`, values that agree in thirty digits are the same.
    """
    (x, loss_x, size_x), (y, loss_y, size_y) = a, b
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    if not (mpmath.isfinite(_inexact(x)) and mpmath.isfinite(_inexact(y))):
        return bool(_inexact(x) == _inexact(y))
    loss, size = max(loss_x, loss_y), max(size_x, size_y)
    if not point:  # a long fraction may come as close to e as it likes
        lengths = [
            max(v.numerator.bit_length(), v.denominator.bit_length()) for v in (x, y) if isinstance(v, Fraction)
        ]
        size = max([size, *(bits * _LOG10_2 for bits in lengths)])
    difference = abs(_inexact(x) - _inexact(y))
    largest = max(abs(_inexact(x)), abs(_inexact(y)))
    if difference > largest * mpmath.mpf(10) ** -20 and loss < 25:
        return False
    if difference <= mpmath.mpf(10) ** -35 and size < (15 if point else 5):
        return True
    if not thorough and difference <= largest * mpmath.mpf(10) ** -30 and loss < 15:
        return True
    digits = int(min(_MAX_DIGITS, 60 + 8 * size))
    if digits < 60 + 3 * size or not (thorough or size < 100):
        raise TooLarge("more digits than can be computed")
    with mpmath.workdps(digits):
        x, y = (_inexact(_evaluate(expr, point, real, digits)[0]) for expr in (left, right))
        largest = max(abs(x), abs(y), mpmath.mpf(1))
        return bool(abs(x - y) <= largest * mpmath.mpf(10) ** -(digits * 5 // 8))


def _clean(value: tuple[Value, float, float]) -> Value:
    """Return the value, with 0 in place of a rounding error of 0."""
    x, loss, _ = value
    return Fraction(0) if not isinstance(x, Fraction) and loss > 35 and abs(x) < mpmath.mpf(10) ** -30 else x


def _close(x: Value, y: Value) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    x, y = _inexact(x), _inexact(y)
    return bool(abs(x - y) <= max(abs(x), abs(y)) * mpmath.mpf(10) ** -30)


def _rounds(a: Value, b: Value, decimals: int) -> bool:
    a, b = _inexact(a), _inexact(b)
    significant = min(abs(a), abs(b)) * 10**decimals >= 10 ** (MIN_DECIMALS - 1)
    return bool(significant and abs(a - b) <= mpmath.mpf(10) ** -decimals / 2)


# ---------------------------------------------------------------------------------------------------------------------

# Ranges of the coordinates of the points at which all formulas are compared: small for inverse sines, positive for
# roots, of both signs, large. The random points are the same in every process. No formula was made to agree at them.
_RANGES = [(0.2, 0.9), (1.1, 3.2), (-3, 3), (-0.9, 0.9), (4, 40), (-40, 40), (50, 3000), (-3000, -1)]
_INTEGER_RANGES = [(1, 6), (2, 12), (1, 20), (0, 9), (4, 40), (-12, 12), (50, 300), (-40, -1)]
_DENOMINATOR = 1009  # a prime, so that no formula simplifies by accident


@lru_cache(maxsize=8192)
def _coordinate(letter: str, index: int, integer: bool) -> Fraction:
    choose = random.Random(f"{letter} {index} {integer}")
    if integer:
        return Fraction(choose.randint(*_INTEGER_RANGES[index]))
    low, high = _RANGES[index]
    return Fraction(choose.randint(int(low * _DENOMINATOR), int(high * _DENOMINATOR)), _DENOMINATOR)


def _points(left: Formula, right: Formula) -> Iterator[tuple[Any, dict[str, Fraction]]]:
    """
    Yield points, each with a key.

    The key of a point is the same for one formula, whatever the other formula is.
    """
    letters = sorted(left.letters | right.letters)
    functions = left.functions | right.functions
    integers = left.integers | right.integers
    for index in range(len(_RANGES)):
        key = (index, integers)
        yield key, {name: _coordinate(name, index, name in integers) for name in (*letters, *functions)}
    if not any(formula.is_stepped or formula.is_folded for formula in (left, right)):
        return
    stepped = left.is_stepped or right.is_stepped
    summed = left.is_summed or right.is_summed
    constants = left.constants | right.constants
    pools = {letter: _special(frozenset(constants), letter in integers, stepped, summed) for letter in letters}
    if len(letters) == 1:
        [letter] = letters
        for value in pools[letter]:
            yield (letter, value), {letter: value}
        return
    choose = random.Random(" ".join(letters))
    for _ in range(150 if stepped else 60):
        small = choose.random() < 0.5
        values = [
            Fraction(choose.randint(-6, 12)) if small or choose.random() < 0.3 else choose.choice(pools[letter])
            for letter in letters
        ]
        yield (tuple(letters), tuple(values)), dict(zip(letters, values, strict=True))


@lru_cache(maxsize=64)
def _special(constants: frozenset[int], integer: bool, stepped: bool, summed: bool) -> tuple[Fraction, ...]:
    """Return values at which formulas with these constants may have a step or kink, and ordinary ones."""
    if summed:
        return tuple(map(Fraction, range(16)))
    found: dict[Fraction, None] = dict.fromkeys(map(Fraction, range(-12, 131) if stepped else range(-12, 13)))
    constants = frozenset(c for c in constants if 1 < c < 10**12)
    for c in sorted(constants):
        near = {c, 2 * c, 3 * c, math.isqrt(c)}
        found |= dict.fromkeys(Fraction(sign * (n + step)) for n in near for sign in (1, -1) for step in (-1, 0, 1))
    together = math.lcm(*constants)
    found |= dict.fromkeys(map(Fraction, (1000, 10_001, 10**6, 10**9 + 7, -1000, -(10**6) - 1)))
    if together < 10**12:
        found |= dict.fromkeys((Fraction(together), Fraction(2 * together)))
    if not integer:
        found |= dict.fromkeys(value + Fraction(1, 2) for value in list(found)[: 60 if stepped else 200])
        choose = random.Random(0)
        found |= dict.fromkeys(Fraction(choose.randint(-9000, 9000), 1009) for _ in range(20))
    return tuple(found)


# ---------------------------------------------------------------------------------------------------------------------


def _evaluate(expr: Expr, point: dict[str, Fraction], real: bool, digits: int) -> tuple[Value, float, float]:
    """Return a formula's value, the decimal digits lost to cancellation, and the size of its numbers."""
    with mpmath.workdps(digits):
        evaluator = _Evaluator(dict(point), real, exact_sizes=not point)
        try:
            value = evaluator.value(expr)
        except ZeroDivisionError:
            raise Undefined from None
        if not isinstance(value, Fraction):
            evaluator.note_size(value)
        return value, evaluator.loss, evaluator.size


def _inexact(value: Value) -> Any:
    return mpmath.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _times(x: Value, y: Value) -> Value:
    return x * y if isinstance(x, Fraction) and isinstance(y, Fraction) else _inexact(x) * _inexact(y)


class _Evaluator:
    """Evaluation of a tree at one point.

    Attributes:
        loss (`float`): Decimal digits that the result may have lost.
        size (`float`): Decimal logarithm of the largest number that occurred, or of the inverse of the smallest. With
        `exact_sizes`, also of the numerators and denominators: 1+10^{-400} has the size 400.
    """

    def __init__(self, point: dict[str, Value], real: bool, exact_sizes: bool) -> None:
        self.point = point
        self.real = real
        self.exact_sizes = exact_sizes
        self.max_bits = _MAX_BITS if exact_sizes else _MAX_BITS_AT_POINTS
        self.loss = 0.0
        self.size = 0.0

    def value(self, expr: Basic) -> Value:
        if expr.is_Rational:
            return Fraction(int(expr.p), int(expr.q))
        if expr.is_Symbol:
            return mpmath.mpc(0, 1) if expr == _IMAGINARY else self.point[expr.name]
        method = _METHODS.get(type(expr).__name__)
        if method is not None:
            return method(self, *expr.args)
        if isinstance(expr, AppliedUndef):
            return self.unknown_function(expr)
        return self.by_sympy(expr)

    def note_size(self, value: Value) -> None:
        if isinstance(value, Fraction):
            top, bottom = value.numerator.bit_length(), value.denominator.bit_length()
            bits = max(top, bottom) if self.exact_sizes else abs(top - bottom)
        elif value == 0 or not mpmath.isfinite(value):
            return
        else:
            bits = abs(mpmath.mag(value))
        self.note_log10(bits * _LOG10_2)

    def note_log10(self, log10: float) -> None:
        self.check_log10(log10, _MAX_LOG10)
        self.size = max(self.size, log10)

    def check_log10(self, log10: float, most: float) -> None:
        if log10 > most:
            raise TooLarge("a number of more than a million digits")

    def inexact(self, value: Value) -> Any:
        self.note_size(value)
        return _inexact(value)

    def settle(self, value: Any) -> Value:
        """Make a result of `mpmath` real if possible. Raise `Undefined` if it is not a number."""
        if isinstance(value, mpmath.mpc):
            if value.imag == 0:
                value = value.real
            elif self.real:
                raise Undefined
        if mpmath.isnan(value):
            raise Undefined
        return value

    def integer(self, value: Value) -> int | None:
        return value.numerator if isinstance(value, Fraction) and value.denominator == 1 else None

    def real_value(self, expr: Basic) -> Value:
        value = self.value(expr)
        if isinstance(value, mpmath.mpc):
            raise Undefined
        return value

    def add(self, *args: Basic) -> Value:
        return self.total(map(self.value, args))

    def total(self, values: Iterable[Value]) -> Value:
        exact, inexact = Fraction(0), []
        for value in values:
            if isinstance(value, Fraction):
                exact += value
            else:
                inexact.append(value)
        if not inexact:
            return exact
        if exact:
            inexact = [self.inexact(exact), *inexact]
        total = mpmath.mpf(0)
        for value in inexact:
            self.note_size(value)
            total += value
        total = self.settle(total)
        if len(inexact) > 1 and mpmath.isfinite(total):
            largest = max(mpmath.mag(value) for value in inexact if value != 0) if any(inexact) else 0
            lost = (largest - mpmath.mag(total)) * _LOG10_2 if total else mpmath.mp.dps
            self.loss += max(0.0, float(lost))
        return total

    def mul(self, *args: Basic) -> Value:
        return self.multiplied(map(self.value, args))

    def multiplied(self, values: Iterable[Value]) -> Value:
        exact, inexact = Fraction(1), None
        for value in values:
            if isinstance(value, Fraction):
                exact *= value
            else:
                self.note_size(value)
                inexact = value if inexact is None else inexact * value
        if inexact is None:
            return exact
        if exact == 0 and mpmath.isfinite(inexact):
            return exact
        return self.settle(inexact if exact == 1 else self.inexact(exact) * inexact)

    def pow(self, base_expr: Basic, exponent_expr: Basic) -> Value:
        exponent = self.value(exponent_expr)
        if type(base_expr).__name__ == "Exp1":
            return self.exp_of(exponent)
        return self.power(self.value(base_expr), exponent)

    def power(self, base: Value, exponent: Value) -> Value:
        if base == 0:
            if isinstance(exponent, mpmath.mpc) or exponent < 0:
                raise Undefined
            return Fraction(1 if exponent == 0 else 0)
        if isinstance(exponent, Fraction):
            n, degree = exponent.numerator, exponent.denominator
            if degree == 1:
                return self.integer_power(base, n)
            if not isinstance(base, mpmath.mpc) and base < 0 and self.real:
                if degree % 2 == 0:
                    raise Undefined
                root = self.power(-base, exponent)
                return -root if n % 2 else root
            if isinstance(base, Fraction) and base > 0 and degree < 1000:
                top, exact_top = _root(base.numerator, degree, self.max_bits)
                bottom, exact_bottom = _root(base.denominator, degree, self.max_bits)
                if exact_top and exact_bottom:
                    return self.integer_power(Fraction(top, bottom), n)
        base, exponent = self.inexact(base), self.inexact(exponent)
        if not mpmath.isfinite(base) or not mpmath.isfinite(exponent):
            return self.settle(mpmath.power(base, exponent))
        self.check_exponent(exponent * mpmath.log(base))
        if exponent == mpmath.mpf("0.5"):
            return self.settle(mpmath.sqrt(base))
        return self.settle(mpmath.power(base, exponent))

    def integer_power(self, base: Value, n: int) -> Value:
        if isinstance(base, Fraction):
            if base in (1, -1):
                return base if n % 2 else Fraction(1)
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if bits * abs(n) <= self.max_bits:
                return base**n
        base = self.inexact(base)
        if mpmath.isfinite(base):
            self.check_exponent(n * mpmath.log(abs(base)))
        return self.settle(base**n)

    def check_exponent(self, exponent: Any) -> None:
        """Refuse e^exponent if it is too large, and count the digits that it loses."""
        self.note_log10(float(abs(mpmath.re(exponent)) / mpmath.log(10)))
        if abs(exponent) > 1:
            self.loss += float(mpmath.log10(abs(exponent)))

    def exp_of(self, exponent: Value) -> Value:
        if exponent == 0:
            return Fraction(1)
        exponent = self.inexact(exponent)
        if mpmath.isfinite(exponent):
            self.check_exponent(exponent)
        return self.settle(mpmath.exp(exponent))

    def log(self, arg: Basic, base: Basic | None = None) -> Value:
        value = self.log_of(self.value(arg))
        return value if base is None else _times(value, self.power(self.log_of(self.value(base)), Fraction(-1)))

    def log_of(self, value: Value) -> Value:
        if value == 0:
            raise Undefined
        if value == 1:
            return Fraction(0)
        if self.real and not isinstance(value, mpmath.mpc) and value < 0:
            raise Undefined
        result = self.settle(mpmath.log(self.inexact(value)))
        if result != 0 and abs(result) < 1:  # near 1, where the relative error grows
            self.loss += max(0.0, -float(mpmath.log10(abs(result))))
        return result

    def sign(self, arg: Basic) -> Value:
        value = self.real_value(arg)
        return Fraction((value > 0) - (value < 0))

    def extreme(self, args: tuple[Basic, ...], sign: int) -> Value:
        values = [self.real_value(arg) for arg in args]
        return max(values, key=lambda value: sign * _inexact(value))

    def rounded(self, arg: Basic, sign: int) -> Value:
        """Return the floor (sign 1) or ceiling (sign -1). Near an integer, more digits are computed."""
        value = self.real_value(arg)
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if sign > 0 else math.ceil(value))
        if not mpmath.isfinite(value):
            return value
        self.note_size(value)
        nearest = mpmath.nint(value)
        if abs(value - nearest) < mpmath.mpf(10) ** -10 or self.size > 30:
            digits = int(min(_MAX_DIGITS, max(mpmath.mp.dps, 60 + 8 * self.size)))
            if digits < 60 + 3 * self.size:
                raise TooLarge("more digits than can be computed")
            with mpmath.workdps(digits):
                value = self.real_value(arg)
                nearest = mpmath.nint(value)
                if abs(value - nearest) <= mpmath.mpf(10) ** -(digits * 5 // 8):
                    return Fraction(int(nearest))
                return Fraction(int(mpmath.floor(value) if sign > 0 else mpmath.ceil(value)))
        return Fraction(int(mpmath.floor(value) if sign > 0 else mpmath.ceil(value)))

    def mod(self, a_expr: Basic, b_expr: Basic) -> Value:
        b = self.real_value(b_expr)
        if b == 0:
            raise Undefined
        if a_expr.is_Pow and type(a_expr.args[0]).__name__ != "Exp1" and (divisor := self.integer(b)):
            base, exponent = (self.integer(self.value(arg)) for arg in a_expr.args)
            if base is not None and exponent is not None and exponent >= 0:
                return Fraction(pow(base, exponent, divisor))  # for powers too large to be computed
        a = self.real_value(a_expr)
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a % b
        a, b = self.inexact(a), self.inexact(b)
        return self.settle(a - b * mpmath.floor(a / b))

    def integers(self, args: tuple[Basic, ...]) -> list[int]:
        found = [self.integer(self.value(arg)) for arg in args]
        if None in found:
            raise Undefined
        return [n for n in found if n is not None]

    def factorial(self, arg: Basic) -> Value:
        value = self.value(arg)
        n = self.integer(value)
        if n is not None and n < 0:
            raise Undefined
        if not isinstance(value, mpmath.mpc):
            self.check_exact(_log10_gamma(value + 1) if value > 0 else 0.0)
        if n is not None and _log10_gamma(value + 1) / _LOG10_2 <= self.max_bits:
            return Fraction(math.factorial(n))
        return self.settle(mpmath.gamma(self.inexact(value) + 1))

    def binomial(self, n_expr: Basic, k_expr: Basic) -> Value:
        top, bottom = self.value(n_expr), self.value(k_expr)
        n, k = self.integer(top), self.integer(bottom)
        if k is not None and k < 0 and n is not None:
            if n < 0:
                raise Undefined
            return Fraction(0)
        if n is not None and k is not None:
            if n < 0:
                return (-1) ** k * self.whole_binomial(k - n - 1, k)
            return self.whole_binomial(n, k)
        if isinstance(top, Fraction) and k is not None and k <= 1000:
            value = Fraction(1)
            for step in range(k):
                value *= (top - step) / (step + 1)
            return value
        return self.settle(mpmath.binomial(self.inexact(top), self.inexact(bottom)))

    def whole_binomial(self, n: int, k: int) -> Fraction:
        if k > n:
            return Fraction(0)
        k = min(k, n - k)
        log10 = _log10_gamma(n + 1) - _log10_gamma(k + 1) - _log10_gamma(n - k + 1)
        if k:
            self.check_exact(log10 if n < 10**12 else k * n.bit_length() * _LOG10_2)
        return Fraction(math.comb(n, k))

    def check_exact(self, log10: float) -> None:
        self.check_log10(log10, min(_MAX_LOG10, self.max_bits * _LOG10_2))

    def sum(self, body: Basic, *limits: Basic) -> Value:
        terms = self.terms(body, limits)
        return self.closed_form(Sum(body, *limits)) if terms is None else self.total(terms)

    def product(self, body: Basic, *limits: Basic) -> Value:
        terms = self.terms(body, limits)
        return self.closed_form(Product(body, *limits)) if terms is None else self.multiplied(terms)

    def terms(self, body: Basic, limits: tuple[Basic, ...]) -> list[Value] | None:
        """
        Return the terms of a sum over one variable between two integers that are not far apart.

        Returns `None` for any other sum.
        """
        if len(limits) != 1 or len(limits[0].args) != 3:
            return None
        variable, first_expr, last_expr = limits[0].args
        first, last = self.integer(self.value(first_expr)), self.integer(self.value(last_expr))
        if first is None or last is None:
            return None
        if last < first - 1:
            raise Undefined
        if last - first >= _MAX_TERMS:
            return None
        outer = self.point.get(variable.name)
        terms = []
        for number in range(first, last + 1):
            self.point[variable.name] = Fraction(number)
            terms.append(self.value(body))
        if outer is not None:
            self.point[variable.name] = outer
        return terms

    def closed_form(self, expr: Basic) -> Value:
        """Compute a sum or product with infinitely or very many terms."""
        if not self.exact_sizes:
            raise Undefined
        closed = expr.doit()
        return self.by_sympy(closed) if closed.has(Sum, Product) else self.value(closed)

    def unknown_function(self, expr: Basic) -> Value:
        """Return a random number that depends only on the function's name, coordinate and arguments' values."""
        values = [self.value(arg) for arg in expr.args]
        shown = [str(v) if isinstance(v, Fraction) else mpmath.nstr(v, 25) for v in values]
        name = expr.func.__name__
        choose = random.Random(f"{name} {self.point.get(name)} {shown}")
        return Fraction(choose.randint(-3 * _DENOMINATOR, 3 * _DENOMINATOR), _DENOMINATOR)

    def by_sympy(self, expr: Basic) -> Value:
        """Compute what is not arithmetic, such as an integral or an infinite sum."""
        values = {
            symbol: I if symbol == _IMAGINARY else _to_sympy(self.point[symbol.name]) for symbol in expr.free_symbols
        }
        try:
            real, imaginary = expr.evalf(mpmath.mp.dps, subs=values).as_real_imag()
            value = mpmath.mpc(mpmath.mpf(real), mpmath.mpf(imaginary))
            if self.exact_sizes:
                self.note_log10(_OPAQUE_SIZE)
        except (TypeError, ValueError, ArithmeticError, NotImplementedError, AttributeError):
            raise Undefined from None
        return self.settle(value)


def _to_sympy(value: Value) -> Expr:
    if isinstance(value, Fraction):
        return Rational(value.numerator, value.denominator)
    return Float(value.real, mpmath.mp.dps) + I * Float(value.imag, mpmath.mp.dps)


def _root(n: int, degree: int, max_bits: int) -> tuple[int, bool]:
    if n.bit_length() > max_bits // 4:
        return 0, False
    root, exact = integer_nthroot(n, degree)
    return int(root), bool(exact)


def _log10_gamma(x: Any) -> float:
    try:
        return math.lgamma(x) / math.log(10)
    except OverflowError:
        return math.inf
    except ValueError:  # a pole
        return 0.0


def _function(name: str) -> Callable[[_Evaluator, Basic], Value]:
    function = getattr(mpmath, name)

    def evaluate(evaluator: _Evaluator, arg: Basic) -> Value:
        value = evaluator.inexact(evaluator.value(arg))
        if not mpmath.isfinite(value):
            raise Undefined
        if isinstance(value, mpmath.mpc) or ("h" in name and name[0] != "a"):
            evaluator.check_exponent(2 * value)  # an exponential in disguise: tanh(200) is not 1
        if abs(value) > 1:  # the argument is reduced by a period
            evaluator.loss += float(mpmath.log10(abs(value)))
        return evaluator.settle(function(value))

    return evaluate


_LEAVES = (Rational, Symbol, AppliedUndef, Tuple)
_METHODS: dict[str, Callable[..., Value]] = {
    "Add": _Evaluator.add,
    "Mul": _Evaluator.mul,
    "Pow": _Evaluator.pow,
    "exp": lambda evaluator, arg: evaluator.exp_of(evaluator.value(arg)),
    "log": _Evaluator.log,
    "Abs": lambda evaluator, arg: abs(evaluator.value(arg)),
    "sign": _Evaluator.sign,
    "Max": lambda evaluator, *args: evaluator.extreme(args, 1),
    "Min": lambda evaluator, *args: evaluator.extreme(args, -1),
    "floor": lambda evaluator, arg: evaluator.rounded(arg, 1),
    "ceiling": lambda evaluator, arg: evaluator.rounded(arg, -1),
    "Mod": _Evaluator.mod,
    "Gcd": lambda evaluator, *args: Fraction(math.gcd(*evaluator.integers(args))),
    "Lcm": lambda evaluator, *args: Fraction(math.lcm(*evaluator.integers(args))),
    "factorial": _Evaluator.factorial,
    "binomial": _Evaluator.binomial,
    "Sum": _Evaluator.sum,
    "Product": _Evaluator.product,
    "Exp1": lambda evaluator: mpmath.e + 0,
    "Pi": lambda evaluator: mpmath.pi + 0,
    "Infinity": lambda evaluator: mpmath.inf,
    "NegativeInfinity": lambda evaluator: -mpmath.inf,
    "ImaginaryUnit": lambda evaluator: mpmath.mpc(0, 1),
    **{
        name: _function(name)
        for root in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch")
        for name in (root, f"a{root}")
    },
}
