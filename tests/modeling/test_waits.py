"""
How often the host waits for a GPU, on a pretended one (tests/support/pretended_gpu.py). Nothing may mix devices.

`MEANT` lists the waits of the package that are meant. A new one belongs there, with its number, or does not belong in
the code.
"""

import json
import math
import subprocess
import sys
from collections import Counter

import pytest

from tests.support import ROOT
from tests.support.tiny import TINY_RUN

LIBRARIES = ("transformers", "trl", "accelerate", "peft")
# Waits by what they are asked once for
MEANT = {
    "micro-batch": {
        "brpo_trainer.py BRPOTrainer._parts_of_update": 1,  # lengths of the rows
        "modeling/tree_attention.py forward_packed": 1,  # the longest row
        "modeling/tree_attention.py TreeLayout.from_packed": 1,  # widths and trunks of the budgets
        "training/micro_batches.py forward_some": 1,  # whether all rows are forwarded
        "training/reliable_trainer.py ReliableGRPOTrainer._check_logprobs": 1,  # whether they are finite
        "training/reliable_trainer.py ReliableGRPOTrainer._compute_loss": 1,  # whether it is finite
    },
    "optimiser step": {"training/reliable_trainer.py ReliableGRPOTrainer._get_grad_norm": 1},  # whether it is finite
    "generation batch": {
        "brpo_trainer.py BRPOTrainer._log_batch": 2,  # rewards and cuts
        "brpo_trainer.py BRPOTrainer._log_batch.<lambda>": 2,  # facts of the rollouts and of the summaries
        "brpo_trainer.py BRPOTrainer._train_on": 1,  # lengths before and after pruning
        "method/packing.py PackedRollouts.prune": 1,  # the longest row that is left
        "training/reward_guard.py RewardGuard.check_models": 2,  # whether rewards are finite
    },
    # How many traces have ended; every few tokens, what they are
    "token of thinking": {"modeling/trace_decoding.py decode_traces": 1},
    "look at the thinking": {"modeling/trace_decoding.py decode_traces": 1},
    "trunk": {"modeling/branch_decoding.py Trunk.from_cache": 1},  # its paddings
    # How many summaries have ended; all tokens and lengths at the end
    "token of summaries": {"modeling/branch_decoding.py decode_branches": 1},
    "summaries": {"modeling/branch_decoding.py decode_branches": 2},
}


def run(*names):
    """What was recorded in another process, because the pretended device stays in a process."""
    command = [sys.executable, "-m", "tests.support.on_pretended_gpu", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def recorded():
    return run(
        *("mixed devices", "counted", "equal to the host", "packing", "packing, 4 rollouts", "forward"),
        *("forward, 4 layers", "forward, 4 rollouts", "forward, bfloat16", "generation", "generation, 4 layers"),
        *("generation, 4 prompts", "generation, 24 tokens and 9"),
    )


def own(waits):
    """Those of the package, not of libraries."""
    return {place: number for place, number in waits.items() if place.split("/")[0] not in LIBRARIES}


def of_libraries(waits):
    return sum(waits.values()) - sum(own(waits).values())


def times(kinds):
    """The waits that are meant for so many of each kind."""
    total = Counter()
    for kind, number in kinds.items():
        total.update({place: number * each for place, each in MEANT[kind].items()})
    return dict(total)


@pytest.mark.slow
def test_the_pretended_device_is_strict(recorded):
    assert recorded["mixed devices"] is True
    here = "support/on_pretended_gpu.py counted"
    assert recorded["counted"] == {
        "waits": {here: 6},
        "uploads": {here: 1},
        "promotions": {here: 1},
        "doubles": {here: 1},
    }
    # The same operators, in another order of sums at most
    assert recorded["equal to the host"] < 1e-5


@pytest.mark.slow
def test_packing(recorded):
    for name in ("packing", "packing, 4 rollouts"):
        assert recorded[name] == {
            "waits": {"method/packing.py PackedRollouts.prune": 1},
            "uploads": {"method/packing.py PackedRollouts.token_advantages": 1},  # the budgets
            "promotions": {},
            "doubles": {},
        }


@pytest.mark.slow
def test_forward_and_backward(recorded):
    """The layout asks for its sizes, in two waits. Layers and rollouts add none, and nothing leaves half precision."""
    meant = {place: number for place, number in MEANT["micro-batch"].items() if "tree_attention" in place}
    for name in ("forward", "forward, 4 layers", "forward, 4 rollouts", "forward, bfloat16"):
        facts = recorded[name]
        assert facts["waits"] == meant
        assert facts["uploads"] == facts["promotions"] == facts["doubles"] == {}
        assert facts["with_gradient"] == 1


@pytest.mark.slow
def test_generation(recorded):
    """A token waits once, in all layers and for all trunks."""
    for name in ("generation", "generation, 4 layers", "generation, 4 prompts", "generation, 24 tokens and 9"):
        thinking, summarising = recorded[name]["thinking"], recorded[name]["summarising"]
        tokens, summary_tokens = (24, 9) if "24" in name else (8, 4)
        assert own(thinking["waits"]) == times(
            {"token of thinking": tokens, "look at the thinking": tokens // 8, "trunk": 1}
        )
        assert own(summarising["waits"]) == times({"token of summaries": summary_tokens, "summaries": 1})
        for facts in (thinking, summarising):
            assert facts["promotions"] == facts["doubles"] == {}
    short, long = (recorded[name] for name in ("generation", "generation, 24 tokens and 9"))
    # Whether a mask is needed
    assert of_libraries(long["thinking"]["waits"]) - of_libraries(short["thinking"]["waits"]) <= 24 - 8
    assert of_libraries(long["summarising"]["waits"]) == of_libraries(short["summarising"]["waits"])


@pytest.mark.slow
def test_training_steps():
    """Two whole steps of the trainer: nothing mixes devices, and layers add no waits."""
    of_generation = {place for kind in ("token of thinking", "trunk", "summaries") for place in MEANT[kind]}
    num_steps = TINY_RUN["max_steps"]
    for name, facts in run("training", "training, 4 layers").items():
        waits = {place: number for place, number in own(facts["waits"]).items() if place not in of_generation}
        kinds = ("micro-batch", "optimiser step", "generation batch")
        assert waits == times(dict.fromkeys(kinds, num_steps)), name
        assert facts["promotions"] == facts["doubles"] == {}
        assert len(facts["losses"]) == num_steps and all(map(math.isfinite, facts["losses"]))
