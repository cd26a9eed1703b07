"""The option of the test suite that counts skips (tests/conftest.py)."""

import re
import subprocess
import sys

import pytest

from tests.support import ROOT

SUITE = """
import pytest

def test_runs(): pass
def test_skips(): pytest.skip("no such package")
@pytest.mark.skipif(True, reason="never")
def test_is_skipped(): pass
@pytest.mark.hardware
@pytest.mark.skipif(True, reason="no GPU")
def test_lacks_hardware(): pass
@pytest.mark.xfail
def test_fails_as_expected(): assert False
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (["-n0"], {"passed": 1, "skipped": 4, "xfailed": 1}),
        (["--no-skips", "-n1"], {"passed": 1, "skipped": 1, "xfailed": 1, "failed": 1, "error": 2}),
    ],
)
def test_skips_are_failures(tmp_path, options, counts):
    (tmp_path / "test_some.py").write_text(SUITE)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('not_installed_anywhere')")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-c", ROOT / "pyproject.toml"]
    command += ["--rootdir", tmp_path, "--continue-on-collection-errors", *options, tmp_path]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+?)s?\b", run.stdout.splitlines()[-1])}
    assert {kind: found.get(kind, 0) for kind in counts} == counts
    assert run.returncode == ("failed" in counts)
