"""What the packaging files promise about each other."""

import re
import subprocess
import sys
import tomllib
from importlib import import_module

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import trl_anytime
from tests.support import ROOT
from tests.support.pages import table
from tests.support.project import OLDEST, PINNED

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    if (requirement := Requirement(text)).specifier
}


def test_files_that_are_not_python_are_packaged():
    package = ROOT / "src" / "trl_anytime"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {path for pattern in setuptools["package-data"]["trl_anytime"] for path in package.glob(pattern)}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert packaged == files


def test_public_names():
    assert {*trl_anytime.__all__} == trl_anytime._MODULE_OF.keys()
    assert [getattr(trl_anytime, name).__name__ for name in trl_anytime.__all__] == trl_anytime.__all__
    assert issubclass(trl_anytime.BRPOTrainer, trl_anytime.ReliableGRPOTrainer)


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


@pytest.mark.parametrize(
    ("statement", "ending"),
    [
        ("import trl_anytime", 0),
        ("import trl_anytime.rewards", 1),
        ("from trl_anytime.cli import main; sys.exit(main(['eval', 'missing', '--dataset', 'aime24']))", 2),
    ],
)
def test_what_needs_linux_says_so(statement, ending):
    """In a process that takes itself for one of another system once the libraries are there."""
    code = f"import sys, datasets, transformers.utils.logging\nsys.platform = 'darwin'\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == ending, done.stderr
    said = done.stderr.splitlines()
    assert not ending or ("Linux" in said[-1] and "darwin" in said[-1])
    assert ending != 2 or len(said) == 1
    assert "Operating System :: POSIX :: Linux" in PROJECT["classifiers"]


HEAVY = {"accelerate", "datasets", "matplotlib", "pandas", "sympy", "torch", "transformers", "trl", "vllm"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh process has after a statement, to which its exit does not belong."""
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import trl_anytime", HEAVY),
        ("import trl_anytime.rewards", HEAVY),
        ("from trl_anytime.cli import main; main(['--help'])", HEAVY),
        ("from trl_anytime.cli import main; main(['eval', '--help'])", HEAVY),
        # What only some runs need; trackers that are installed are imported by TRL
        ("from trl_anytime import BRPOTrainer", {"matplotlib", "vllm", "deepspeed", "bitsandbytes"}),
    ],
)
def test_what_is_not_loaded(statement, absent):
    """How soon it starts, without a clock; `make wheel` measures it."""
    loaded = loaded_by(statement)
    assert "trl_anytime" in loaded and not loaded & absent


def test_extras_are_what_the_readme_says():
    named = {name for row in table("README.md", "extra") for name in re.findall(r"`(\w+)`", row[0])}
    assert named == PROJECT["optional-dependencies"].keys()
