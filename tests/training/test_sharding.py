"""FSDP2 on two ranks of a CPU, and the configurations of `accelerate launch` that cannot be run there."""

import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.support import ROOT

CONFIGS = ROOT / "examples" / "accelerate_configs"
SETTINGS = {"world_size": 2, "max_steps": 4, "logging_steps": 1, "eval_steps": 2, "per_device_train_batch_size": 2}


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fsdp2_trains_like_ddp(ranks, tmp_path, lora):
    ddp = ranks.run("train", tmp_path / "ddp", by_prefix=True, lora=lora, save_strategy="no", **SETTINGS)
    fsdp = ranks.run("sharded", tmp_path / "fsdp", lora=lora, save_strategy="no", **SETTINGS)
    assert [rank.code for rank in ddp + fsdp] == [0] * 4, fsdp[0].output
    for rank, expected in zip(fsdp, ddp, strict=True):
        assert rank.result["sharded"] and rank.result["forward"] == "forward_packed"
        for entry, other in zip(rank.result["log"], expected.result["log"], strict=True):
            for name, value in other.items():
                if name != "total_flos":  # counted by the parameters that are there
                    assert entry[name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-5)), name
        assert rank.result["weights"] == pytest.approx(expected.result["weights"], abs=1e-4)


@pytest.mark.slow
def test_fsdp2_resumes_exactly(ranks, tmp_path):
    settings = {**SETTINGS, "save_total_limit": None}
    straight = ranks.run("sharded", tmp_path / "straight", **settings)
    killed = ranks.run("sharded", tmp_path / "killed", kill=["loss", 1, 3], **settings)
    resumed = ranks.run("sharded", tmp_path / "killed", resume=True, **settings)
    assert killed[1].code == -9
    for rank, expected in zip(resumed, straight, strict=True):
        assert rank.code == expected.code == 0, rank.output
        assert rank.result["log"] == expected.result["log"]
        assert rank.result["weights"] == expected.result["weights"]


def test_a_sharded_model_is_measured(ranks, tmp_path):
    """Tree attention that computes something else is found out before the first step."""
    ended = ranks.run("sharded", tmp_path, wrong_attention=True, save_strategy="no", **SETTINGS)
    for rank in ended:
        assert rank.code == 1
        assert re.search(r"packed rollouts.*log-probabilities.*\d", rank.output)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_understood(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    expected = {
        "single_gpu": "NO",
        "multi_gpu": "MULTI_GPU",
        "fsdp2": "FSDP",
        "zero2": "DEEPSPEED",
        "zero3": "DEEPSPEED",
    }
    assert config.distributed_type == expected[path.stem]
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
