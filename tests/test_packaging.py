"""What the packaging files promise about each other."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    if (requirement := Requirement(text)).specifier
}
PINNED = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
OLDEST = dict(re.findall(r"([\w-]+)==([\w.]+)", (ROOT / "Makefile").read_text().split("OLDEST =")[1].split("\n\n")[0]))


def test_the_command():
    module, _, function = PROJECT["scripts"]["trl-anytime"].partition(":")
    assert callable(getattr(import_module(module), function))


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_both_ends_of_each_range_are_tested(name):
    """`make test` installs the pinned versions, `make test-oldest` the lowest ones."""
    specifier = REQUIREMENTS[name].specifier
    assert specifier.contains(PINNED[name])
    if name == "torch":  # one release can be had for CPUs alone
        assert [str(s) for s in specifier] == [">=" + ".".join(PINNED[name].split(".")[:2])]
        return
    (lowest,) = (Version(s.version) for s in specifier if s.operator == ">=")
    oldest = Version(OLDEST[name])
    assert specifier.contains(OLDEST[name]) and oldest.release[:2] == lowest.release[:2]
