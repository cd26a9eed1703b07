"""
Whether an answer may be given to a scorer that executes it.

The scorers in `EXECUTING` call Python's `eval` on what a model wrote, or sympy's `parse_expr`, which does. They get
nothing but numbers, short names and texts, lists of these, sums, products, powers and elementary functions.
"""

import ast
import re

EXECUTING = frozenset(
    [
        *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
        *("simple_integration", "spiral_matrix", "string_insertion"),
    ]
)
"""Tasks whose scorers execute an answer; a test finds them by an audit hook."""

_FUNCTIONS = frozenset(
    [
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh"),
        *("atanh", "exp", "log", "ln", "sqrt", "Abs", "abs"),
    ]
)
# Names of several small letters could be variables of the scorer
_NAME = re.compile(r"[A-Za-z_]|[A-Z]+|pi")
_TEXT = re.compile(r"[\w -]*")
_NODES = (
    *(ast.Expression, ast.List, ast.Tuple, ast.UnaryOp, ast.BinOp, ast.Load, ast.UAdd, ast.USub),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.BitXor),
)


def is_plain(answer: str) -> bool:
    """Return whether executing an answer can do nothing but calculate."""
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError):  # sympy reads more than Python does; without a call nothing is done
        return not re.search(r"[(\"'{]", answer)
    return _is_plain(tree)


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        text = node.value
        return bool(_TEXT.fullmatch(text)) if isinstance(text, str) else isinstance(text, bool | int | float)
    if isinstance(node, ast.Name):
        return bool(_NAME.fullmatch(node.id))
    if isinstance(node, ast.Call):
        is_function = isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        return is_function and not node.keywords and all(map(_is_plain, node.args))
    return isinstance(node, _NODES) and all(map(_is_plain, ast.iter_child_nodes(node)))
