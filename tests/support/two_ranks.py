"""Run by `test_two_ranks.py` under torchrun: trains a tiny model, with rewards that may fail on one rank."""

import json
import os
import sys

import torch

from tests.support import scenarios
from tests.support.tiny import make_config, make_dataset, make_model, make_tokenizer, parity_reward
from trl_anytime import BRPOTrainer

RANK = int(os.environ["RANK"])


def on_rank_1(failure):
    """`parity_reward`, which fails on the second rank only."""

    def reward(prompts, completion_ids, **kwargs):
        rewards = parity_reward(None, completion_ids)
        return failure(rewards) if RANK == 1 else rewards

    return reward


def raises(rewards):
    raise KeyError("no such column")


REWARDS = {
    "fine": parity_reward,
    "short": on_rank_1(lambda rewards: rewards[:-1]),
    "nan": on_rank_1(lambda rewards: [*rewards[:3], float("nan"), *rewards[4:]]),
    "raises": on_rank_1(raises),
    "none": on_rank_1(lambda rewards: [None] * len(rewards)),
}


def train(kind, output_dir):
    # 4 rollouts per rank and groups of 8: each group is split across both ranks
    config = make_config(output_dir, num_generations=8, per_device_train_batch_size=4, ddp_backend="gloo")
    trainer = BRPOTrainer(
        make_model(), config, make_dataset(), reward_funcs=REWARDS[kind], processing_class=make_tokenizer()
    )
    try:
        trainer.train()
        return {
            "log": [log for log in trainer.state.log_history if "loss" in log],
            "weights": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist(),
        }
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    if sys.argv[2:]:  # a fault that nobody catches
        scenarios.fault(sys.argv[1], *sys.argv[2:], save_strategy="no", per_device_train_batch_size=2)
    results = {kind: train(kind, sys.argv[1]) for kind in REWARDS}
    with open(os.path.join(sys.argv[1], f"rank{RANK}.json"), "w") as file:
        json.dump(results, file)
