"""The worker pool under faults injected into real workers, and from every place that a reward may be called from."""

import asyncio
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from tests.support import ROOT
from trl_anytime.rewards import MathReward, grade_answers
from trl_anytime.rewards.verifier import pool
from trl_anytime.rewards.verifier.pool import PoolSettings, WorkerPool, default_workers

SETTINGS = PoolSettings(
    workers=2, cpu_limit=0.5, hard_limit=4.0, batch_limit=60.0, memory_limit=512, tasks_per_worker=50
)
# What a fault counts as: the soft CPU limit and what Python notices itself are timeouts of a worker that lives on.
FAULTS = {
    "kill": "dead",
    "exit": "dead",
    "segfault": "dead",
    "closeoutput": "dead",
    "stuckinC": "timeout",
    "sleep": "timeout",
    "stop": "timeout",
    "spin": "timeout",
    "memory": "timeout",
    "recursion": "timeout",
    "raise": "different",
    "print": "different",
}
ORDINARY = [
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x+1", "1+x"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("x", "y"),
    (r"\pi", r"\frac{2\pi}{2}"),
]
ORDINARY_OUTCOMES = ["equal", "equal", "different", "different", "equal"]


@pytest.fixture
def faulty_workers(monkeypatch):
    monkeypatch.setattr(pool, "_WORKER_MODULE", "tests.support.faulty_worker")


@pytest.fixture
def workers(faulty_workers):
    made = WorkerPool(SETTINGS)
    yield made
    made.close()


def wait_for_end(pid: int, seconds: float = 30.0) -> bool:
    """Whether a process, which need not be a child of this one, ends in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def pids(made: WorkerPool) -> list[int]:
    return [worker.process.pid for worker in made._workers]


@pytest.mark.slow
def test_a_fault_costs_one_answer(workers):
    pairs, expected = [], []
    faults = iter(FAULTS)
    for number in range(200):
        pairs.append(ORDINARY[number % 5])
        expected.append(ORDINARY_OUTCOMES[number % 5])
        if number % 16 == 10:
            fault = next(faults)
            pairs.append(("2", f"fault_{{{fault}}}+x"))
            expected.append(FAULTS[fault])
    assert next(faults, None) is None  # each of them was committed
    outcomes = workers.grade(pairs)
    wrong = {pair: outcome for pair, outcome, right in zip(pairs, outcomes, expected, strict=True) if outcome != right}
    assert not wrong
    assert len(pids(workers)) <= SETTINGS.workers


@pytest.mark.slow
def test_all_workers_hang_and_the_pool_goes_on(workers):
    hanging = [("2", f"fault_{{sleep}}+{letter}") for letter in "abcd"]
    assert workers.grade([*hanging, *ORDINARY]) == ["timeout"] * 4 + ORDINARY_OUTCOMES


def test_a_worker_killed_between_calls_is_replaced(workers):
    workers.grade(ORDINARY)
    for pid in pids(workers):
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid)
    assert workers.grade(ORDINARY) == ORDINARY_OUTCOMES


def test_workers_are_replaced_after_their_number_of_tasks(faulty_workers):
    made = WorkerPool(PoolSettings(1, 2.0, 10.0, 60.0, 512, tasks_per_worker=3))
    assert made.grade(ORDINARY * 2) == ORDINARY_OUTCOMES * 2  # ten tasks: four workers
    assert made._workers[0].tasks_done == 1
    made.close()


def test_what_a_call_has_no_time_for_is_late(faulty_workers):
    made = WorkerPool(PoolSettings(1, 0.5, 100.0, 5.0, 512, 100))  # 5 s, and 0.5 s for each of 11 answers
    outcomes = made.grade([*ORDINARY, ("2", "fault_{sleep}"), *ORDINARY])
    # What was graded before the limit counts. Neither the answer at that time nor those behind it had their own time.
    assert outcomes == ORDINARY_OUTCOMES + ["late"] * 6
    assert made.grade(ORDINARY) == ORDINARY_OUTCOMES
    made.close()


@pytest.mark.slow
def test_the_time_of_a_call_grows_with_its_answers(faulty_workers):
    """Three answers that take all of their time, more than `batch_limit`, and right ones behind: each has its turn."""
    numbers = range(2, 32)
    answers = [*(f"fault_{{sleep}}+{letter}" for letter in "abc"), *(rf"\sqrt{{{n * n}}}+x" for n in numbers)]
    gold_answers = ["2"] * 3 + [f"x+{n}" for n in numbers]
    # 6 s of sleep. The call has 2 s, and 3 s for each of 33 answers, which leaves time for a loaded machine.
    limits = {"workers": 1, "cpu_limit": 3.0, "hard_limit": 2.0, "batch_limit": 2.0}
    counts: dict[str, float] = {}
    with pytest.warns(UserWarning, match="3 of 33 answers .9.1%"):
        scores = grade_answers(answers, gold_answers, counts=counts, **limits)
    assert scores == [0.0] * 3 + [1.0] * 30
    assert counts == {"graded": 33, "too_long": 0, "timeouts": 3, "dead_workers": 0, "ungraded": 0}


@pytest.mark.slow
def test_answers_that_were_not_looked_at_have_no_reward(faulty_workers):
    answers, gold_answers = [r"\sqrt8", "fault_{sleep}+x", r"\sqrt8+y", "1"], [r"2\sqrt2", "2", r"2\sqrt2+y", "1"]
    limits = {"workers": 1, "cpu_limit": 0.2, "hard_limit": 100.0, "batch_limit": 8.0}
    counts: dict[str, float] = {}
    with pytest.warns(UserWarning, match="2 of 4 answers .50.0%"):
        # The last is plain, so no worker is needed for it
        assert grade_answers(answers, gold_answers, counts=counts, **limits) == [1.0, None, None, 1.0]
    assert counts == {"graded": 2, "too_long": 0, "timeouts": 0, "dead_workers": 0, "ungraded": 2}

    reward = MathReward(end_of_thinking=None, **limits)
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    metrics: dict[str, float] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert reward([""] * 4, completions, answer=gold_answers, log_metric=metrics.__setitem__) == [
                1.0,
                None,
                None,
                1.0,
            ]
    assert len(caught) == 1  # once, then it is counted only
    assert metrics["rewards/MathReward/ungraded"] == 2 and metrics["rewards/MathReward/graded"] == 2


def test_answers_that_are_too_long_are_counted():
    counts: dict[str, float] = {}
    with pytest.warns(UserWarning, match="1 of 2 answers"):
        assert grade_answers(["1" * 3000, "2"], ["2", "2"], counts=counts) == [0.0, 1.0]
    assert counts["too_long"] == 1 and counts["graded"] == 1


def test_nothing_is_said_where_all_is_graded(recwarn):
    counts: dict[str, float] = {}
    assert grade_answers([r"\sqrt8", "3"], [r"2\sqrt2", "2"], counts=counts) == [1.0, 0.0]
    assert counts == {"graded": 2, "too_long": 0, "timeouts": 0, "dead_workers": 0, "ungraded": 0}
    assert not recwarn.list


SIGNALLED_SCRIPT = """
import signal
from trl_anytime.rewards import grade_answers
received = []
for number in ({signum}, signal.SIGHUP):
    signal.signal(number, lambda *arguments: received.append(arguments[0]))
print("ready", flush=True)
scores = grade_answers([r"\\sqrt8", r"\\sqrt9", r"\\sqrt10"], [r"2\\sqrt2"] * 3, workers=3)
print(scores, received, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_while_workers_start(signum):
    """From the first moment on, when a worker has not imported anything, it is for the parent alone."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SIGNALLED_SCRIPT.format(signum=int(signum))],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert parent.stdout.readline() == "ready\n"
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    seen: set[str] = set()
    while (
        len(seen) < 3 and parent.poll() is None
    ):  # one signal for each worker, as soon as it is there, and one to all at the end of the start
        new = set(children.read_text().split()) - seen
        if new:
            os.killpg(parent.pid, signum)
        seen |= new
    os.killpg(parent.pid, signal.SIGHUP)
    output, errors = parent.communicate(timeout=100)
    assert parent.returncode == 0, errors
    assert output.startswith("[1.0, 0.0, 0.0]") and f"{int(signum)}" in output
    assert "while starting" not in errors  # no worker had to be started again


def test_a_pool_that_cannot_start_raises(monkeypatch):
    monkeypatch.setattr(pool, "_WORKER_MODULE", "trl_anytime.rewards.verifier.no_such_module")
    with pytest.raises(RuntimeError, match=r"\bcode 1\b"):
        WorkerPool(SETTINGS).grade(ORDINARY)


def test_a_pool_that_fails_its_self_test_raises(monkeypatch, tmp_path):
    (tmp_path / "wrong_worker.py").write_text(
        "from trl_anytime.rewards.verifier import worker\nworker._grade = lambda *arguments: 'equal'\nworker.main()\n"
    )
    monkeypatch.setattr(pool, "_WORKER_MODULE", "wrong_worker")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="equal.*equal"):
        WorkerPool(SETTINGS).grade(ORDINARY)


def test_a_pool_without_memory_raises():
    with pytest.raises(RuntimeError, match="keep failing"):
        WorkerPool(PoolSettings(1, 2.0, 10.0, 60.0, memory_limit=60, tasks_per_worker=10)).grade(ORDINARY)


def test_an_exception_in_the_caller_leaves_no_busy_worker(workers, monkeypatch):
    workers.grade(ORDINARY)
    before = pids(workers)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workers.grade(ORDINARY)
    assert all(wait_for_end(pid) for pid in before if pid not in pids(workers))
    assert workers.grade(ORDINARY) == ORDINARY_OUTCOMES  # no answer is taken for another's


def test_the_parser_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "__import__('os').system('touch F')"
    answers = [code, f"${code}$", rf"\text{{{code}}}", f"{code}+1", code.replace("'", '"'), r"\sqrt{" + code + "}"]
    assert grade_answers(answers, ["2"] * 6) == [0.0] * 6
    reward = MathReward(end_of_thinking=None)
    assert reward([""] * 2, [rf"\boxed{{{code}}}", code], answer=["2"] * 2) == [0.0] * 2
    assert not list(tmp_path.iterdir())


def test_threads_share_the_pool():
    answers, gold_answers = [answer for _, answer in ORDINARY], [gold for gold, _ in ORDINARY]
    scores: dict[int, list[float]] = {}

    def work(number: int) -> None:
        scores[number] = grade_answers(answers, gold_answers)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {i: [1.0, 1.0, 0.0, 0.0, 1.0] for i in range(4)}


def reported_worker(fifo, parent):
    """The process of the worker, once it is about to hang; fails if its parent ends before."""
    with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as report:
        while not (line := report.readline()):
            assert parent.poll() is None, "the parent ended before its worker was asked"
            time.sleep(0.05)
    return int(line)


def test_a_process_ends_while_a_thread_is_grading(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    lines = HANGING_SCRIPT.replace("FAULT", "sleep").splitlines()
    script = "\n".join(
        [
            "import threading",
            *lines[:-1],
            f"threading.Thread(target=lambda: {lines[-1]}, daemon=True).start()",
            "import sys",
            "sys.stdin.read()",
        ]
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(REWARDS_TEST_FIFO=str(fifo)), stdin=subprocess.PIPE
    )
    worker = reported_worker(fifo, parent)
    parent.communicate(timeout=30)  # ends its input, and with it the main thread
    assert parent.returncode == 0
    assert wait_for_end(worker)


def test_asyncio():
    async def main():
        loop = asyncio.get_running_loop()
        inside = grade_answers([r"\sqrt8"], [r"2\sqrt2"])
        threads = [loop.run_in_executor(None, grade_answers, [r"\sqrt8"], [r"2\sqrt2"]) for _ in range(3)]
        return inside, await asyncio.gather(*threads)

    assert asyncio.run(main()) == ([1.0], [[1.0]] * 3)


def grade_in_child(connection) -> None:
    connection.send((grade_answers([r"\sqrt8"], [r"2\sqrt2"]), list(pool._pools)))
    connection.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_make_their_own_pool(method):
    grade_answers([r"\sqrt8"], [r"2\sqrt2"], workers=1)
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=grade_in_child, args=(theirs,))
    child.start()
    scores, pools = ours.recv()
    child.join()
    assert scores == [1.0]
    assert len(pools) == 1  # not the parent's
    assert grade_answers([r"\sqrt8"], [r"2\sqrt2"], workers=1) == [1.0]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *(entry for entry in sys.path if entry)])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_DISABLE_TELEMETRY": "1"} | more


def test_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "print('once')\n"
        "from trl_anytime.rewards import MathReward\n"
        "from trl_anytime.rewards.verifier import pool\n"
        "reward = MathReward(end_of_thinking=None)\n"
        "print(reward([''], [r'\\boxed{\\sqrt8}'], answer=[r'2\\sqrt2']))\n"
        "print([worker.process.pid for made in pool._pools.values() for worker in made._workers][0])\n"
    )
    (tmp_path / "random.py").write_text("raise RuntimeError('a user file that shadows a module')\n")
    done = subprocess.run(
        [sys.executable, "-P", script], env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[:2] == ["once", "[1.0]"], done.stderr
    assert wait_for_end(int(done.stdout.splitlines()[2]))  # the worker did not outlive the script


# A process that a shell starts in the background inherits that Ctrl-C is ignored
HANGING_SCRIPT = """
import signal
from trl_anytime.rewards.verifier import pool
signal.signal(signal.SIGINT, signal.default_int_handler)
pool._WORKER_MODULE = "tests.support.faulty_worker"
settings = pool.PoolSettings(1, 2.0, hard_limit=1000.0, batch_limit=2000.0, memory_limit=512, tasks_per_worker=9)
pool.get_pool(settings).grade([("2", "fault_{FAULT}+x")])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "stuckinC"])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path, fault, signum):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = HANGING_SCRIPT.replace("FAULT", fault)
    parent = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(REWARDS_TEST_FIFO=str(fifo)), stderr=subprocess.PIPE
    )
    worker = reported_worker(fifo, parent)
    parent.send_signal(signum)
    _, errors = parent.communicate(timeout=30)
    assert parent.returncode == -signum
    assert signum != signal.SIGINT or b"KeyboardInterrupt" in errors
    assert wait_for_end(worker)


RANKS_SCRIPT = """
import torch
import torch.distributed as dist
from tests.support.rewards_cases import HOSTILE
from trl_anytime.rewards import MathReward

dist.init_process_group("gloo")
rank = dist.get_rank()
hostile = HOSTILE[:6] + ["(" * 900 + "2" + ")" * 900]
answers = hostile if rank == 0 else [r"\\sqrt8", r"\\sqrt9"] * 3 + [r"2\\sqrt2"]
gold = ["2"] * 7 if rank == 0 else [r"2\\sqrt2"] * 7
metrics = {{}}
reward = MathReward(end_of_thinking=None, cpu_limit=0.5)
completions = ["\\\\boxed{{" + answer + "}}" for answer in answers]
scores = reward([""] * 7, completions, answer=gold, log_metric=metrics.__setitem__)
gathered = [torch.zeros(7) for _ in range(2)]
dist.all_gather(gathered, torch.tensor(scores))
keys = [None, None]
dist.all_gather_object(keys, sorted(metrics))
assert keys[0] == keys[1], keys
with open({out!r} + f"/rank{{rank}}", "w") as file:
    file.write(repr(([rank_scores.tolist() for rank_scores in gathered], metrics["rewards/MathReward/timeouts"])))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_with_hostile_answers_on_one(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS_SCRIPT.format(out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [[0.0] * 7, [1.0, 0.0] * 3 + [1.0]]
    timeouts = {}
    for rank in range(2):
        gathered, timeouts[rank] = eval((tmp_path / f"rank{rank}").read_text())
        assert gathered == expected
    assert timeouts == {0: 7.0, 1: 0.0}


def test_default_workers(monkeypatch):
    def cores(count: int, pinned: int, ranks: str) -> int:
        monkeypatch.setattr(os, "cpu_count", lambda: count)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(pinned)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        return default_workers()

    assert cores(8, 8, "1") == 4
    assert cores(96, 96, "8") == 4  # 12 cores each, half of them 6, at most 4
    assert cores(16, 16, "4") == 2
    assert cores(2, 2, "2") == 1
    assert cores(64, 6, "8") == 3  # pinned by the launcher: these 6 are this rank's own


def test_workers_start_without_torch():
    code = (
        "import sys, trl_anytime.rewards.verifier.worker, trl_anytime.rewards.verifier.symbolic; "
        "print(sorted(sys.modules))"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    ).stdout
    assert not {"'torch'", "'transformers'", "'trl'", "'datasets'", "'numpy'"} & set(modules.strip("[]\n").split(", "))


def test_duplicates_are_graded_once(monkeypatch):
    sent: Counter[tuple[str, str]] = Counter()

    class Counting:
        def grade(self, pairs):
            sent.update(pairs)
            return ["equal"] * len(pairs)

    monkeypatch.setattr("trl_anytime.rewards.math.get_pool", lambda settings: Counting())
    assert grade_answers([r"\sqrt8"] * 5, [r"2\sqrt2"] * 5) == [1.0] * 5
    assert sent == {(r"2\sqrt2", r"\sqrt8"): 1}
