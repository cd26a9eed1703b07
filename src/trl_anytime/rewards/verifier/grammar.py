r"""Read a formula into an unevaluated sympy tree: numbers, letters, powers, fractions, roots, functions, sums.

This package has its own reader because the library's grammar reads common answers wrongly and without an error. It
reads `\cos t \cdot 2` as cos(2t), `2(3)` as 5, `dp` as a differential, and `log(5)` as a product of three letters.
What is not arithmetic (integrals, limits, matrices, sets) is left to the library, see `symbolic.py`.

The reader never evaluates, takes time linear in the length, and bounds the nesting. Formulas must be normalised, see
`latex.normalize`.
"""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import sympy
from sympy import Abs, Add, E, Expr, Function, Integer, Mod, Mul, Pow, Product, Rational, Sum, Symbol, log


class Unreadable(Exception):
    """The text is not a formula of this grammar."""


class TooLarge(Exception):
    """A formula is nested too deeply, or a number is too large, to be evaluated in reasonable time."""


class Gcd(Function):
    """Greatest common divisor. The one of sympy evaluates at once and takes polynomials."""


class Lcm(Function):
    """Least common multiple."""


_MAX_NESTING = 60  # a level takes six calls, which stays far below Python's recursion limit of 1000

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|[A-Za-z]+|\S", re.DOTALL)
_INVERSE = {
    getattr(sympy, name): getattr(sympy, f"a{name}")
    for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth", "sech", "csch")
}
# Functions that may stand without parentheses: `\sin 2x`.
_FUNCTIONS: dict[str, Any] = {function.__name__: function for function in (*_INVERSE, sympy.exp)}
for _function, _inverse in _INVERSE.items():
    _name = _function.__name__
    _FUNCTIONS |= dict.fromkeys((_inverse.__name__, f"arc{_name}", f"ar{_name}"), _inverse)
_FUNCTIONS |= {"tg": sympy.tan, "ctg": sympy.cot, "arctg": sympy.atan, "arcctg": sympy.acot}
_LOGARITHMS = {"ln": E, "log": Integer(10), "lg": Integer(10)}
# Functions that are always called: `\max(a, b)`, `floor(x)`.
_CALLS: dict[str, Any] = {
    "max": sympy.Max,
    "min": sympy.Min,
    "gcd": Gcd,
    "lcm": Lcm,
    "abs": Abs,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "ceiling": sympy.ceiling,
    "sgn": sympy.sign,
    "sign": sympy.sign,
    "factorial": sympy.factorial,
    "cbrt": lambda value, evaluate: Pow(value, Rational(1, 3), evaluate=evaluate),
}
_NAMES = {*_FUNCTIONS, *_LOGARITHMS, *_CALLS}
_GREEK = set(
    re.findall(
        r"\\\w+",
        r"\alpha\beta\gamma\delta\epsilon\varepsilon\zeta\eta\theta\vartheta\iota\kappa\lambda\mu\nu\xi\rho\varrho"
        r"\sigma\tau\upsilon\phi\varphi\chi\psi\omega\Gamma\Delta\Theta\Lambda\Xi\Sigma\Upsilon\Phi\Psi\Omega\ell\hbar",
    )
)
_ACCENTS = {r"\vec", r"\hat", r"\widehat", r"\bar", r"\overline", r"\overrightarrow", r"\tilde", r"\mathbf"}
_CONSTANTS = {r"\pi": sympy.pi, r"\infty": sympy.oo, "e": E}
_PAIRS = {"(": ")", "{": "}", "[": "]", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil", "|": "|"}
_MODULO = {r"\mod", r"\bmod"}
_STARTS = {*_PAIRS, *_GREEK, *_ACCENTS, *_CONSTANTS, r"\frac", r"\binom", r"\sqrt", r"\sum", r"\prod"} - {r"\{"}
_NAME_IN_TEXT = re.compile(rf"\\text\s*\{{\s*({'|'.join(sorted(_NAMES | {'mod'}, key=len, reverse=True))})\s*\}}")
_BASE_IN_NAME = re.compile(r"(?<![A-Za-z\\])log(2|10)(?=\s*\()")  # `log2(8)`, as in code
_GLUED = re.compile(rf"([A-Za-z]?)({'|'.join(sorted({*_FUNCTIONS, *_LOGARITHMS}, key=len, reverse=True))})([A-Za-z]?)")


def parse(formula: str) -> Expr:
    """Read a formula, as [`normalize`] returns it, into its unevaluated tree.

    The letter e is Euler's number. The letter i is the symbol i.

    Raises:
        `Unreadable`: If the text is not a formula of this grammar.
        `TooLarge`: If the formula is nested too deeply.
    """
    reader = _Reader(_tokens(formula))
    value = reader.sum()
    if reader.next:
        raise Unreadable(reader.next)
    return value


def _tokens(formula: str) -> list[str]:
    """Split a formula into tokens: names of functions as control words, all other words as letters."""
    out: list[str] = []
    formula = _BASE_IN_NAME.sub(r"\\log_{\1}", _NAME_IN_TEXT.sub(r"\\\1 ", formula))
    for token, following in pairwise([*_TOKEN.findall(formula), ""]):
        if not token[0].isalpha():
            out.append(token)
        elif token in _FUNCTIONS or token in _LOGARITHMS or token == "mod" or (token in _CALLS and following == "("):
            out.append("\\" + token)
        elif match := _GLUED.fullmatch(token):
            out += filter(None, (match[1], "\\" + match[2], match[3]))
        else:
            out += token
    return out


class _Reader:
    """Recursive descent. Each method reads one construct from the front of the remaining tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.nesting = 0
        self.in_bars = False
        self.bound: dict[str, Symbol] = {}  # variables of the enclosing sums, by their letter

    @property
    def next(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.next
        if not token or (expected and token != expected):
            raise Unreadable(token)
        self.position += 1
        return token

    def sum(self) -> Expr:
        terms = [self.term(self.minus())]
        while self.next in ("+", "-"):
            terms.append(self.signed(self.term))
        return terms[0] if len(terms) == 1 else Add(*terms, evaluate=False)

    def signed(self, read: Callable[[], Expr]) -> Expr:
        """Read signs, then what follows them."""
        return _with_sign(self.minus(), read())

    def minus(self) -> bool:
        """Read signs. Return whether they make a minus."""
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        return negative

    def term(self, negative: bool = False) -> Expr:
        r"""
        Read a product, with operators.

        `negative` says that the term begins with a minus, as in `-1 \bmod 5`, which is 4.
        """
        start = self.position
        value = self.product()
        # One token, or one in brackets
        literal = self.position == start + 1 or (self.position == start + 3 and self.tokens[start] in "({")
        while True:
            if self.next == "*":
                self.take()
                value = Mul(value, self.signed(self.product), evaluate=False)
            elif self.next == "/":
                self.take()
                value = _quotient(value, self.divisor(literal and value.is_number))
            elif self.next in _MODULO:
                self.take()
                value, negative = _with_sign(negative, value), False
                value = Mod(value, self.signed(self.product), evaluate=False)
            elif self.starts_factor():  # after a divisor that ended early
                value = Mul(value, self.product(), evaluate=False)
            else:
                return _with_sign(negative, value)
            literal = False

    def divisor(self, after_number: bool) -> Expr:
        r"""
        Read the divisor after `/`.

        `1/2\pi` and `1/(2)x` are read from left to right. In `a/bc`, bc is the divisor.
        """
        if self.next in ("+", "-"):
            return self.signed(self.product)
        start = self.position
        value = self.factor()
        if self.tokens[start] == "(" or (after_number and _is_number(self.tokens[start])):
            return value
        return self.product_from(start, value, stop_at_group=True)

    def product(self) -> Expr:
        start = self.position
        return self.product_from(start, self.factor())

    def product_from(self, start: int, value: Expr, stop_at_group: bool = False, functions: bool = True) -> Expr:
        """Read the factors that follow without an operator, and return the product with `value`."""
        factors = [value]
        while self.starts_factor() and not (stop_at_group and self.next in ("(", "[")):
            if not functions and self.next[1:] in _NAMES:
                break
            bare = self.position == start + 1
            before = self.tokens[start]
            start = self.position
            factor = self.factor()
            if _is_number(self.tokens[start]) and bare and (_is_number(before) or before.isalpha()):
                raise Unreadable("two numbers, or a letter and a number, side by side")
            mixed = bare and before.isdecimal() and len(factors) == 1 and self.tokens[start] == r"\frac"
            if mixed and self._plain_fraction(start):
                factors = [Add(value, factor, evaluate=False)]
            else:
                factors.append(factor)
        return factors[0] if len(factors) == 1 else Mul(*factors, evaluate=False)

    def _plain_fraction(self, start: int) -> bool:
        tokens = self.tokens[start + 1 : self.position]
        return len(tokens) == 6 and tokens[1].isdecimal() and tokens[4].isdecimal()

    def starts_factor(self) -> bool:
        token = self.next
        if token == "|":
            return not self.in_bars
        return bool(token) and (token in _STARTS or token.isalnum() or _is_number(token) or token[1:] in _NAMES)

    def factor(self) -> Expr:
        """Read an atom with the powers, factorials and signs of per cent or degrees after it."""
        value = self.atom()
        while True:
            if self.next == "^":
                self.take()
                if self.next == r"\circ":
                    self.take()
                    value = Mul(value, sympy.pi, Rational(1, 180), evaluate=False)
                else:
                    value = Pow(value, self.exponent(), evaluate=False)
            elif self.next == "!":
                self.take()
                if self.next == "!":
                    raise Unreadable("double factorial")
                value = sympy.factorial(value, evaluate=False)
            elif self.next == "%":
                self.take()
                value = Mul(value, Rational(1, 100), evaluate=False)
            else:
                return value

    def exponent(self) -> Expr:
        """Read the exponent after `^`: a group or one atom, with a sign. `a^b^c` is a^(b^c)."""
        return self.signed(self.unsigned_exponent)

    def unsigned_exponent(self) -> Expr:
        value = self.atom(script=True)
        if self.next == "^":
            self.take()
            value = Pow(value, self.exponent(), evaluate=False)
        return value

    def atom(self, script: bool = False) -> Expr:
        token = self.take()
        if token in _PAIRS and token != r"\{":
            return self.bracketed(token)
        if _is_number(token):
            return self.number(token)
        if token == r"\frac":
            return self.fraction()
        if token == r"\binom":
            return sympy.binomial(self.group(), self.group(), evaluate=False)
        if token == r"\sqrt":
            degree = self.group("[") if self.next == "[" else Integer(2)
            return Pow(self.group(), Pow(degree, -1, evaluate=False), evaluate=False)
        if token in (r"\sum", r"\prod"):
            return self.big_operator(Sum if token == r"\sum" else Product)
        name = token[1:]
        if token[0] == "\\" and name in _CALLS:
            arguments = self.arguments()
            try:
                return _CALLS[name](*arguments, evaluate=False)
            except TypeError:  # `\gcd` takes any number of arguments, the others a fixed one
                raise Unreadable(token) from None
        if token in _MODULO and self.next == "(":
            arguments = self.arguments()
            if len(arguments) != 2:
                raise Unreadable(token)
            return Mod(*arguments, evaluate=False)
        if token[0] == "\\" and (name in _FUNCTIONS or name in _LOGARITHMS):
            return self.function(name)
        if token in _ACCENTS:
            name = " ".join(self.raw_group())
            if name[:1].isdigit():  # digits that repeat
                raise Unreadable(token)
            return Symbol(token + name)
        if (token.isalpha() and token.isascii()) or token in _GREEK or token in _CONSTANTS:
            return self.symbol(token, script)
        raise Unreadable(token)

    def bracketed(self, opening: str) -> Expr:
        value = self.inside(opening, self.sum)
        if opening == "|":
            return Abs(value, evaluate=False)
        if opening in (r"\lfloor", r"\lceil"):
            return (sympy.floor if opening == r"\lfloor" else sympy.ceiling)(value, evaluate=False)
        return value

    def inside(self, opening: str, read: Callable[[], Any]) -> Any:
        """Read up to the closing bracket. The opening one has been read."""
        self.nesting += 1
        if self.nesting > _MAX_NESTING:
            raise TooLarge("nested too deeply")
        in_bars, self.in_bars = self.in_bars, opening == "|"
        value = read()
        self.in_bars = in_bars
        self.take(_PAIRS[opening])
        self.nesting -= 1
        return value

    def group(self, opening: str = "{") -> Expr:
        return self.inside(self.take(opening), self.sum)

    def raw_group(self) -> list[str]:
        """Return the tokens of a group in braces, or the single token in place of one."""
        if self.next != "{":
            return [self.take()]
        self.take()
        out: list[str] = []
        level = 1
        while True:
            token = self.take()
            level += (token == "{") - (token == "}")
            if not level:
                return out
            out.append(token)

    def arguments(self) -> list[Expr]:
        opening = self.take()
        if opening not in ("(", "{", r"\{", "["):
            raise Unreadable(opening)
        return self.inside(opening, self.comma_list)

    def comma_list(self) -> list[Expr]:
        if self.next in ("(", r"\{"):  # `\operatorname{max}{(a, b)}`
            start = self.position
            try:
                inner = self.arguments()
                if self.next in (")", "}", r"\}", "]"):
                    return inner
            except Unreadable:
                pass
            self.position = start
        values = [self.sum()]
        while self.next == ",":
            self.take()
            values.append(self.sum())
        return values

    def number(self, token: str) -> Expr:
        if self.next == "_":  # digits in another base
            self.take()
            base = "".join(self.raw_group())
            if not (token.isdecimal() and base.isdecimal() and 2 <= int(base[:3]) <= 36):
                raise Unreadable(token)
            try:
                return Integer(int(token, int(base)))
            except ValueError:  # a digit that the base does not have
                raise Unreadable(token) from None
        try:
            return Integer(token) if token.isdecimal() else Rational(token)
        except ValueError:  # more digits than Python converts to an int
            raise TooLarge(token) from None

    def fraction(self) -> Expr:
        start = self.position
        top, bottom = self.raw_group(), self.raw_group()
        if top[:1] == ["d"] and bottom[:1] == ["d"] and len(bottom) > 1:
            if len(top) == 1:
                raise Unreadable("a derivative of what follows")
            return Symbol(f"{' '.join(top)}/{' '.join(bottom)}")
        self.position = start
        return _quotient(self.group(), self.group())

    def symbol(self, token: str, script: bool) -> Expr:
        following = self.tokens[self.position : self.position + 4]
        if token == "d" and len(following) == 4 and following[1:3] == ["/", "d"] and following[3].isalpha():
            self.position += 4
            return Symbol(f"d {following[0]}/d {following[3]}")
        if self.next == "_" and not script:
            self.take()
            return self.indexed(token)
        if self.next == "'":
            raise Unreadable("'")
        if self.next == "(" and not script and self.is_called(token):
            return Function(token)(*self.arguments())
        return self.bound.get(token) or _CONSTANTS.get(token) or Symbol(token)

    def is_called(self, letter: str) -> bool:
        """
        Return whether a letter before a parenthesis is a function.

        It is one if it is f or g, or if the parenthesis holds a single other letter.
        """
        inner, closing = ([*self.tokens[self.position + 1 : self.position + 3], "", ""])[:2]
        single = len(inner) == 1 and inner.isalpha() and closing == ")" and inner != letter
        return letter.isalpha() and letter not in self.bound and letter not in "ei" and (letter in "fgFG" or single)

    def indexed(self, letter: str) -> Expr:
        """
        Read a letter with its index.

        The result is a function of the index if that must be computed (`a_{n-1}`), else a name.
        """
        start = self.position
        raw = self.raw_group()
        if any(token in "+-*/" or token in self.bound for token in raw):
            self.position = start
            return Function(letter + "_")(self.group() if self.next == "{" else self.atom(script=True))
        if len(raw) == 1 and raw[0].isalpha() and raw[0] not in "ei":
            return Function(letter + "_")(Symbol(raw[0]))
        return Symbol(f"{letter}_{' '.join(raw)}")

    def function(self, name: str) -> Expr:
        power: Expr | None = None
        base: Expr = _LOGARITHMS.get(name, E)
        while self.next in ("^", "_"):
            if self.take() == "^":
                power = self.exponent()
            elif name == "log":
                base = self.log_base()
            else:
                raise Unreadable("_")
        argument = self.argument()
        inverse = power is not None and power.doit() == -1
        if name in _LOGARITHMS:
            value = log(argument, evaluate=False)
            if base != E:
                value = _quotient(value, log(base, evaluate=False))
        elif inverse and _FUNCTIONS[name] in _INVERSE:
            return _INVERSE[_FUNCTIONS[name]](argument, evaluate=False)
        else:
            value = _FUNCTIONS[name](argument, evaluate=False)
        if inverse:
            raise Unreadable("the inverse of a function that has no name here")
        return value if power is None else Pow(value, power, evaluate=False)

    def log_base(self) -> Expr:
        r"""Read the base of a logarithm. `\log_28` is \log_2 8, as in TeX. `\log_10 5` has base 10."""
        if self.next == "{":
            return self.group()
        token = self.next
        if token.isdecimal() and len(token) > 1:
            self.position += 1
            if not self.starts_factor():
                self.position -= 1
                self.tokens[self.position] = token[1:]
                return Integer(token[0])
            return Integer(token)
        return self.atom(script=True)

    def argument(self) -> Expr:
        r"""Read the argument of a function.

        It is a group, or a product up to the next operator, function or parenthesis.

        `\sin\pi/6` is \sin(\pi/6), `\sin x/2` is (\sin x)/2.
        """
        if self.next in ("(", "{", "[", "|"):
            return self.bracketed(self.take())
        if self.next in ("+", "-"):
            return self.signed(self.argument)
        start = self.position
        value = self.factor()
        value = self.product_from(start, value, stop_at_group=not _is_number(self.tokens[start]), functions=False)
        angle = r"\pi" in self.tokens[start : self.position] and not value.free_symbols
        if angle and self.next == "/" and _is_number((self.tokens[self.position + 1 : self.position + 2] or [""])[0]):
            self.take()
            value = _quotient(value, self.number(self.take()))
        return value

    def big_operator(self, operator: Any) -> Expr:
        lower: tuple[Symbol, str, Expr] | None = None
        upper: Expr | None = None
        while self.next in ("_", "^"):
            if self.take() == "^":
                upper = self.group() if self.next == "{" else self.atom(script=True)
            else:
                lower = self.inside(self.take("{"), self.lower_limit)
        if lower is None or upper is None:
            raise Unreadable("a sum without limits")
        variable, letter, first = lower
        outer = dict(self.bound)
        self.bound[letter] = variable
        body = self.term()
        self.bound = outer
        return operator(body, (variable, first, upper))

    def lower_limit(self) -> tuple[Symbol, str, Expr]:
        letter = self.take()
        if not letter.isalpha():
            raise Unreadable(letter)
        self.take("=")
        return Symbol(f"{letter}'{len(self.bound)}", integer=True), letter, self.sum()


def _with_sign(negative: bool, value: Expr) -> Expr:
    return Mul(-1, value, evaluate=False) if negative else value


def _quotient(top: Expr, bottom: Expr) -> Expr:
    return Mul(top, Pow(bottom, -1, evaluate=False), evaluate=False)


def _is_number(token: str) -> bool:
    return token[0].isdecimal() if token else False
