r"""
From a chat model to an anytime reasoner, on two CPU cores and without a GPU:

    make demo

or, with the package and its extra `demo` installed, `python examples/demo.py` (`--help` lists the options).

SmolLM2-135M-Instruct does not think. A warm start teaches it to think about sums (`arithmetic.py`), wastefully and
fallibly. BRPO then teaches it to be right as early as possible. Each stage is a folder in `outputs/demo`. A run that
was interrupted goes on when the command is repeated.
"""

import argparse
import gc
import json
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import arithmetic
import datasets
import torch
import transformers
import warm_start
from peft import LoraConfig
from smollm2 import HUB_ID, Unavailable, get_model, whole_folder
from toy_task import show_progress
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.cli import main as trl_anytime
from trl_anytime.method.budgets import check_budgets
from trl_anytime.rewards import TaskReward
from trl_anytime.training.checkpoint import checkpoints_of

BUDGETS = [16, 32, 64, 96]
PROMPTS_PER_UPDATE, GROUP_SIZE = 8, 8
# Seeds of the problems, on top of the run's
EVAL_SEED, SFT_SEED, RL_SEED = 1, 2, 3


def main(options: argparse.Namespace) -> None:
    output = options.output_dir
    check_settings(output, options)
    torch.set_num_threads(options.threads)
    base = options.model or output / "base"
    started, trained = output / "warm_start", output / "trained"

    if options.model is None and not base.exists():
        print(f"\n1. Get {HUB_ID}", flush=True)
        with timed("download", output):
            print(f"   From {get_model(base)}")
    problems = arithmetic.make_problems(options.eval_problems, EVAL_SEED + 10 * options.seed)
    if not started.exists():
        print(
            f"\n2. Warm start: {options.sft_steps} steps of {warm_start.SFT_BATCH_SIZE} made chains of thought",
            flush=True,
        )
        with timed("warm start", output):
            supervised_fine_tune(base, started, set(problems["question"]), options)
    print("\n3. Accuracy before", flush=True)
    with timed("evaluation before", output):
        evaluate(started, output / "before", options)
    if not (trained / "trainer_state.json").exists():  # written last
        print(f"\n4. BRPO at budgets {options.budgets}, {options.updates} updates", flush=True)
        with timed("BRPO", output):
            train(started, trained, set(problems["question"]), options)
    print("\n5. Accuracy after", flush=True)
    with timed("evaluation after", output):
        evaluate(trained, output / "after", options, baseline=output / "before" / "results.json")
    report(output, options)


def check_settings(output: Path, options: argparse.Namespace) -> None:
    """Refuse to go on with a run of other settings. Those of a new run are written to its folder."""
    file = output / "settings.json"
    settings = {name: value for name, value in vars(options).items() if name not in ("output_dir", "threads")}
    settings["model"] = None if options.model is None else str(options.model)
    if file.exists():
        made = json.loads(file.read_text())
        changed = [f"{name}={made.get(name)!r}" for name in settings if made.get(name) != settings[name]]
        if changed:
            raise Unavailable(
                f"The run in {output} was started with {', '.join(changed)}. Repeat that command, or set another "
                "--output_dir."
            )
    output.mkdir(parents=True, exist_ok=True)
    write(file, settings)


def write(file: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(file)


@contextmanager
def timed(stage: str, output: Path) -> Iterator[None]:
    """Add the seconds of a stage, also of one that is interrupted, to `costs.json`, with the memory at its peak."""
    file, start = output / "costs.json", time.time()
    try:
        yield
    finally:
        costs = json.loads(file.read_text()) if file.exists() else {"seconds": {}, "gibibytes": 0}
        costs["seconds"][stage] = round(costs["seconds"].get(stage, 0) + time.time() - start, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # of kibibytes
        costs["gibibytes"] = round(max(costs["gibibytes"], peak), 2)
        write(file, costs)
        gc.collect()  # trainers hold themselves in cycles, and with them weights and optimiser, in the next stage too


def supervised_fine_tune(base: Path, folder: Path, held_out: set[str], options: argparse.Namespace) -> None:
    """Teach a chat model to think, and save it with its anytime config."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    warm_start.open_thinking(model, tokenizer)
    problems = arithmetic.make_problems(
        options.sft_steps * warm_start.SFT_BATCH_SIZE, SFT_SEED + 10 * options.seed, held_out
    )
    rng = random.Random(options.seed)
    dataset = warm_start.make_sft_dataset(
        problems["question"], arithmetic.make_thinking, tokenizer, options.budgets[-1], rng
    )
    checkpoints = folder.with_name(f"{folder.name}_checkpoints")
    trainer = warm_start.make_sft_trainer(model, tokenizer, dataset, checkpoints, options.sft_steps, options.seed)
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    with whole_folder(folder) as part:
        trainer.save_model(str(part))
        warm_start.make_anytime_config(tokenizer, options.budgets).save_pretrained(part)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that a `Trainer` has written to its end, which is `trainer_state.json`."""
    whole = [str(path) for _, path in checkpoints_of(folder) if (path / "trainer_state.json").exists()]
    return whole[-1] if whole else None


def train(started: Path, folder: Path, held_out: set[str], options: argparse.Namespace) -> None:
    """Train by BRPO, and save the model with its card."""
    problems = arithmetic.make_problems(options.updates * PROMPTS_PER_UPDATE, RL_SEED + 10 * options.seed, held_out)
    dataset = problems.map(lambda row: {"prompt": warm_start.make_prompt(row["question"])})
    args = BRPOConfig(
        str(folder),
        budgets=options.budgets,
        num_summaries=2,
        summary_weight="objective",
        max_summary_length=warm_start.MAX_SUMMARY_LENGTH,
        truncation_bridge=warm_start.TRUNCATION_BRIDGE,
        answer_bridge=warm_start.ANSWER_BRIDGE,
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=GROUP_SIZE,  # the logits of more rows would be what takes the memory
        gradient_accumulation_steps=PROMPTS_PER_UPDATE,
        max_steps=options.updates,
        learning_rate=options.learning_rate or (1e-3 if options.lora else 5e-5),
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        save_steps=5,
        card_base_model=None if options.model else HUB_ID,
        card_dataset="chain_sum of reasoning-gym",
        card_question=dataset[0]["question"],
        **warm_start.common_settings(options.seed),
    )
    trainer = BRPOTrainer(
        str(started),
        args,
        dataset,
        reward_funcs=TaskReward(),
        processing_class=AutoTokenizer.from_pretrained(started),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if options.lora else None,
    )
    show_progress(trainer)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    trainer.save_model()
    trainer.create_model_card(model_name="Sums at any thinking budget")
    trainer.save_state()


def evaluate(model: Path, folder: Path, options: argparse.Namespace, baseline: Path | None = None) -> None:
    """Measure the curve by `trl-anytime eval`. One that was interrupted goes on."""
    if (folder / "results.json").exists():
        return
    problems = arithmetic.problems_name(options.eval_problems, EVAL_SEED + 10 * options.seed)
    words = ["eval", model, "--dataset", f"chain_sum={problems}", "--instruction", ""]
    words += ["--budgets", ",".join(map(str, options.budgets)), "--batch-size", 64, "--output", folder]
    # In bfloat16, answers on top of the trace's cache differ too much from a plain forward pass to be used
    words += ["--dtype", "float32", "--device", "cpu"]
    if baseline is not None:
        words += ["--baseline", baseline]
    code = trl_anytime([str(word) for word in words])
    if code:
        sys.exit(code)


def report(output: Path, options: argparse.Namespace) -> None:
    """Show what changed: samples, the table, what it cost, where everything lies."""
    samples = {when: read_samples(output / when / "samples.jsonl") for when in ("before", "after")}
    for question in range(min(3, options.eval_problems)):
        for when, records in samples.items():
            show_sample(records[question], when)
    curves = {when: json.loads((output / when / "results.json").read_text()) for when in samples}
    print("\nbudget  " + "".join(f"{budget:7d}" for budget in options.budgets))
    for when, results in curves.items():
        (curve,) = results["curves"].values()
        print(f"{when:8}" + "".join(f"{estimate['mean']:7.3f}" for estimate in curve["accuracy"]))
    costs = json.loads((output / "costs.json").read_text())
    for what, values in {"Seconds": costs["seconds"], "of BRPO": phases(output / "trained")}.items():
        print(f"{what}: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in values.items()))
    print(f"Memory: at most {costs['gibibytes']} GiB")
    print(
        f"In {output}: trained/ (the model with its card, README.md), after/curve.png (both curves), before/ and "
        "after/ (all samples), warm_start/, base/"
    )


def phases(trained: Path) -> dict[str, float]:
    """Return the seconds of training by phase."""
    logs = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    names = sorted({name for log in logs for name in log if name.startswith("time/")})
    return {name.removeprefix("time/"): sum(log.get(name, 0) for log in logs) for name in names}


def read_samples(file: Path) -> list[dict[str, Any]]:
    """Return the samples of an evaluation in the order of the problems."""
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]  # behind the protocol
    return sorted(records, key=lambda record: record["question"])


def show_sample(record: dict[str, Any], when: str) -> None:
    """Print a trace, and what is answered at each budget."""
    print(f"\nProblem {record['question'] + 1}, {when}, {record['thinking_tokens']} tokens: {record['thinking']}")
    for cut in record["cuts"]:
        verdict = "right" if cut["rewards"][0] == 1 else "wrong"
        print(f"   budget {', '.join(map(str, cut['budgets']))}: {{{cut['answers'][0]}  {verdict}")


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that make no run, before anything is downloaded."""
    for name in ("sft_steps", "updates", "eval_problems", "threads"):
        if getattr(options, name) < 1:
            raise Unavailable(f"--{name} must be at least 1, got {getattr(options, name)}.")
    check_budgets(options.budgets)
    if options.model is not None and not (options.model / "config.json").is_file():
        raise Unavailable(f"There is no model in {options.model}: config.json is missing. Set --model to its folder.")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Warm-start a chat model, train it with BRPO, show what changed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lora", action="store_true", help="train a LoRA adapter instead of all weights")
    parser.add_argument("--model", type=Path, help="folder of another ChatML model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="thinking budgets in tokens")
    parser.add_argument("--sft_steps", type=int, default=110, help="steps of the warm start")
    parser.add_argument("--updates", type=int, default=40, help="updates by BRPO")
    parser.add_argument("--learning_rate", type=float, help="of BRPO (default: 5e-5, with LoRA 1e-3)")
    parser.add_argument("--eval_problems", type=int, default=256, help="held-out problems")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (default: as many as cores)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    return parser.parse_args(words)


if __name__ == "__main__":
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    datasets.disable_progress_bars()  # those of files, which would hide the stages'
    transformers.utils.logging.disable_progress_bar()
    try:
        parsed = parse()
        check_options(parsed)
        main(parsed)
    except (Unavailable, ValueError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("demo: interrupted. Repeat the command to go on.")
