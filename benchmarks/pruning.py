"""
What leaving out rows without gradient (`prune`) saves on the quickstart's task, right behind its warm start:

    python -m benchmarks.pruning

Two trainers begin with the same weights and draw the same rollouts. One of them prunes.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from examples import toy_task
from trl_anytime import BRPOConfig, BRPOTrainer

BUDGETS = [10, 20, 30, 40]
PROMPTS_PER_UPDATE, GROUP_SIZE = 32, 8


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what `prune` saves on the quickstart's task.")
    parser.add_argument("--sft_steps", type=int, default=700, help="steps of the warm start")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=PROMPTS_PER_UPDATE, help="prompts of an update")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer, dataset, _ = toy_task.load(
            seed=0,
            sft_steps=options.sft_steps,
            train_problems=options.updates * options.prompts,
            eval_problems=1,
            longest=BUDGETS[-1],
            output_dir=Path(folder),
        )
        logs = {}
        for prune in (True, False):
            args = BRPOConfig(
                folder,
                budgets=BUDGETS,
                num_summaries=2,
                num_generations=GROUP_SIZE,
                per_device_train_batch_size=options.prompts * GROUP_SIZE,
                max_steps=options.updates,
                learning_rate=8e-4,
                prune=prune,
                disable_tqdm=True,
                **toy_task.BRPO_SETTINGS,
            )
            logs[prune] = train(copy.deepcopy(model), tokenizer, dataset, args)
    print("update | left out, % | updating, CPU s | with prune=False | gradient norm | with prune=False")
    for update, (pruned, whole) in enumerate(zip(logs[True], logs[False], strict=True), start=1):
        print(
            f"{update} | {100 * pruned['anytime/pruned_ratio']:.0f} | {pruned['time/updating']:.2f} | "
            f"{whole['time/updating']:.2f} | {pruned['grad_norm']:.4f} | {whole['grad_norm']:.4f}"
        )


def train(model: Any, tokenizer: Any, dataset: Any, args: BRPOConfig) -> list[dict[str, float]]:
    """Return the logs of all updates, with times of the CPU."""
    trainer = BRPOTrainer(model, args, dataset, processing_class=tokenizer, reward_funcs=toy_task.end_of_chain_reward)
    trainer.remove_callback(PrinterCallback)
    trainer._times.clock = time.process_time
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    main()
