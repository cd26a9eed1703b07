r"""Compare formulas by value. Imported in worker processes only: formulas can be expensive, and sympy imports slowly.

A formula is read by this package's `grammar` and compared by its `values`. What is not arithmetic is read by the
library `latex2sympy2_extended`. Integrals, limits and derivatives are evaluated like other formulas. Matrices and sets
are compared by the library `math_verify`.
"""

import re
from itertools import accumulate
from typing import Any

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import Basic, Expr, Float, Limit, MatrixBase, MatrixExpr, Pow, Rational, Set, UnevaluatedExpr
from sympy.core.function import Derivative

from .equality import MIN_DECIMALS, Exact, Verdict
from .forms import decimal_places
from .grammar import TooLarge, Unreadable, parse
from .values import Formula, equal_values, proportional_values

# Constructs that the library is used for. It reads many others wrongly and without an error, see `grammar.py`.
_LIBRARY = re.compile(r"\\(?:int|lim|frac\{(?:d|\\partial)\}|setminus|cap|cup|mathbb|\{)|matrix\}")
# The library would read these wrongly: `f'` as f, `2 3` as 5, `5!!` as (5!)!.
_REFUSED = re.compile(r"'|!!|\d\s+\d|\\text|\\[lc]?dots|\\euro|\\dollar|\\pound|[^\x20-\x7e]|[`\"#@?;]")
_MAX_MATRIX_POWER = 1000
_MAX_NESTING = 20  # for the library, whose parser takes a second for twice this depth

__all__ = ["Symbolic", "TooLarge"]


class Symbolic:
    """
    Comparison of formulas by value. Returns False for what cannot be parsed.

    It keeps every formula that it has read, so use one instance per answer.
    """

    def __init__(self) -> None:
        self._exact = Exact()
        self._read: dict[str, Any] = {}

    def equal(self, a: str, b: str) -> Verdict:
        verdict = self._exact.equal(a, b)
        if verdict is not None:
            return verdict
        left, right = self._formula(a), self._formula(b)
        if isinstance(left, Formula) and isinstance(right, Formula):
            return equal_values(left, right, _decimals_shown(a, b))
        if isinstance(left, MatrixBase) and isinstance(right, MatrixBase):
            return _equal_matrices(left, right)
        if isinstance(left, Set) or isinstance(right, Set):  # `[0,5]\cap[2,9]`, `[2,5]`: the second is not a formula
            left, right = (
                _parse_by_library(text) if found is None else found for text, found in ((a, left), (b, right))
            )
        if isinstance(left, Set) and isinstance(right, Set):
            return verify(left, right, timeout_seconds=None)
        return False

    def proportional(self, a: str, b: str, positive: bool) -> Verdict:
        if self._exact.proportional(a, b, positive):
            return True
        left, right = self._formula(a), self._formula(b)
        if not isinstance(left, Formula) or not isinstance(right, Formula):
            return False
        return proportional_values(left, right, positive)

    def _formula(self, text: str) -> Any:
        """Return a `Formula`, or a matrix or set of sympy, or `None`."""
        if text not in self._read:
            try:
                self._read[text] = Formula(parse(text))
            except Unreadable:
                self._read[text] = _parse_by_library(text) if _LIBRARY.search(text) else None
        return self._read[text]


def _decimals_shown(a: str, b: str) -> int:
    """
    Return the places of the decimal if exactly one of the two formulas is a decimal.

    It must be long enough to stand for a value. Returns 0 otherwise.
    """
    shown = [decimal_places(formula) for formula in (a, b)]
    return max(shown) if min(shown) == 0 and max(shown) >= MIN_DECIMALS else 0


def _equal_matrices(left: MatrixBase, right: MatrixBase) -> bool:
    return left.shape == right.shape and all(
        equal_values(Formula(a), Formula(b)) for a, b in zip(left.flat(), right.flat(), strict=True)
    )


def _parse_by_library(formula: str) -> Any:
    """Return a `Formula`, or a matrix or set of sympy, or `None`, as the library reads it."""
    formula = formula.replace("*", r"\cdot ").replace(r"\cr ", "\\\\")
    if _REFUSED.search(formula):
        return None
    if _nesting(formula) > _MAX_NESTING:
        raise TooLarge("nested too deeply")
    try:
        parsed = latex2sympy(
            formula,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=False),
        )
    except (RecursionError, MemoryError, OverflowError):
        raise
    except Exception:  # the parser raises plain Exceptions for what it does not understand
        return None
    if not isinstance(parsed, Basic | MatrixBase):
        return None
    parsed = parsed.xreplace({number: Rational(str(number)) for number in parsed.atoms(Float)})
    if isinstance(parsed, Pow) and isinstance(parsed.base, MatrixBase):
        power = parsed.exp
        return parsed.base**power if power.is_Integer and abs(power) <= _MAX_MATRIX_POWER else None
    if isinstance(parsed, MatrixExpr | Set) or parsed.has(Limit, Derivative, UnevaluatedExpr):
        parsed = parsed.doit()
    return Formula(parsed) if isinstance(parsed, Expr) and not isinstance(parsed, MatrixExpr) else parsed


def _nesting(formula: str) -> int:
    return max(accumulate((character in "{([") - (character in "])}") for character in formula), default=0)
