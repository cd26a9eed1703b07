"""What the packaging files promise about each other."""

import re
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import import_module

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

import trl_anytime
from tests.support import ROOT
from tests.support.pages import table
from tests.support.project import OLDEST, PINNED
from tools.pins import LISTS

CITATION = (ROOT / "CITATION.cff").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    requirement.name: requirement
    for text in [*PROJECT["dependencies"], *(x for extra in PROJECT["optional-dependencies"].values() for x in extra)]
    if (requirement := Requirement(text)).specifier
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, as `make wheel` builds it."""
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_the_wheel_holds_the_whole_package(wheel):
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "trl_anytime"
    files = {path.relative_to(ROOT / "src").as_posix() for path in package.rglob("*") if path.is_file()}
    assert packaged == {name for name in files if not name.endswith(".pyc")}
    for data in ["py.typed", "reporting/model_card.md", "recipes/8k_grpo.yaml", "accelerate_configs/zero3.yaml"]:
        assert f"trl_anytime/{data}" in packaged


def test_metadata_of_the_wheel(wheel):
    """PyPI shows the README by itself, so that it may link to nothing by a relative path."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Version"] == trl_anytime.__version__
    address = PROJECT["urls"]["Repository"]
    assert {link.partition(", ")[2] for link in metadata.get_all("Project-URL")} == {*PROJECT["urls"].values()}
    targets = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", metadata.get_payload())
    assert all(target.startswith("https://") for _, target in targets)
    raw = address.replace("github.com", "raw.githubusercontent.com")
    assert f"{raw}/main/docs/images/demo.png" in [target for picture, target in targets if picture]
    assert f"{address}/blob/main/docs/index.md" in [target for picture, target in targets if not picture]


def test_one_version():
    """`__init__.py` has it, and pyproject.toml reads it there. The others repeat it for their readers."""
    assert re.findall(r"^version: (\S+)$", CITATION, re.MULTILINE) == [trl_anytime.__version__]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == trl_anytime.__version__


def test_one_address():
    """All places that name the address of the repository name the same one."""
    texts = [CITATION, (ROOT / "README.md").read_text(), (ROOT / "pyproject.toml").read_text()]
    address = r"https://(?:github|raw\.githubusercontent)\.com/([\w.-]+/trl-anytime)\b"
    owners = [set(re.findall(address, text)) for text in texts]
    assert all(len(found) == 1 for found in owners) and len(set.union(*owners)) == 1


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
    assert specifier.contains(PINNED[name]) and specifier.contains(OLDEST[name])
    assert [s.version for s in specifier if s.operator == ">="] == [OLDEST[name]]


def test_the_pins_are_versions_alone():
    """No index, no host, no local version: any registry will do. torch is the release that the tests know."""
    for file in LISTS:
        lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
        assert len(lines) > 50 and all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert PINNED["torch"] == OLDEST["torch"]


@pytest.mark.slow
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


@pytest.mark.slow
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
