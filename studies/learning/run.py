"""
Run a study, or go on with it:

    python -m studies.learning.run studies/learning/configs/main.yaml --output_dir outputs/learning

Each finished job is one JSON line in `main.jsonl`, named after the study, and its model lies in `models/`. A job with
a line in any study of the folder is not done again, unless another one needs its model and that is gone.
Jobs run in the order of the study's stages, one per process and one thread each.
"""

import argparse
import gc
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from .study import Job, Study

# Before the workers import their libraries. Threads beside another busy process cost more than they bring.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # the bars of several workers write over each other
}


def run_job(study: Study, job: Job, output_dir: Path) -> dict[str, Any]:
    """Do a job in this process; returns its line of the results."""
    # They take long, and only the workers need them
    from transformers.utils import logging

    from . import measure, training

    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    start = time.perf_counter(), time.process_time()
    work = {"warm_start": training.warm_start, "train": training.train, "measure": measure.measure}[job.kind]
    record = work(study, job, output_dir / "models" / job.name)
    gc.collect()  # trainers hold themselves in cycles
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    return {"job": vars(job), **record, "job_seconds": [round(s, 1) for s in seconds]}


def finished_jobs(output_dir: Path) -> set[Job]:
    lines = [line for path in output_dir.glob("*.jsonl") for line in path.read_text().splitlines()]
    return {Job(**json.loads(line)["job"]) for line in lines}


def jobs_to_do(study: Study, done: set[Job], models: Path) -> list[Job]:
    """The jobs without a line; before each, those that it goes on from, done once but with their models gone."""
    todo: list[Job] = []
    for job in study.jobs():
        if job in done:
            continue
        chain = [job]
        while (needed := chain[0].requires) is not None and needed in done and not (models / needed.name).exists():
            chain.insert(0, needed)
        todo += [link for link in chain if link not in todo]
    return todo


def run_study(study: Study, results: Path, num_workers: int) -> list[Job]:
    """Do all jobs that are not done yet; returns those that failed or could not start for want of a failed one."""
    output_dir = results.parent
    output_dir.mkdir(parents=True, exist_ok=True)
    done, failed = finished_jobs(output_dir), []
    waiting = jobs_to_do(study, done, output_dir / "models")
    done -= set(waiting)
    print(f"{len(done)} jobs done, {len(waiting)} to do", flush=True)
    running: dict[Future, Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, context) as pool:
        while True:
            for job in list(waiting):
                if len(running) < num_workers and (job.requires is None or job.requires in done):
                    waiting.remove(job)
                    running[pool.submit(run_job, study, job, output_dir)] = job
            if not running:
                return failed + waiting
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                if error is not None:
                    traceback.print_exception(error)
                    failed.append(job)
                    continue
                done.add(job)
                record = future.result()
                with results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{time.strftime('%H:%M:%S')} {job.name}: {record['job_seconds'][0]:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a study, or go on with it.")
    parser.add_argument("study", type=Path, help="YAML file, see `studies/learning/study.py`")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/learning"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, by default one per core")
    options = parser.parse_args()
    os.environ.update(_ENVIRONMENT)
    results = options.output_dir / f"{options.study.stem}.jsonl"
    left = run_study(Study.load(options.study), results, options.workers)
    for job in left:
        print(f"not done: {job.name}")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
