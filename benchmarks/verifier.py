r"""How right and how fast the answer verifier is, next to `math_verify` and TRL's `accuracy_reward`.

    python -m benchmarks.verifier --outside

grades the pairs of `tests/data/answers.jsonl`, whose outcomes are beyond doubt and which were not written here, with
all three. It prints a table: pairs graded right, wrong answers accepted, right answers refused, pairs per second of
CPU time (the best of two passes after one that warms up, without what our verifier remembers of earlier passes).
Files of other pairs are taken with `--pairs`.

    python -m benchmarks.verifier --json

prints this table as `outside`, and with it, for our verifier on the data sets of `--data`:

- `missed`: right answers that scored 0, of `of_right`: every gold of the data sets against itself and against
  mechanical rewritings of it, and the equal pairs of `tests/support/rewards_cases.py`;
- `wrongly_accepted`: wrong answers that scored 1, of `of_wrong`: `perturbed` gold answers (digits changed or added,
  signs, order, brackets, items left out) and the different pairs of `tests/support/rewards_cases.py`;
- `median_ms`, `p99_ms`, `max_ms`: one answer, in a call of its own, workers warm;
- `answers_per_s_1`, `answers_per_s_2`: `answers` rewritten and perturbed gold answers of MATH-500 in one call, with
  one and with two warm workers, the best of three;
- `speed_over_trl`: TRL's time over ours, one worker, on 1,000 of these (TRL's gold answers in `\boxed{}`, or it skips
  most);
- `worker_mib`: resident memory of one worker after 5,000 tasks, never replaced;
- `hostile_max_s`: the longest that any of the hostile answers held up a call.
"""

import argparse
import json
import logging
import random
import re
import statistics
import time
from pathlib import Path

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from tests.support.rewards_cases import DIFFERENT, EQUAL, HOSTILE
from trl_anytime.rewards import MathReward, grade_answers
from trl_anytime.rewards.verifier.equality import answers_equal
from trl_anytime.rewards.verifier.forms import Collection, Formula, as_fraction, read
from trl_anytime.rewards.verifier.gold_answers import gold_alternatives
from trl_anytime.rewards.verifier.latex import normalize
from trl_anytime.rewards.verifier.pool import PoolSettings, WorkerPool, close_pools
from trl_anytime.rewards.verifier.symbolic import Symbolic

ROOT = Path(__file__).resolve().parents[1]

OUTSIDE = ROOT / "tests" / "data" / "answers.jsonl"
FILES = ("aime24", "amc", "math500", "math_train_2000")


def load(folder: Path, name: str) -> list[str]:
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [gold[0] for row in rows if (gold := gold_alternatives(row["answer"]))]


def rewritings(gold: str) -> list[str]:
    """The same answer in the ways that models write it."""
    rewritten = {
        f"${gold}$",
        f" {gold} . ",
        re.sub(r"\\frac(?![a-z])", r"\\dfrac", gold),
        gold.replace(",", ", ").replace(", \\!", ",\\!"),
        re.sub(r"(?<!\\left)\((.*)(?<!\\right)\)", r"\\left(\1\\right)", gold),
        re.sub(r"(?<![\d ])\\frac\{(-?\d+)\}\{(\d+)\}", r"(\1)/(\2)", gold),  # no mixed numbers
        re.sub(r"(?<![\d.,\\!}])(\d{1,3})(\d{3})(?![\d.,\\_])", r"\1{,}\2", gold),
        gold.replace("\\text{", "\\textbf{"),
        gold.replace("\\sqrt{", "\\sqrt {"),
    }
    if (value := as_fraction(gold)) is not None:
        rewritten |= {f"x = {gold}", rf"\frac{{{3 * value.numerator}}}{{{3 * value.denominator}}}"}
    return sorted(rewritten - {gold})


def perturbations(gold: str, choose: random.Random) -> list[str]:
    """Answers that are certainly wrong."""
    if "\\approx" in gold:  # offers two values
        return []
    wrong = set()
    places = [match.start() for match in re.finditer(r"\d", gold)]
    for place in choose.sample(places, min(2, len(places))):
        other = choose.choice([digit for digit in "123456789" if digit != gold[place]])
        wrong.add(gold[:place] + other + gold[place + 1 :])
    if places:
        wrong.add(gold[: places[-1] + 1] + "7" + gold[places[-1] + 1 :])
    value = as_fraction(gold)
    if value:
        wrong |= {f"-({gold})", str(value + 1), str(1 / value)} if abs(value) != 1 else {f"-({gold})"}
    form = read(normalize(gold))
    if isinstance(form, Formula) and form.text.isalpha():
        wrong.add(form.text + "+1")
    if isinstance(form, Collection) and gold[0] in "([" and gold[-1] in ")]" and form.kind != "cup":
        wrong.add(("[" if gold[0] == "(" else "(") + gold[1:])
        if len(form.items) == 2 and form.items[0] != form.items[1]:
            first, _, second = gold[1:-1].partition(",")
            wrong.add(f"{gold[0]}{second},{first}{gold[-1]}")
        wrong.add(gold[0] + gold[1:-1].partition(",")[0] + gold[-1])
    return sorted(wrong - {gold})


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def count_errors(gold_answers: list[str], choose: random.Random) -> dict:
    right = [(gold, answer) for gold in gold_answers for answer in (gold, *rewritings(gold))]
    wrong = [(gold, answer) for gold in gold_answers for answer in perturbations(gold, choose)]
    same = [pair for family in EQUAL.values() for pair in family]
    different = [pair for family in DIFFERENT.values() for pair in family if gold_alternatives(pair[0])]

    def failures(pairs, expected):
        scores = grade_answers([a for _, a in pairs], [g for g, _ in pairs], batch_limit=3600.0)
        return [pair for pair, score in zip(pairs, scores, strict=True) if score != expected]

    missed = failures(right, 1.0) + failures(same, 1.0)
    accepted = failures(wrong, 0.0) + failures(different, 0.0)
    return {
        "missed": len(missed),
        "of_right": len(right) + len(same),
        "wrongly_accepted": len(accepted),
        "perturbed": len(wrong),
        "of_wrong": len(wrong) + len(different),
        "missed_pairs": missed[:20],
        "wrongly_accepted_pairs": accepted[:20],
    }


def measure_speed(gold_answers: list[str], choose: random.Random) -> dict:
    pairs = [(g, a) for _ in range(3) for g in gold_answers for a in (*rewritings(g), *perturbations(g, choose))]
    choose.shuffle(pairs)
    warm, load = pairs[:4000], pairs[4000:]  # the parser of a worker learns its grammar while it works

    def grade(part: list[tuple[str, str]], workers: int) -> None:
        grade_answers([a for _, a in part], [g for g, _ in part], workers=workers, batch_limit=3600.0)

    rates = {1: 0.0, 2: 0.0}
    for workers in rates:
        grade(warm, workers)
    for _ in range(3):  # the best of three, taking turns: other load on the machine only takes away
        for workers in rates:
            rates[workers] = max(rates[workers], len(load) / seconds(lambda w=workers: grade(load, w)))
    times = sorted(seconds(lambda p=pair: grade([p], 1)) * 1000 for pair in load[:1000])
    return {
        "answers": len(load),
        "median_ms": statistics.median(times),
        "p99_ms": times[int(len(times) * 0.99)],
        "max_ms": times[-1],
        "answers_per_s_1": rates[1],
        "answers_per_s_2": rates[2],
        "speed_over_trl": compare_with_trl(load[:1000]),
    }


def compare_with_trl(pairs: list[tuple[str, str]]) -> float:
    completions = [[{"role": "assistant", "content": rf"\boxed{{{answer}}}"}] for _, answer in pairs]
    reward = MathReward(end_of_thinking=None, workers=1, batch_limit=3600.0)
    gold_answers = [rf"\boxed{{{gold}}}" for gold, _ in pairs]
    reward([""], completions[:1], solution=gold_answers[:1])
    times = {"trl": 0.0, "ours": 0.0}
    for start in range(0, len(pairs), 100):  # side by side: the machine's load meets both alike
        part = slice(start, start + 100)
        times["trl"] += seconds(lambda s=part: accuracy_reward(completions[s], gold_answers[s]))
        times["ours"] += seconds(lambda s=part: reward([""] * 100, completions[s], solution=gold_answers[s]))
    return times["trl"] / times["ours"]


def ours(gold: str, answer: str) -> bool:
    return bool(answers_equal(gold, answer, Symbolic()))


def math_verify(gold: str, answer: str) -> bool:
    return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}")))


def trl(gold: str, answer: str) -> bool:
    completion = [{"role": "assistant", "content": rf"\boxed{{{answer}}}"}]
    return bool(accuracy_reward([completion], [rf"\boxed{{{gold}}}"])[0])


def grade_outside(files: list[Path]) -> dict[str, dict[str, float]]:
    """Our verifier and others on pairs from elsewhere, each in this process, so that CPU times compare."""
    pairs = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    table: dict[str, dict[str, float]] = {}
    for grader in (ours, math_verify, trl):
        times = []
        for _ in range(3):
            normalize.cache_clear()
            read.cache_clear()
            start = time.process_time()
            verdicts = [grader(pair["gold"], pair["answer"]) for pair in pairs]
            times.append(time.process_time() - start)
        outcomes = list(zip(verdicts, [bool(pair["equal"]) for pair in pairs], strict=True))
        table[grader.__name__] = {
            "pairs": len(pairs),
            "right": sum(verdict == equal for verdict, equal in outcomes),
            "wrongly_accepted": sum(verdict and not equal for verdict, equal in outcomes),
            "wrongly_refused": sum(equal and not verdict for verdict, equal in outcomes),
            "pairs_per_cpu_s": round(len(pairs) / min(times[1:]), 1),
        }
    return table


def as_table(rows: dict[str, dict[str, float]]) -> str:
    columns = list(next(iter(rows.values())))
    lines = ["| grader | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:g}" for column in columns) + " |" for name, row in rows.items()
    ]
    return "\n".join(lines)


def measure_memory(gold_answers: list[str], choose: random.Random, tasks: int = 5000) -> float:
    """Everything goes to the worker here, numbers too; formulas first, which need most."""
    pairs = [(g, a) for g in gold_answers for a in (*rewritings(g), *perturbations(g, choose))]
    pairs.sort(key=lambda pair: -len(pair[0]))
    pool = WorkerPool(PoolSettings(1, 2.0, 10.0, 3600.0, 1024, 10**9))
    pool.grade(pairs[:tasks])
    memory = resident_mib(pool._workers[0].process.pid)
    assert pool._workers[0].tasks_done == tasks
    pool.close()
    return memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--outside", action="store_true", help="only compare the graders on pairs from elsewhere")
    parser.add_argument("--pairs", type=Path, nargs="+", default=[OUTSIDE], help="files of such pairs, JSON lines")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line per figure")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)  # of the other graders, a line for each answer that they cannot read
    outside = grade_outside(arguments.pairs)
    if arguments.outside:
        print(json.dumps(outside, indent=2) if arguments.json else as_table(outside))
        return
    choose = random.Random(0)
    gold_answers = {name: load(arguments.data, name) for name in FILES}
    everything = [gold for name in FILES for gold in gold_answers[name]]
    figures: dict = {"outside": outside, **count_errors(everything, choose)}
    figures |= measure_speed(gold_answers["math500"], choose)
    figures["hostile_max_s"] = max(seconds(lambda a=a: grade_answers([a], ["2"], workers=1)) for a in HOSTILE)
    figures["worker_mib"] = measure_memory(everything, choose)
    close_pools()
    figures = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
    print(json.dumps(figures, indent=2) if arguments.json else "\n".join(f"{k}: {v}" for k, v in figures.items()))


if __name__ == "__main__":
    main()
