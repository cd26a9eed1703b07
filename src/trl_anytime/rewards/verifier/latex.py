r"""Write each answer in one spelling: clean up LaTeX as models and data sets write it, without judging its meaning.

`normalize` maps the many spellings of one formula to one. `tokens` compares formulas without their white space. Both
are plain string functions, make a fixed number of passes, and never raise.

This package has its own normalisation because a library's belongs to its own parser. It drops text and units, which
`forms.py` reads. It does not know the spellings of data sets (`1,\!000`, `{1 \over 2}`, `x \in \Bbb R`).
"""

import re
import unicodedata
from functools import lru_cache

_UNICODE = str.maketrans(
    {
        **dict.fromkeys("−–—‐‑﹣", "-"),
        **dict.fromkeys("×✕", r"\times "),
        **dict.fromkeys("·⋅∙•", r"\cdot "),
        **dict.fromkeys("‘’′", "'"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **{sign: f"^{power}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
        **{sign: f"_{index}" for index, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
        **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
        **{"π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda "},
        **{"μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "δ": r"\delta "},
        **{"∞": r"\infty ", "°": r"^\circ ", "√": " sqrt", "±": r"\pm ", "∓": r"\mp ", "÷": "/", "⁄": "/", "∕": "/"},
        **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "∖": r"\setminus "},
        **{"∠": r"\angle ", "△": r"\triangle ", "∀": r"\forall ", "…": r"\ldots ", "⋯": r"\ldots "},
        **{"∧": r"\land ", "∨": r"\lor ", "∉": r"\notin ", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}"},
        **{"≡": r"\equiv ", "∼": r"\sim "},
        **{"⟨": r"\langle ", "⟩": r"\rangle ", "％": "%", "＄": "$", "€": r"\euro ", "£": r"\pound "},
        **{"¥": r"\yen ", "₹": r"\rupee ", "¢": r"\text{ cents}"},
    }
)

_END = r"(?![A-Za-z])"  # a control word ends where its letters end
_TRIGONOMETRIC = "(?:arc?)?(?:sin|cos|tan|cot|sec|csc)h?"

_GAP = (
    r"(?:\\[ ,;:!]|[\s,]){0,4}"  # a comma and spaces before `and`; bounded, or a thousand commas take quadratic time
)

_FOR = (
    r"(?:for\s+(?:all|any|every|each|some|integers?|real|(?:an?|the)\s+integer)"
    r"|(?:for|where|with)\s*\}?\s*[A-Za-z]\s*(?:\\in|(?:\\text\s*\{\s*)?is\s+an?y?\s))"
)
_LETTER_UNITS = {
    **{"A": "ampere", "J": "joule", "K": "kelvin", "L": "liter", "N": "newton", "V": "volt", "W": "watt"},
    **{"g": "gram", "h": "hour", "l": "liter", "m": "meter", "s": "second"},
}
_TH = "(?:st|nd|rd|th)"
# Letters of Chinese, Japanese and Korean. After a number they are its unit, except those that change the number.
_CJK = "(?:(?![万亿億千百十半以余多少第])[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7af])"

# Clauses about a variable after an answer: `for all x`, `where n is an integer`, `for n \in \mathbb{Z}`.
_QUANTIFIER = re.compile(
    rf"{_GAP}\(?\s*(?:\\forall{_END}|(?:\\text\s*\{{[\s,;(]*|(?<![A-Za-z\\])){_FOR})(?P<rest>.*)$", re.DOTALL
)
_DOMAINS = tuple(
    (re.compile(pattern), domain)
    for pattern, domain in (
        (r"non-?\s?negative integer|\\mathbb\{Z\}\s*_\s*\{?\s*\\ge\s*0", r"\mathbb{Z}_0"),
        (
            r"positive integer|natural|\\mathbb\{N\}|\\mathbb\{Z\}\s*(?:\^\s*\{?\s*\+|_\s*\{?\s*(?:\+|>\s*0|\\ge ?1))",
            r"\mathbb{N}",
        ),
        (r"integer|\\mathbb\{Z\}", r"\mathbb{Z}"),
        (r"\brational|\\mathbb\{Q\}", r"\mathbb{Q}"),
        (r"\breal|\\mathbb\{R\}", r"\mathbb{R}"),
    )
)


def _domain(said: str) -> str:
    return next((name for pattern, name in _DOMAINS if pattern.search(said)), "")


def _write_quantifier(match: re.Match[str]) -> str:
    r"""Replace a clause about a variable by `\forall`, its variable and its domain, each if given."""
    said = match[0]
    rest = re.sub(r"_\s*\{[^{}]*\}", "", match["rest"])
    if re.search(r"[=<>\d]|\\(?:le|ge|ne)(?![A-Za-z])", rest):  # a condition on values stays
        return said
    words = re.sub(r"\\[A-Za-z]+\s*(?:\{[A-Z]\})?|[a-z]{2,}", " ", said)
    variable = re.search(r"[A-Za-z]", words)
    return rf", \forall {variable[0] if variable else ''} {_domain(said)}"


_MEMBERSHIP = re.compile(
    rf"(?:{_GAP}(?<=[\s,;(])|(?:\\[ ,;:!]|\s){{0,4}}\()\s*(?P<variable>[A-Za-z])\s*\\in\s*\\mathbb\{{[ZNQR]\}}"
    r"(?:\s*[_^]\s*(?:\{[^{}]*\}|\S))?\s*\)?(?=\s*(?:$|[,;.]|\\lor))"
)


def _write_membership(match: re.Match[str]) -> str:
    r"""
    Replace `, n \in \mathbb{Z}` after an answer in n in the same way.

    It stays if it says which values the answer means.
    """
    head = re.sub(r"\\(?!le|ge|ne)[A-Za-z]+", " ", match.string[: match.start()])
    domain = _domain(match[0])
    if match["variable"] not in head or (domain != r"\mathbb{R}" and re.search(r"[<>]|\\(?:le|ge|ne)", head)):
        return match[0]
    return rf", \forall {match['variable']} {domain}"


_EXCEPTION = re.compile(r"(?<![A-Za-z\\])(?:for|[a-z]\s*=)|\\text\s*\{|[{}](?<!\\.)")


def _repeating(decimal: str) -> str | None:
    r"""Write `0.1666`, when it is said to continue, as `0.1\overline{6}`. Return `None` without a period."""
    whole, _, digits = decimal.partition(".")
    for length in range(1, len(digits) // 2 + 1):
        period = digits[-length:]
        times = 3 if length == 1 or digits != 2 * period else 2
        if digits.endswith(times * period):
            return rf"{whole}.{digits[: -times * length]}\overline{{{period}}}"
    return None


# Order matters: each step sees the result of the ones above it.
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[\x00-\x08\x0e-\x1f\x7f]", " "),
        (r"\\\\(?:\[[^\[\]]*\])?", r"\\cr "),  # a line break of a matrix
        (r"\\(?:m?left|m?right|middle|[bB]igg?[lrm]?)" + _END + r"\s*\.?", ""),
        (
            r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|mathstrut|strut|centering)" + _END,
            " ",
        ),
        (r"\\(?:color|textcolor)\s*\{[^{}]*\}", ""),
        (r"\\(?:hspace|vspace|phantom|hphantom|label|tag)\*?\s*\{[^{}]*\}", " "),
        (r"\\[dtc]frac" + _END, r"\\frac"),
        (r"\\[dt]binom" + _END, r"\\binom"),
        (r"\\(?:leq|leqslant|leqq)" + _END, r"\\le "),
        (r"\\(?:geq|geqslant|geqq)" + _END, r"\\ge "),
        (r"\\neq" + _END + r"|\\not\s*(?:=|\{\s*=\s*\})", r"\\ne "),
        (r"\\not\s*\\in" + _END, r"\\notin "),
        (r"(?<![\d)!])!=|(?<=\s)!=", r"\\ne "),  # after a digit, as in `5!=120`, it is a factorial
        (r"\\lt" + _END, "<"),
        (r"\\gt" + _END, ">"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\lbrace" + _END, r"\\{"),
        (r"\\rbrace" + _END, r"\\}"),
        (r"\\lbrack" + _END, "["),
        (r"\\rbrack" + _END, "]"),
        (r"\\(?:lparen|langle)" + _END, "("),
        (r"\\(?:rparen|rangle)" + _END, ")"),
        (r"\\(?:lvert|rvert|vert)" + _END, "|"),
        (r"\\(?:simeq|thickapprox)" + _END, r"\\approx "),
        (r"\\(?:backslash|smallsetminus)" + _END, r"\\setminus "),
        (r"(\\mathbb\s*\{?\s*[RQZNC]\s*\}?|\\reals|\\\}|[)\]])\s*-\s*(?=\\\{)", r"\1\\setminus "),
        (r"\\(?:[ld]dots|dots[cbmio]|cdots|dots)" + _END + r"|\.\.\.+", r"\\ldots "),
        (r"\\overrightarrow" + _END, r"\\vec"),
        (r"\\widehat" + _END, r"\\hat"),
        (r"(\\(?:tri)?angle)\s*\{\s*([A-Z]+)\s*\}", r"\1 \2"),
        (r"\\colon" + _END, ":"),
        (r"\\(?:wedge|land)" + _END, r"\\land "),
        (
            r"\\(?:hat|vec)\s*(?:\{\s*\\?(?:mathbf\s*\{)?\s*([ijk])(?:math)?\s*\}{1,2}|([ijk])(?![A-Za-z]))",
            r" \1\2",  # unit vectors
        ),
        (r"\\vec\s*(?:\{\s*([A-Za-z])\s*\}|([A-Za-z])(?![A-Za-z]))", r" \1\2"),
        (r"\\(?:varnothing|empty)" + _END, r"\\emptyset "),
        (r"\\(?:degrees?|textdegree)" + _END, r"^\\circ "),
        (r"\^\s*\{\s*\\circ\s*\}", r"^\\circ "),
        (r"\\(?:mathbb|mathbf|Bbb)\s*\{?\s*([RQZNC])\s*\}?" + _END, r"\\mathbb{\1}"),
        (r"\\reals" + _END, r"\\mathbb{R}"),
        (rf"\\operatorname\*?\s*\{{\s*({_TRIGONOMETRIC}|log|ln|exp|gcd|lcm|max|min)\s*\}}", r"\\\1 "),
        (rf"\\(?:mathrm|text)\s*\{{\s*({_TRIGONOMETRIC}|log|ln|exp|pi|infinity)\s*\}}", r"\\\1 "),
        # One letter in upright type after a number is a unit.
        (
            r"(?<=[\d}])((?:\\[ ,;:!]|[\s~])*)\\(?:mathrm|text|textrm|rm)\s*\{[\s~]*([AJKLNVWghlms])[\s~]*\}",
            lambda match: f"{match[1]}\\text{{ {_LETTER_UNITS[match[2]]}}}",
        ),
        (
            r"\\frac\s*\{\s*\\(?:mathrm|text)\s*\{([^{}]*)\}\s*\}\s*\{\s*\\(?:mathrm|text)\s*\{([^{}]*)\}"
            r"(\s*\^\s*(?:\{\s*\d\s*\}|\d))?\s*\}",
            r"\\text{ \1/\2\3}",
        ),
        (r"\\(?:mathrm|mathbf|mathit|mathsf|mathnormal|boldsymbol|bm|mathcal)\s*\{\s*([A-Za-z0-9])\s*\}", r" \1"),
        (r"\\(?:boldsymbol|bm|mathbf|underline|fbox|boxed|ensuremath)\s*(?=\{)", " "),
        (
            r"\\(?:text(?:bf|it|rm|sf|tt|normal|sc|up|md)|mbox|hbox|math(?:rm|bf|it|sf|tt)|emph|operatorname\*?)\s*\{",
            r"\\text{",
        ),
        (
            rf"(?<=\d)(?:\^\s*\{{\s*(?:\\text\s*\{{\s*{_TH}\s*\}}|{_TH})\s*\}}|\^?\s*\\text\s*\{{\s*{_TH}\s*\}}|{_TH}{_END})",
            "",
        ),
        (rf"(?<=[\d}})])\s*(?:\\text\s*\{{\s*{_CJK}+\s*\}}|{_CJK}+)(?=\s*[.。]?\s*$)", ""),
        (_QUANTIFIER, _write_quantifier),
        *((r"(\\text\s*\{[^{}]*\^)\s*\{\s*([-+]?\d)\s*\}", r"\1\2"),) * 3,  # powers of units, one at a time
        # Inside \text{}, a number, a choice, a variable (no unit: m, g, s, h, l) or nothing means the same as outside.
        (r"\\text\s*\{\s*((?:\(\s*[A-Za-z]\s*\))|[A-Z][.)]?|[a-fi-knopqrt-z]|[-+\d., ]*\d|)\s*\}", r" \1 "),
        (r"\\text\s*\{\s*([-+]?\d[\d.,]*\s*(?:hundred|thousand|million|billion|trillion))\s*\}", r" \1 "),
        (r"(?<![A-Za-z\\])(?:\\text\s*\{\s*Rs\.?\s*\}|Rs\.?)(?=(?:\\[ ,;:!]|\s)*\d)", r"\\rupee "),
        (r"\\text\s*\{\s*(?:approximately|approx\.?|about|roughly)\s*\}", r"\\approx "),
        (rf"(?<![A-Za-z\\{{])(?:approximately|about|roughly){_END}", r"\\approx "),
        (rf"{_GAP}(?:\\text\s*\{{[\s,;]*or[\s,]*\}}|(?<![A-Za-z\\{{])or{_END}|\\(?:lor|vee){_END})", r"\\lor "),
        (rf"{_GAP}(?:\\text\s*\{{[\s,;]*and[\s,]*\}}|(?<![A-Za-z\\{{])and{_END}|\\land{_END})", ","),
        (_MEMBERSHIP, _write_membership),
        # Thousands: {,} and thin spaces between digits; `,\!` as the MATH data set writes it.
        (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\[!,;:]|\\[!,;:>])\s*(?:\\[!,;:]\s*)*(?=\d{3}(?!\d))", ""),
        (r"\\[,;:!> \n\t]|~|\\(?:quad|qquad|space|enspace|thinspace|nobreakspace)" + _END, " "),
        (
            r"\\(?:percent)"
            + _END
            + r"|\\%|\b(?:per\s?cent|pct\b\.?|percentage)(?![A-Za-z])|\\text\s*\{\s*(?:%|per\s?cent|pct\.?)\s*\}",
            "%",
        ),
        (r"\\\$|\\text\s*\{\s*\$\s*\}", r"\\dollar "),
        (r"\$", " "),
        (r"\\(?:times|cdot|ast)" + _END, "*"),
        (r"\\div" + _END, "/"),
        (r"\*\*", "^"),
        *(
            (rf"(?<=\d)\s*(?:\\text\s*\{{\s*{word}\s*\}}|{word}{_END})", f"*10^{{{power}}} ")
            for word, power in (("hundred", 2), ("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
        ),
        # Formulas in plain text.
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", "*"),
        (r"(?<![\\A-Za-z])sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (rf"(?<![\\A-Za-z])(sqrt|pi|{_TRIGONOMETRIC}|infinity|infty)(?![A-Za-z])", r"\\\1 "),
        (r"\\infinity" + _END, r"\\infty "),
        (r"(?<![A-Za-z\\])inf(?![A-Za-z])", r"\\infty "),
        (r"(?<!\\)\{\s*\}", ""),
        (r"(\d\.)\((\d+)\)", r"\1\\overline{\2}"),
        (r"(?<![\d.])\.(?=\d|\\overline)", "0."),
        (r"(?<=\d)\.(?!\d)(?!\s*\\(?:overline|dot|bar))", ""),
        (r"(\d*\.\d+)\s*\\ldots(?![A-Za-z])", lambda match: _repeating(match[1]) or match[0]),
        (
            r"(?:\\text\s*\{\s*)?[Aa]ll\s+real(?:\s+numbers?|s)(?:\s+x)?\s*,?\s+(?:except|excluding|other\s+than|but)\b(.+)$",
            lambda match: rf"\mathbb{{R}}\setminus \{{{_EXCEPTION.sub(' ', match[1]).strip(' .,')}\}}",
        ),
        (r"\\\s*$", ""),
        (r"\s+", " "),
    ]
]

_DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), *((mark, mark) for mark in ("**", "__", "*", "`", '"')), ("“", "”"))
_MACRO = re.compile(r"\\(frac|sqrt|binom)(?![A-Za-z])\s*")
_ARGUMENTS = {"frac": 2, "binom": 2, "sqrt": 1}
_CONTROL_WORD = re.compile(r"\\[A-Za-z]+\s*|\\.", re.DOTALL)
_BRACKET = re.compile(r"\\.|[{}()]", re.DOTALL)
_PARTNER = {"}": "{", ")": "("}
_OVER = re.compile(r"\{([^{}]*)\\(over|choose)(?![A-Za-z])([^{}]*)\}")
TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\S", re.DOTALL)
PLAIN = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\\frac\{[0-9]+\}\{[0-9]+\})")  # most answers, already normal
_MAX_DEPTH = 50  # of fractions in fractions; far above any answer, far below Python's recursion limit


@lru_cache(maxsize=512)  # the answers of a group share their gold answer, and often each other
def normalize(text: str) -> str:
    r"""Return the one spelling of a formula that the rest of this package uses.

    Fractions, roots and binomials get explicit braces. Spacing and sizing commands are removed. `\times`, `\cdot` and
    Unicode signs become ASCII ones. Digits are joined across thousands separators. Text commands become `\text`.
    """
    text = text.strip()
    if PLAIN.fullmatch(text):
        return text
    text = text.translate(_UNICODE)
    compatible = unicodedata.normalize("NFKC", text)
    if len(compatible) <= 2 * len(text):  # some characters stand for a sentence of 18; many of them are not an answer
        text = compatible.translate(_UNICODE)
    if "\\begin" not in text:
        text = text.replace("\\\\", "\\")  # `\\\\frac`: a formula that was escaped twice
    text = _unwrap(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _OVER.sub(lambda m: rf"\{'frac' if m[2] == 'over' else 'binom'}{{{m[1]}}}{{{m[3]}}}", text)
    return _explicit_arguments(text).strip(" .,;:")


def _unwrap(text: str) -> str:
    r"""Strip Markdown's bold, quotation marks, and the math delimiters `\(` and `\[` around a whole answer."""
    text = text.strip()
    for opening, closing in _DELIMITERS:
        bare = text.rstrip(" .,;")
        if text.startswith(opening) and bare.endswith(closing) and len(bare) > len(opening + closing):
            text = bare[len(opening) : -len(closing)].strip()
    return text


def _explicit_arguments(text: str) -> str:
    r"""Write the arguments of `\frac`, `\sqrt` and `\binom` in braces, by TeX's rule.

    An argument is a group or a single token.

    `\sqrt(3)` is not TeX, but models write it, so parentheses count as a group too.
    """
    closing = _closing_brackets(text)

    def write(start: int, end: int, depth: int) -> str:
        pieces = []
        while match := _MACRO.search(text, start, end):
            pieces.append(text[start : match.start()])
            written, start = write_macro(match, end, depth)
            pieces.append(written)
        return "".join(pieces) + text[start:end]

    def write_macro(match: re.Match[str], end: int, depth: int) -> tuple[str, int]:
        written, position = "\\" + match[1], match.end()
        if match[1] == "sqrt" and text[position : position + 1] == "[":
            index_end = text.find("]", position, end) + 1
            written, position = written + text[position:index_end], max(position, index_end)
        for _ in range(_ARGUMENTS[match[1]]):
            argument, position = write_argument(position, end, depth + 1)
            written += "{" + argument + "}"
        return written, position

    def write_argument(position: int, end: int, depth: int) -> tuple[str, int]:
        while position < end and text[position] == " ":
            position += 1
        if position >= end or depth > _MAX_DEPTH:
            return "", position
        if text[position] in "{(" and (group_end := closing.get(position, end)) < end:
            return write(position + 1, group_end, depth).strip(), group_end + 1
        if match := _MACRO.match(text, position, end):
            return write_macro(match, end, depth)
        if match := _CONTROL_WORD.match(text, position, end):
            return match[0].strip(), match.end()
        return text[position], position + 1

    return write(0, len(text), 0)


def _closing_brackets(text: str) -> dict[int, int]:
    """Return where each `{` and `(` closes, by where it opens. Escaped brackets do not count."""
    closing = {}
    open_brackets: list[tuple[str, int]] = []
    for match in _BRACKET.finditer(text):
        if match[0] in "{(":
            open_brackets.append((match[0], match.start()))
        elif match[0] in "})" and open_brackets and open_brackets[-1][0] == _PARTNER[match[0]]:
            closing[open_brackets.pop()[1]] = match.start()
    return closing


def tokens(text: str) -> tuple[str, ...]:
    """Return the tokens of a normalised formula, without white space and braces around single tokens."""
    out: list[str] = []
    for token in TOKEN.findall(text):
        if token == "}" and len(out) >= 2 and out[-2] == "{":
            out[-2:] = [out[-1]]
        else:
            out.append(token)
    return tuple(out)
