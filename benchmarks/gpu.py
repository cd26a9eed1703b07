"""
Everything that needs a GPU, in at most nine minutes on one H100 or H200:

    make gpu                                     # with the environment that is there
    python benchmarks/gpu.py --parts tests       # some parts only
    python benchmarks/gpu.py --tiny              # the same parts in small, on the CPU

Each part runs in a process of its own with a time limit, the most telling first. After each part the results are
written, so that a window that closes early leaves what was finished. The output folder has `gpu.json` (all results),
`gpu.md` (the tables of docs/benchmarks.md) and `gpu.log` (what the parts printed). A part that cannot run says why.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "vllm")
# Dense bfloat16 operations per second by the name of the card, in units of 10¹² (its data sheet, without sparsity)
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "B200": 2250}

BIG = ["--device", "cuda", "--dtype", "bfloat16", "--model-shape", "qwen2.5-1.5b"]
BUDGETS = ["--budgets", "2000", "4000", "6000", "8000", "--prompt", "256", "--summary", "118"]
SMALL = ["--budgets", "4", "8", "--prompt", "4", "--summary", "4", "--repeats", "1"]


@dataclass(frozen=True)
class Part:
    """
    A part of the run.

    Args:
        name (`str`): Name.
        seconds (`int`): Time limit on a GPU.
        command (`list[str]`): Command after `python`, on a GPU.
        tiny (`list[str]`): The same in small on the CPU.
        needs (`tuple[str, ...]`): Packages without which it cannot run.
        read (`Callable`): Function from the folder for its files and what it printed to its results.
    """

    name: str
    seconds: int
    command: list[str]
    tiny: list[str]
    needs: tuple[str, ...]
    read: Callable[[Path, str], Any]


def printed_json(folder: Path, output: str) -> Any:
    """Read the JSON that a benchmark printed."""
    return json.loads(output[min(i for i in (output.find("[\n"), output.find("{\n"), len(output)) if i >= 0) :])


def junit(folder: Path, output: str) -> dict[str, str]:
    """Read what became of each test: passed, or the first line of why not."""
    from xml.etree import ElementTree

    found = {}
    for case in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        outcome = "passed"
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = f"{child.tag}: {(child.get('message') or '').partition(chr(10))[0][:300]}"
        found[str(case.get("name"))] = outcome
    return found


PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={folder}/junit.xml", "-m", "gpu", "tests/gpu"]
TRAINING = ("trl", "transformers", "datasets")
PARTS = [
    Part("tests", 150, PYTEST, [*PYTEST, "-k", "qwen3 and float32 or broken"], (*TRAINING, "pytest", "peft"), junit),
    Part(
        "tree_attention",
        110,
        ["benchmarks/tree_attention.py", "--json", *BIG, *BUDGETS, "--gradient-checkpointing", "--skip-slow"],
        ["benchmarks/tree_attention.py", "--json", *SMALL],
        TRAINING,
        printed_json,
    ),
    Part(
        "kernels",
        40,
        ["benchmarks/attention_kernels.py", "--json", "--device", "cuda", "--dtype", "bfloat16"],
        ["benchmarks/attention_kernels.py", "--json", "--queries", "16", "--keys", "40", "--repeats", "1"],
        TRAINING,
        printed_json,
    ),
    Part(
        "step",
        120,
        [
            *("benchmarks/step.py", "--json", *BIG, "--gradient-checkpointing", "--trainers", "GRPO", "BRPO"),
            *("--budgets", "250", "500", "750", "1000", "--prompt", "256", "--summary", "64", "--repeats", "1"),
        ],
        ["benchmarks/step.py", "--json", *SMALL],
        TRAINING,
        printed_json,
    ),
    Part(
        "generation",
        90,
        [
            *("benchmarks/generation.py", "--json", *BIG, "--rollouts", "16", "--repeats", "1"),
            *("--budgets", "128", "256", "384", "512", "--prompt", "256", "--summary", "64"),
        ],
        ["benchmarks/generation.py", "--json", *SMALL],
        TRAINING,
        printed_json,
    ),
    Part(
        "memory",
        40,
        [
            *("benchmarks/memory.py", "--json", "--device", "cuda", "--hidden", "1536", "--layers", "28"),
            *("--vocabulary", "151936", "--budgets", "1000", "2000", "3000", "4000", "--prompt", "256"),
        ],
        [
            "benchmarks/memory.py",
            "--json",
            "--hidden",
            "128",
            "--layers",
            "1",
            "--budgets",
            "8",
            "16",
            "--prompt",
            "4",
        ],
        TRAINING,
        printed_json,
    ),
]


def environment() -> dict[str, Any]:
    """Return the machine and the versions that are there."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    facts: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if versions["torch"] is not None:
        import torch

        facts["cuda"] = torch.version.cuda
        if torch.cuda.is_available():
            device = torch.cuda.get_device_properties(0)
            facts |= {"gpu": device.name, "memory_gib": round(device.total_memory / 2**30, 1)}
    return facts


def why_not(part: Part, facts: dict[str, Any], tiny: bool) -> str | None:
    """Return why a part cannot run here, or `None`."""
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    script = (part.tiny if tiny else part.command)[0]
    if script.endswith(".py") and not (ROOT / script).exists():
        return f"{script} is not there"
    if not tiny and "gpu" not in facts:
        return "no GPU"
    return None


def run(part: Part, folder: Path, log: Path, limit: float, tiny: bool) -> dict[str, Any]:
    """Run a part for at most `limit` seconds, and return what became of it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [word.format(folder=folder) for word in (part.tiny if tiny else part.command)]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GPU_TESTS_ON": "cpu" if tiny else "cuda"}
    settings |= {"HF_HUB_OFFLINE": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    start = time.monotonic()
    found: dict[str, Any] = {"status": "done", "command": " ".join(["python", *command])}
    with log.open("a") as errors:
        errors.write(f"\n== {part.name}: {found['command']}\n")
        errors.flush()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
        try:
            output = process.communicate(timeout=limit)[0]
            if process.returncode:
                found |= {"status": "failed", "reason": f"exit code {process.returncode}, see gpu.log"}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0]
            found |= {"status": "timed out", "reason": f"took longer than {limit:.0f} seconds"}
        errors.write(output)
    found["seconds"] = round(time.monotonic() - start, 1)
    try:
        found["results"] = part.read(folder, output)
    except Exception as error:  # a part that failed or was stopped may have written anything
        found.setdefault("reason", f"no results ({type(error).__name__})")
        found["status"] = "failed" if found["status"] == "done" else found["status"]
    return found


def with_utilisation(results: Any, gpu: str | None) -> Any:
    """Add the share of the card's peak (MFU), in rows that have operations per second."""
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in (gpu or "")), None)
    for row in results if isinstance(results, list) else []:
        if peak is not None and isinstance(row, dict) and "packed_tflops_per_second" in row:
            row["mfu"] = round(row["packed_tflops_per_second"] / peak, 4)
    return results


def tables(facts: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """Return the results as Markdown: a table for each part, a column for each object of its results."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    lines = ["# On a GPU", "", f"{facts.get('gpu', 'no GPU')}, {versions}", ""]
    lines += ["| part | status | seconds | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {part['status']} | {part.get('seconds', '')} | {part.get('reason', '')} |"
        for name, part in found.items()
    ]
    for name, part in found.items():
        results = part.get("results")
        if not results:
            continue
        lines += ["", f"## {name}", "", "```bash", part["command"], "```", ""]
        columns = results if isinstance(results, list) else [results]
        if all(isinstance(column, dict) for column in columns):
            rows = list(dict.fromkeys(key for column in columns for key in column))
            lines += [f"| |{' |' * len(columns)}", f"| --- |{' --- |' * len(columns)}"]
            lines += [f"| {row} | " + " | ".join(_cell(column.get(row)) for column in columns) + " |" for row in rows]
    return "\n".join([*lines, ""])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(each)}" for key, each in value.items())
    text = f"{value:,.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "outputs/gpu")), help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="most time for all parts")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--tiny", action="store_true", help="in small, on the CPU")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    log = output / "gpu.log"
    log.write_text("")
    facts = environment()
    found: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        left = end - time.monotonic()
        reason = why_not(part, facts, options.tiny) or ("no time was left" if left < 10 else None)
        if reason is not None:
            found[part.name] = {"status": "not run", "reason": reason}
        else:
            folder = output / "parts" / part.name
            limit = left if options.tiny else min(part.seconds, left)  # a CPU may be busy
            found[part.name] = run(part, folder, log, limit, options.tiny)
            with_utilisation(found[part.name].get("results"), facts.get("gpu"))
        print(f"{part.name}: {found[part.name]['status']} {found[part.name].get('reason', '')}", flush=True)
        (output / "gpu.json").write_text(json.dumps({"environment": facts, "parts": found}, indent=2))
        (output / "gpu.md").write_text(tables(facts, found))
    print(f"Results are in {output}.")
    return int(any(part["status"] in ("failed", "timed out") for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
