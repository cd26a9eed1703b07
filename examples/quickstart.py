"""
From nothing to an anytime model in a few minutes, offline and on a CPU:

    make quickstart

or, with the package and its extra `plot` installed, `python examples/quickstart.py` (`--help` lists the options).

A tiny Qwen3 model starts out thinking wastefully and fallibly about a toy task (`toy_task.py`). BRPO teaches it to be
right as early as possible, at every thinking budget.
"""

import argparse
import json
import os
import shlex
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tensors this small, more threads only wait

from matplotlib.figure import Figure
from toy_task import BRPO_SETTINGS, end_of_chain_reward, load, show_progress

from trl_anytime import BRPOConfig, BRPOTrainer
from trl_anytime.outside.progress import hide_host_bars_in_pipe

BUDGETS = [10, 20, 30, 40]
EVAL_BUDGETS = [4, 6, 8, 10, 15, 20, 30, 40]
PROMPTS_PER_UPDATE, GROUP_SIZE = 32, 8


def main(options: argparse.Namespace) -> None:
    start, model_dir = time.time(), options.output_dir / "model"
    print(f"\n1. Supervised fine-tuning of a tiny Qwen3, {options.sft_steps} steps")
    model, tokenizer, train_dataset, eval_dataset = load(
        seed=options.seed,
        sft_steps=options.sft_steps,
        train_problems=options.updates * PROMPTS_PER_UPDATE,
        eval_problems=options.eval_problems,
        longest=BUDGETS[-1],
        output_dir=model_dir,
    )
    config = BRPOConfig(
        str(model_dir),
        budgets=BUDGETS,
        eval_budgets=EVAL_BUDGETS,
        prior=options.prior,
        baseline=options.baseline,
        num_summaries=2,  # the gradient of the paper's 4 would drown that of so short a trace
        num_generations=GROUP_SIZE,
        per_device_train_batch_size=PROMPTS_PER_UPDATE * GROUP_SIZE,
        per_device_eval_batch_size=250,
        max_steps=options.updates,
        learning_rate=8e-4,
        seed=options.seed,
        card_dataset="pointer chasing",
        card_eval_dataset="pointer chasing, held out",
        card_metric="accuracy",
        card_question=eval_dataset[0]["prompt"][0]["content"],
        **BRPO_SETTINGS,
    )
    trainer = BRPOTrainer(
        model,
        config,
        train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        reward_funcs=end_of_chain_reward,
    )
    show_progress(trainer)

    print(f"\n2. Accuracy before, on {options.eval_problems} held-out problems")
    before = evaluate(trainer)
    print(f"\n3. BRPO at budgets {BUDGETS}, prior {options.prior}, {options.updates} updates")
    trainer.train()
    print("\n4. Accuracy after")
    after = evaluate(trainer)
    trainer.save_model()
    trainer.create_model_card(model_name="Pointer chasing at any thinking budget")

    plot_curves({"before (SFT)": before, "after BRPO": after}, options.output_dir / "curves.png")
    results = {"budgets": EVAL_BUDGETS, "before": before, "after": after, "seconds": round(time.time() - start, 1)}
    (options.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\nbudget  " + "".join(f"{budget:7d}" for budget in EVAL_BUDGETS))
    for name, curve in {"before": before, "after": after}.items():
        print(f"{name:8}" + "".join(f"{accuracy:7.3f}" for accuracy in curve))
    print(f"\n{results['seconds']:.0f} seconds. In {options.output_dir}: model/, curves.png, results.json")
    words = ["trl-anytime", "generate", str(model_dir), config.card_question, "--budgets", "4,10,40"]
    print(f"\nAsk the model, at three budgets:\n{shlex.join(words)}")


def evaluate(trainer: BRPOTrainer) -> list[float]:
    """Return the accuracy on the held-out problems at each of EVAL_BUDGETS."""
    metrics = trainer.evaluate()
    return [metrics[f"eval_anytime/reward@{budget}"] for budget in EVAL_BUDGETS]


def plot_curves(curves: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (label, accuracy), line, color in zip(curves.items(), ("o--", "o-"), ("tab:gray", "tab:blue"), strict=True):
        axes.plot(EVAL_BUDGETS, accuracy, line, color=color, label=label)
    axes.set(xlabel="thinking budget (tokens)", ylabel="accuracy on held-out problems", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Warm-start a tiny model, train it with BRPO, show what changed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sft_steps", type=int, default=700, help="steps of supervised fine-tuning")
    parser.add_argument("--updates", type=int, default=60, help="updates by BRPO")
    parser.add_argument("--prior", default="uniform", choices=["uniform", "linear", "base"])
    parser.add_argument("--baseline", default="brpo", choices=["brpo", "v1", "v2", "none"])
    parser.add_argument("--eval_problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/quickstart"))
    warnings.simplefilter("ignore", FutureWarning)  # the libraries' own
    hide_host_bars_in_pipe()
    main(parser.parse_args())
