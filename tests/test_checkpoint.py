"""Which checkpoints are whole, and with which settings one may go on from them."""

import json
import shutil

import pytest

from trl_anytime.training.checkpoint import MANIFEST, last_whole, manifest

pytestmark = pytest.mark.heavy

# A generation batch lasts four steps
RUN = {"max_steps": 5, "eval_strategy": "no", "save_total_limit": None}


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """The output folder of a run of five steps with a checkpoint at each, and that of one with LoRA."""
    folders = {}
    for lora in (False, True):
        directory = tmp_path_factory.mktemp("saved")
        ended = ranks.run("train", directory, lora=lora, **RUN)
        assert ended[0].code == 0, ended[0].output
        folders[lora] = directory / "out"
    return folders


def test_whole_checkpoints(saved):
    folder, later = last_whole(saved[False])
    assert folder.name == "checkpoint-5" and not later
    files = manifest(folder)["files"]
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "rank_state_0.pth"} < set(
        files
    )
    assert all((folder / name).stat().st_size == size for name, size in files.items())


def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "optimizer.pt should have"),
        (lambda folder: (folder / "rank_state_0.pth").unlink(), "rank_state_0.pth should have"),
        (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text(json.dumps({"files": None})), "is unfinished"),
    ],
)
def test_broken_checkpoints(ranks, saved, tmp_path, damage, reason):
    shutil.copytree(saved[False], tmp_path / "out")
    broken = tmp_path / "out" / "checkpoint-5"
    damage(broken)
    folder, later = last_whole(tmp_path / "out")
    assert folder.name == "checkpoint-4" and len(later) == 1 and reason in later[0]

    ended = ranks.run("train", tmp_path, resume=True, **RUN)  # skips it and says so
    assert ended[0].code == 0 and ended[0].result["steps"] == 5 and reason in ended[0].output
    shutil.rmtree(broken)
    shutil.copytree(saved[False] / "checkpoint-5", broken)
    damage(broken)
    ended = ranks.run("train", tmp_path, resume=str(broken), **RUN)  # asked for by name, it is an error
    assert ended[0].code == 1 and "ValueError" in ended[0].output and reason in ended[0].output


# In the middle of a generation batch
CHANGES = [
    ({"budgets": [3, 6, 10]}, "`budgets` was [3, 6, 9], is [3, 6, 10]"),
    ({"prior": "linear"}, "`prior` was 'uniform', is 'linear'"),
    ({"num_summaries": 3}, "`num_summaries` was 2, is 3"),
    ({"answer_bridge": "answer so"}, "`answer_bridge` was 'answer', is 'answer so'"),
    ({"truncation_bridge": "</think>"}, "`truncation_bridge` was 'so </think>', is '</think>'"),
    ({"baseline": "v2"}, "`baseline` was 'brpo', is 'v2'"),
    ({"model": {"num_hidden_layers": 3}}, "`model.config.num_hidden_layers` was 2, is 3"),
    ({"model": {"model_type": "llama"}}, "`model.config.model_type` was 'qwen3', is 'llama'"),
    ({"num_prompts": 6}, "`number of prompts` was 4, is 6"),
    ({"seed": 1}, "`seed` was 42, is 1"),
    ({"gradient_accumulation_steps": 2}, "`rollouts per optimiser step` was 4, is 8"),
    ({"lora": True}, "`peft_config['default'].r` was None, is 4"),
    (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        "It holds rollouts that are dealt out in the old way. Resume with the old settings, or from a checkpoint at a "
        "multiple of 4 steps",
    ),
]


def test_settings_that_must_not_change(ranks, saved, tmp_path):
    checkpoint = str(saved[False] / "checkpoint-3")
    ended = ranks.run("objections", tmp_path, checkpoint=checkpoint, changes=[change for change, _ in CHANGES], **RUN)
    assert ended[0].code == 0, ended[0].output
    for said, (change, expected) in zip(ended[0].result, CHANGES, strict=True):
        assert expected in said, change


def test_weights_that_are_not_in_the_checkpoint(ranks, saved, tmp_path):
    """Adapters are: another base model goes unnoticed but for this."""
    checkpoint = str(saved[True] / "checkpoint-3")
    ended = ranks.run(
        "objections", tmp_path, checkpoint=checkpoint, changes=[{"model": {"seed": 1}}], lora=True, **RUN
    )
    assert "`weights of the base or reference model` was" in ended[0].result[0]


def test_settings_that_may_change(ranks, saved, tmp_path):
    changes = [
        {"max_steps": 6, "learning_rate": 1e-4, "logging_steps": 1, "save_steps": 3},
        # Between generation batches, to fit into memory
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
    ]
    checkpoint = str(saved[False] / "checkpoint-4")
    ended = ranks.run("objections", tmp_path, checkpoint=checkpoint, changes=changes, **RUN)
    assert ended[0].code == 0, ended[0].output
    assert ended[0].result == ["trained to step 6", "trained to step 5"]
    assert "`learning_rate` was 0.001, is 0.0001; `max_steps` was 5, is 6" in ended[0].output
    assert "`per_device_train_batch_size` was 4, is 2" in ended[0].output
