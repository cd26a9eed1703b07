"""
Thousands of optimiser steps of a tiny model, with evaluation, checkpoints and a verifier whose workers are killed and
time out: does anything grow?

    python -m benchmarks.soak outputs/soak              # 2,000 steps, some twenty minutes on one core
    python -m benchmarks.soak outputs/soak --steps 60   # a short one

Every `--every` steps one line is written to `soak.jsonl` in the folder: step, seconds, resident memory (MiB, after the
allocator has handed back what is free: what it holds depends on luck and hides what leaks), open files, threads and
child processes of this process, checkpoints on the disk, and the verifier's timeouts and deaths so far. At the end a
summary is printed: the curve in ten parts, each with the median of its lines. The exit code is 1 if anything grew
after the first fifth.
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for a model this small more threads only wait
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import psutil
from transformers import TrainerCallback

from examples import toy_task
from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.rewards.verifier.pool import PoolSettings, close_pools, get_pool

POOL = PoolSettings(
    workers=2, cpu_limit=0.3, hard_limit=1.0, batch_limit=10.0, memory_limit=1024, tasks_per_worker=200
)
PLAIN = [(r"\sqrt{2}", r"2^{1/2}"), (r"x^2+2x+1", r"(x+1)^2"), (r"\sqrt{3}", r"\sqrt{5}")]
# One runs out of its time, the other is no formula
HOSTILE = (r"\sum_{n=1}^{10^{12}} n^{n}", r"\frac" * 300)
_LIBC = ctypes.CDLL("libc.so.6")
MEASURED = ("memory", "files", "threads", "children")
# What may come and go at the moment of a measurement: a file that is open, a worker between two
TOLERANCE = {"memory": 8.0, "files": 2, "threads": 0, "children": 0}


class FaultyVerifier:
    """
    Rewards by parity, after the worker pool has had work to do.

    Every `fault_every`-th call one worker is killed, and as often an answer does not end in time.
    """

    __name__ = "faulty_verifier"

    def __init__(self, fault_every: int):
        self.fault_every = fault_every
        self.counts = {"calls": 0, "timeout": 0, "dead": 0, "killed": 0}
        self._hostile = itertools.cycle(HOSTILE)

    def __call__(self, completion_ids: list, **kwargs: Any) -> list[float]:
        pool, pairs = get_pool(POOL), list(PLAIN)
        self.counts["calls"] += 1
        if self.counts["calls"] % self.fault_every == 0:
            pairs.append(("1", next(self._hostile)))
        if self.counts["calls"] % self.fault_every == self.fault_every // 2:
            workers = psutil.Process().children()
            if workers:
                os.kill(workers[0].pid, signal.SIGKILL)
                self.counts["killed"] += 1
        for outcome in pool.grade(pairs):
            if outcome in self.counts:
                self.counts[outcome] += 1
        return [float(sum(ids) % 2) for ids in completion_ids]


class Gauge(TrainerCallback):
    """Writes a line every few steps."""

    def __init__(self, path: Path, every: int, verifier: FaultyVerifier, output_dir: Path):
        self.lines: list[dict[str, float]] = []
        self._path, self._every, self._verifier, self._output_dir = path, every, verifier, output_dir
        self._process, self._start = psutil.Process(), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self._every:
            return
        gc.collect()
        _LIBC.malloc_trim(0)
        line = {
            "step": state.global_step,
            "seconds": round(time.monotonic() - self._start, 1),
            "memory": round(self._process.memory_info().rss / 2**20, 1),
            "files": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "children": len(self._process.children(recursive=True)),
            "checkpoints": len(list(self._output_dir.glob("checkpoint-*"))),
            **self._verifier.counts,
        }
        self.lines.append(line)
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")


def growth(lines: list[dict[str, float]]) -> dict[str, float]:
    """By how much the median of the last fifth lies above that of the second fifth; the first is warm-up."""
    fifth = len(lines) // 5
    return {
        name: statistics.median(line[name] for line in lines[-fifth:])
        - statistics.median(line[name] for line in lines[fifth : 2 * fifth])
        for name in MEASURED
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=10, help="steps between two lines")
    arguments = parser.parse_args()

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "soak.jsonl"
    path.unlink(missing_ok=True)
    verifier = FaultyVerifier(fault_every=8)
    gauge = Gauge(path, arguments.every, verifier, arguments.output_dir)
    tokenizer = toy_task.make_tokenizer(toy_task.POINTERS)
    problems = toy_task.make_problems(toy_task.POINTERS, 20, random.Random(0))
    settings = {
        **toy_task.BRPO_SETTINGS,
        "budgets": [3, 6, 9],
        "num_summaries": 2,
        "num_generations": 4,
        "steps_per_generation": 2,
        "per_device_train_batch_size": 4,
        "max_steps": arguments.steps,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": arguments.every,
        "eval_strategy": "steps",
        "eval_steps": 2 * arguments.every,
        "save_strategy": "steps",
        "save_steps": 2 * arguments.every,
        "save_total_limit": 2,
    }
    trainer = BRPOTrainer(
        toy_task.make_model(tokenizer),
        BRPOConfig(str(arguments.output_dir), **settings),
        toy_task.make_rl_dataset(problems[:16]),
        eval_dataset=toy_task.make_rl_dataset(problems[16:]),
        reward_funcs=verifier,
        processing_class=tokenizer,
        callbacks=[gauge],
    )
    trainer.train()
    close_pools()

    lines = gauge.lines
    parts = [lines[i * len(lines) // 10 : (i + 1) * len(lines) // 10] for i in range(10)]
    print("step   memory (MiB)  files  threads  children")
    for part in filter(None, parts):
        middle = {name: statistics.median(line[name] for line in part) for name in MEASURED}
        print(
            f"{part[-1]['step']:5d}  {middle['memory']:12.1f}  {middle['files']:5g}  {middle['threads']:7g}  "
            f"{middle['children']:8g}"
        )
    grown = growth(lines)
    left = len(psutil.Process().children(recursive=True))
    summary = {
        **{name: lines[-1][name] for name in ("step", "seconds", "calls", "killed", "dead", "timeout", "checkpoints")},
        "growth": {name: round(value, 1) for name, value in grown.items()},
        "children_left": left,
        "flat": left == 0 and all(grown[name] <= TOLERANCE[name] for name in MEASURED),
    }
    print(json.dumps(summary))
    return 0 if summary["flat"] else 1


if __name__ == "__main__":
    sys.exit(main())
