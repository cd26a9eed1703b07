"""The first line of each function's docstring is one short sentence that says what the function does."""

import ast
import re

import pytest

from tests.support.project import PACKAGE

MOST_CHARACTERS = 100

# Words that open a noun phrase, a question or a clause, but never an order
_NO_VERB = """
    a an the this that these those it its he she they their them we our you your i my one ones none no nobody nothing
    all any both each either every few fewer half many more most much neither other others same several some such
    another two three four five six seven eight nine ten first second last next
    what whatever when whenever where wherever whether which whichever while who whom whose why how
    about above across after against along among around as at because before behind below beneath beside besides
    between beyond but by despite down during else except for from if in inside into like near of off on onto or out
    outside over past per since so than then there through till to toward under unless until unlike up upon via with
    within without and not never also only just here otherwise
    am are is was were be been being has had does did can could may might must shall should will would
    true false yes
"""
# After an order comes its object. After a noun comes one of these.
_NO_OBJECT = ("of", "is", "are", "was", "were", "has", "had")


def words_of(line):
    return re.findall(r"[\w'-]+", line)


def begins_with_a_verb(line):
    """Say whether a line begins with a verb in its base form, as an order does, by its first two words."""
    if not re.match(r"[A-Z][a-z]+(-[a-z]+)?\b(?![’'`.(])", line):
        return False
    first, second = (*words_of(line.lower()), "", "")[:2]
    is_plural_or_third_person = re.search(r"[^s]s$", first)
    is_participle_or_noun = re.search(r"[^e]ed$|.[aeiouy].*ing$|ion$|ity$|ness$", first)
    return not (
        first in _NO_VERB.split() or second in _NO_OBJECT or is_plural_or_third_person or is_participle_or_noun
    )


def faults(line):
    """Return what is wrong with the first line of a docstring."""
    if not line.endswith("."):
        yield "does not end with a period"
    if len(line) > MOST_CHARACTERS:
        yield f"has {len(line)} characters"
    if not begins_with_a_verb(line):
        yield "does not begin with a verb"


def first_lines():
    """Return the first line of each function's docstring, by where the function is."""
    return {
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}": docstring.splitlines()[0]
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (docstring := ast.get_docstring(node))
    }


@pytest.mark.parametrize(
    "line",
    [
        "Return the next tokens.",
        "Pass the problem on.",
        "Process what is left.",
        "Seed the generator.",
        "Bring all ranks together.",
        "Double-check the answer.",
    ],
)
def test_a_summary(line):
    assert not [*faults(line)]


@pytest.mark.parametrize(
    "line",
    [
        "What comes next.",
        "The tokens that follow.",
        "Tokens that follow.",
        "Returns the next tokens.",
        "Number of tokens.",
        "Used by the trainer.",
        "Sampling parameters of one phase.",
        "`None` without tokens.",
        "return the next tokens.",
        "Return the next tokens",
        "Return the next tokens, and then " + "all " * 20 + "others.",
        "TRL's hook.",
        "Collective.",
    ],
)
def test_no_summary(line):
    assert [*faults(line)]


def test_each_docstring_begins_with_what_the_function_does():
    lines = first_lines()
    assert len(lines) > 300  # so that a change of the layout does not leave the test without work
    wrong = [f"{place} {', '.join(faults(line))}: {line}" for place, line in lines.items() if any(faults(line))]
    assert not wrong, "\n".join(wrong)
