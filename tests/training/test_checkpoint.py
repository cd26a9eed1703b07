"""Which checkpoints are whole, and with which settings one may go on from them."""

import json
import os
import re
import shutil
import zlib

import pytest

from trl_anytime.training.checkpoint import MANIFEST, last_whole, manifest, remove_unfinished, rotate

pytestmark = pytest.mark.slow  # processes, or a training of its own

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
    for name, recorded in files.items():
        content = (folder / name).read_bytes()
        assert recorded == {"bytes": len(content), "crc32": zlib.crc32(content)}


def truncate(folder):
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(folder, **changes):
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, **changes}))


def make_a_pipe(folder):
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "optimizer.pt"),
        (lambda folder: (folder / "rank_state_0.pth").unlink(), "rank_state_0.pth"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("{"), MANIFEST),
        (flip_a_bit, "model.safetensors"),
        (lambda folder: (folder / MANIFEST).write_text(json.dumps({"files": None})), "unfinished"),
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
    assert ended[0].code == 1 and "UnfitCheckpoint" in ended[0].output and reason in ended[0].output


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("[" * 100_000), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), MANIFEST),
        (make_a_pipe, "a pipe"),
        (lambda folder: rewrite(folder, files={"model.safetensors": 5}), "`files.model.safetensors`"),
        (lambda folder: rewrite(folder, files=3), "`files`"),
        (lambda folder: rewrite(folder, settings=None), "`settings`"),
        (lambda folder: rewrite(folder, settings={"fixed": {}}), "`settings.geometry`"),
    ],
)
def test_manifests_that_are_not_ours(saved, tmp_path, damage, named):
    """The folder is skipped on resume, survives the clearing of unfinished ones, and ends neither."""
    shutil.copytree(saved[False], tmp_path / "out")
    damage(tmp_path / "out" / "checkpoint-5")
    folder, later = last_whole(tmp_path / "out")
    assert folder.name == "checkpoint-4"
    assert len(later) == 1 and named in later[0] and "checkpoint-5" in later[0]
    remove_unfinished(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in range(1, 6)}


def test_a_broken_old_manifest_does_not_end_the_run(ranks, saved, tmp_path):
    shutil.copytree(saved[False], tmp_path / "out")
    (tmp_path / "out" / "checkpoint-2" / MANIFEST).write_text("[1, 2")
    ended = ranks.run("train", tmp_path, resume=True, **{**RUN, "max_steps": 6, "save_total_limit": 3})
    assert ended[0].code == 0, ended[0].output
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (4, 5, 6)}


@pytest.mark.parametrize(
    ("limit", "saved_last", "best", "left"),
    [
        (2, 10, None, {9, 10}),
        (2, 10, 8, {8, 10}),
        (1, 10, 8, {8, 10}),
        (2, 3, None, {3, 10}),  # resumed from an earlier step: the new one is kept, and the highest
        (None, 10, None, {3, 8, 9, 10}),
        (7, 10, None, {3, 8, 9, 10}),
    ],
)
def test_rotation_goes_by_steps(tmp_path, limit, saved_last, best, left):
    """The clock goes backwards: the higher the step, the older its folder seems."""
    for step in (3, 8, 9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (2e9 - step * 1e6,) * 2)
    kept = {tmp_path / f"checkpoint-{step}" for step in (saved_last, best) if step is not None}
    rotate(tmp_path, limit, kept)
    assert {int(path.name.split("-")[1]) for path in tmp_path.iterdir()} == left


def test_a_clock_that_goes_back(ranks, saved, tmp_path):
    """Checkpoints from the future do not outlive those that the run saves now."""
    shutil.copytree(saved[False], tmp_path / "out")
    for step in range(1, 6):
        os.utime(tmp_path / "out" / f"checkpoint-{step}", (4e9, 4e9))
    ended = ranks.run("train", tmp_path, resume=True, **{**RUN, "max_steps": 7, "save_total_limit": 2})
    assert ended[0].code == 0, ended[0].output
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}


@pytest.mark.parametrize("extra", ["rank_state_1.pth", "rank_state_7.pth"])
def test_a_rank_file_too_many_is_no_reason_to_drop_rollouts(ranks, saved, tmp_path, extra):
    """The manifest says how many ranks there were: in step 4 the rollouts of step 3 are used."""
    shutil.copytree(saved[False] / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    shutil.copy(tmp_path / "out/checkpoint-3/rank_state_0.pth", tmp_path / "out/checkpoint-3" / extra)
    ended = ranks.run("train", tmp_path, resume=True, **RUN)
    straight = ranks.run("train", tmp_path / "straight", **RUN)
    assert ended[0].code == 0, ended[0].output
    assert ended[0].result["weights"] == straight[0].result["weights"]


@pytest.mark.parametrize("plain", [False, True])
def test_a_run_that_had_finished(ranks, tmp_path, plain):
    """No step more, whether the limit is in steps or epochs, and the weights are those of the checkpoint."""
    run = {**RUN, "plain": plain}
    straight = ranks.run("train", tmp_path, **run)[0].result
    for _ in range(2):
        ended = ranks.run("train", tmp_path, resume=True, **run)
        assert ended[0].code == 0, ended[0].output
        assert ended[0].result["steps"] == 5 and ended[0].result["weights"] == straight["weights"]
        assert len(re.findall(r"checkpoint-5\b.*`max_steps`.*`num_train_epochs`", ended[0].output)) == 1
    epochs = {**run, "max_steps": -1, "num_train_epochs": 1}
    assert ranks.run("train", tmp_path / "epochs", **epochs)[0].result["steps"] == 8
    ended = ranks.run("train", tmp_path / "epochs", resume=True, **epochs)
    assert ended[0].result["steps"] == 8
    assert re.search(r"checkpoint-8\b.*`max_steps`.*`num_train_epochs`", ended[0].output)


# Trained whole, beside adapters or with none on them; tokens that are trained alone; tied to the LM head
TRAINED_BESIDE_ADAPTERS = {
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, {}),
    "LM head": ({"modules_to_save": ["lm_head"]}, {}),
    "both": ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "tied": ({"modules_to_save": ["embed_tokens"]}, {"tie_word_embeddings": True}),
    "tokens": ({"trainable_token_indices": [5, 6]}, {}),
    "adapter of the embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, {}),
}


@pytest.mark.parametrize("kind", TRAINED_BESIDE_ADAPTERS)
def test_embeddings_that_are_trained_beside_adapters(ranks, tmp_path, kind):
    """Their own checkpoint is resumed bit for bit; another base model is refused."""
    lora, model = TRAINED_BESIDE_ADAPTERS[kind]
    settings = {**RUN, "lora": lora, "model": model, "learning_rate": 1e-2}
    straight = ranks.run("train", tmp_path / "straight", **settings)
    assert straight[0].code == 0, straight[0].output
    shutil.copytree(tmp_path / "straight/out/checkpoint-3", tmp_path / "out" / "checkpoint-3")
    ended = ranks.run("train", tmp_path, resume=True, **settings)
    assert ended[0].code == 0, ended[0].output
    assert ended[0].result["weights"] == straight[0].result["weights"]
    other = {"model": {**model, "seed": 1}}
    ended = ranks.run(
        "objections", tmp_path, checkpoint=str(tmp_path / "out" / "checkpoint-3"), changes=[other], **settings
    )
    assert "`weights of the base or reference model`" in ended[0].result[0]


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
    ({"prompts": 6}, "`number of prompts` was 4, is 6"),
    ({"prompts": [1, 0, 2, 3]}, "`prompts in their order` was"),
    ({"seed": 1}, "`seed` was 42, is 1"),
    ({"gradient_accumulation_steps": 2}, "`rollouts per optimiser step` was 4, is 8"),
    ({"lora": True}, "`peft_config['default'].r` was None, is 4"),
    (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        "multiple of 4 steps",
    ),
]


def test_settings_that_must_not_change(ranks, saved, tmp_path):
    checkpoint = str(saved[False] / "checkpoint-3")
    ended = ranks.run("objections", tmp_path, checkpoint=checkpoint, changes=[change for change, _ in CHANGES], **RUN)
    assert ended[0].code == 0, ended[0].output
    for said, (change, expected) in zip(ended[0].result, CHANGES, strict=True):
        assert expected in said, change


def test_settings_of_plain_grpo_that_must_not_change(ranks, tmp_path):
    ranks.run("train", tmp_path, plain=True, **RUN)
    changes = [{"scale_rewards": "none"}, {"loss_type": "grpo"}, {"seed": 1}]
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    ended = ranks.run("objections", tmp_path, checkpoint=checkpoint, changes=changes, plain=True, **RUN)
    assert ended[0].code == 0, ended[0].output
    for said, change in zip(ended[0].result, changes, strict=True):
        assert [f"`{name}` was" in said for name in change] == [True]


def test_weights_that_are_not_in_the_checkpoint(ranks, saved, tmp_path):
    """Adapters are: another base model goes unnoticed but for this."""
    checkpoint = str(saved[True] / "checkpoint-3")
    ended = ranks.run(
        "objections", tmp_path, checkpoint=checkpoint, changes=[{"model": {"seed": 1}}], lora=True, **RUN
    )
    assert "`weights of the base or reference model`" in ended[0].result[0]


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
