"""
What a whole training step costs, by phase:

    python benchmarks/step.py                    # tables, on the CPU
    python benchmarks/step.py --json             # a list of objects
    python benchmarks/step.py --device cuda --model-shape qwen2.5-1.5b --dtype bfloat16 --gradient-checkpointing \
        --budgets 2000 4000 6000 8000 --prompt 256 --summary 118 --trainers GRPO BRPO

Compared are TRL's `GRPOTrainer` and `BRPOTrainer`, the latter also without pruning and on separate rows. All train the
same random model on the same prompts in one process, and take their steps in turn, so that other work on the machine
hurts all alike. No trace and no summary ends early: the end of thinking and of the text are suppressed. GRPO's
completions have as many tokens as the traces. Each completion or summary earns 1 with a probability, and 0 otherwise.
With `--agreement 0.86`, all summaries of a cut earn the same in 86 of 100 cuts, as behind the quickstart's warm start.
They have no advantage then, and are left out.

Seconds are those of the processor on a CPU, and those until the device has finished on a GPU. Given is the step of
median length.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import BRIDGE, SHAPES, add_options, finished_at, make_model, parse, quarters

from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.checks.run_start import StartReport
from trl_anytime.rollout.timing import PhaseTimes
from trl_anytime.training.progress import StepLines

# By name: what it sets, or `None` for TRL's own trainer
TRAINERS: dict[str, dict[str, Any] | None] = {
    "GRPO": None,
    "BRPO": {},
    "unpruned": {"prune": False},
    "rows": {"packing": "rows"},
}
PHASES = ("thinking", "summarising", "grading", "scoring", "updating")
WARM_UP = 1  # steps
END = "</think>"


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word, so that lengths are exact."""
    words = ["<pad>", "<end>", END, *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(END, special=False)])  # it does not melt into its neighbours
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def make_trainer(name: str, options: argparse.Namespace, budgets: list[int], folder: str) -> GRPOTrainer:
    tokenizer = make_tokenizer(SHAPES[options.model_shape]["vocab_size"])
    draw = random.Random(0)
    words = tokenizer.convert_ids_to_tokens(range(3, len(tokenizer)))
    steps = WARM_UP + options.repeats
    prompts = [{"prompt": " ".join(draw.choices(words, k=options.prompt))} for _ in range(steps)]
    ends = tokenizer.convert_tokens_to_ids(["<end>", END])
    common = {
        "num_generations": options.group_size,
        "per_device_train_batch_size": options.group_size,
        "max_steps": steps,
        "generation_kwargs": {"suppress_tokens": ends},
        "gradient_checkpointing": options.gradient_checkpointing,
        "bf16": options.dtype == "bfloat16",
        "use_cpu": options.device == "cpu",
        "learning_rate": 1e-6,
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    data, model = Dataset.from_list(prompts), make_model(options, eos_token_id=ends[0], pad_token_id=0)
    settings = TRAINERS[name]
    if settings is None:
        reward = partial(random_reward, draw, options.reward_rate)
        args = GRPOConfig(folder, max_completion_length=budgets[-1], **common)
        return GRPOTrainer(model, reward, args, data, processing_class=tokenizer)
    args = BRPOConfig(
        folder,
        budgets=budgets,
        num_summaries=options.num_summaries,
        max_summary_length=options.summary,
        truncation_bridge=" ".join([*words[: options.bridge - 2], END]),
        answer_bridge=words[-1],
        alarms=False,  # they would say that no trace ends
        **common,
        **settings,
    )
    reward = partial(summary_reward, draw, options.reward_rate, options.agreement)
    return BRPOTrainer(model, args, data, reward_funcs=reward, processing_class=tokenizer)


def random_reward(draw: random.Random, rate: float, completions: list, **kwargs) -> list[float]:
    return [float(draw.random() < rate) for _ in completions]


def summary_reward(
    draw: random.Random, rate: float, agreement: float, completions: list, cut: list[int], **kwargs
) -> list[float]:
    """Draw rewards of summaries, of which those of a cut follow each other."""
    rewards: list[float] = []
    for _, summaries in groupby(cut):
        drawn = random_reward(draw, rate, list(summaries))
        rewards += drawn[:1] * len(drawn) if draw.random() < agreement else drawn
    return rewards


class Stepper(TrainerCallback):
    """A trainer that takes one step at a time, in a thread of its own, with the seconds of each phase."""

    def __init__(self, trainer: GRPOTrainer, clock: Callable[[], float]):
        self.trainer, self.clock, self.times = trainer, clock, PhaseTimes()
        self.times.clock = clock
        self._time_phases()
        for callback in (StepLines, PrinterCallback, StartReport):  # standard output belongs to the results
            trainer.remove_callback(callback)
        trainer.add_callback(self)
        self._turn, self._over, self._error = threading.Semaphore(0), threading.Semaphore(0), None
        self.pruned: list[float] = []  # the share of packed tokens that each step has left out
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def step(self) -> dict[str, float]:
        """Take a step, and return the seconds of each phase. Updating is all that the other phases are not."""
        self.times.seconds.clear()
        start = self.clock()
        self._turn.release()
        self._over.acquire()
        if self._error is not None:
            raise self._error
        total = self.clock() - start
        phases = {phase: self.times.take(phase) for phase in PHASES}
        return {**phases, "updating": total - sum(phases.values()), "step": total}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruned = list(self.trainer._metrics["train"]["anytime/pruned_ratio"])
        self._over.release()
        self._turn.acquire()

    def finish(self) -> None:
        """Let the training end, after its last step."""
        self._turn.release()
        self._thread.join()

    def _train(self) -> None:
        self._turn.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
            self._over.release()

    def _time_phases(self) -> None:
        """Measure the methods that are phases. Their names are private to TRL and to this package."""
        trainer = self.trainer
        self._measure(trainer, "_calculate_rewards", "grading")
        self._measure(trainer, "_get_per_token_logps_and_entropies", "scoring", lambda: not torch.is_grad_enabled())
        if not isinstance(trainer, BRPOTrainer):
            self._measure(trainer, "_generate", "thinking")
            return
        generation = trainer.generation
        generation.times.clock = self.clock
        roll_out = generation.roll_out

        def measured(*args: Any, **kwargs: Any) -> Any:
            rollouts = roll_out(*args, **kwargs)
            self.times.seconds |= generation.times.seconds
            return rollouts

        generation.roll_out = measured

    def _measure(self, owner: Any, method: str, phase: str, when: Callable[[], bool] = lambda: True) -> None:
        original = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.times(phase) if when() else nullcontext():
                return original(*args, **kwargs)

        setattr(owner, method, measured)


def measure(options: argparse.Namespace, budgets: list[int], folder: str) -> list[dict[str, Any]]:
    """Take the steps of all trainers in turn, and describe the median one of each."""
    clock = partial(finished_at, options.device, time.process_time if options.device == "cpu" else time.perf_counter)
    steppers = {name: Stepper(make_trainer(name, options, budgets, folder), clock) for name in options.trainers}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in steppers}
    for i in range(WARM_UP + options.repeats):
        for name, stepper in steppers.items():
            seconds = stepper.step()
            print(f"budget {budgets[-1]}, step {i}, {name}: {seconds['step']:.2f} s", file=sys.stderr)
            if i >= WARM_UP:
                steps[name].append(seconds)
    for stepper in steppers.values():
        stepper.finish()
    medians = {name: sorted(taken, key=itemgetter("step"))[len(taken) // 2] for name, taken in steps.items()}
    results = []
    for name, seconds in medians.items():
        result = {"budget": budgets[-1], "trainer": name, **{k: round(value, 4) for k, value in seconds.items()}}
        if "GRPO" in medians:
            result["over_grpo"] = round(seconds["step"] / medians["GRPO"]["step"], 3)
        pruned = steppers[name].pruned
        result["pruned_ratio"] = round(sum(pruned) / len(pruned), 3) if pruned else 0.0
        results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, summary=32, repeats=5)
    parser.add_argument("--budgets", type=int, nargs="+", help="default: quarters of 512 and of 1024")
    parser.add_argument("--group-size", type=int, default=4, help="rollouts of a prompt, and of a step")
    parser.add_argument("--bridge", type=int, default=BRIDGE, help="tokens between thinking and summary")
    parser.add_argument("--reward-rate", type=float, default=0.5, help="probability of a reward of 1")
    parser.add_argument("--agreement", type=float, default=0.0, help="share of cuts whose summaries earn the same")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--trainers", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    options = parse(parser)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for budgets in quarters((512, 1024), options.budgets):
            results += measure(options, budgets, folder)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    columns = list(results[0])
    print("".join(f"{name:>14}" for name in columns))
    for result in results:
        print("".join(f"{v:>14.2f}" if isinstance(v, float) else f"{v:>14}" for v in map(result.get, columns)))


if __name__ == "__main__":
    main()
