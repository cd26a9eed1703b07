"""What arrives on the Hub: pushes of every checkpoint and of the model, against a local server."""

import io
import json
import os
import subprocess
import sys

import matplotlib.image
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from tests.support import ROOT
from tests.support.cards import curve_tables
from tests.support.fake_hub import USER, fake_hub
from trl_anytime.inference.anytime_config import ANYTIME_CONFIG_NAME
from trl_anytime.reporting.model_card import BUDGET_PICTURE, CARD, TRAINING_PICTURE
from trl_anytime.training import checkpoint

pytestmark = pytest.mark.slow  # it trains


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The server after a run that pushes, and where the run kept its own files."""
    directory = tmp_path_factory.mktemp("push")
    with fake_hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # a protocol of its own, which the server does not speak
            "HF_TOKEN": "hf_nothing",
            "HF_HOME": str(directory / "home"),
        }
        command = [sys.executable, "-m", "tests.support.hub_push", str(directory / "tiny")]
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-4000:]
        yield hub, directory / "tiny"


def test_commits(pushed):
    hub, _ = pushed
    assert list(hub.repositories) == [f"{USER}/tiny"]
    messages = [message for message, _ in hub.repositories[f"{USER}/tiny"]]
    in_training = [f"Training in progress, step {step}{what}" for step in (1, 2) for what in ("", ", checkpoint")]
    # The two of a step run side by side
    assert sorted(messages[:-1]) == in_training and messages[-1] == "End of training"


def test_every_push_has_the_card_of_its_weights(pushed):
    hub, _ = pushed
    for message, files in hub.repositories[f"{USER}/tiny"]:
        folder = "last-checkpoint/" if message.endswith("checkpoint") else ""
        names = {CARD, BUDGET_PICTURE, TRAINING_PICTURE, ANYTIME_CONFIG_NAME, "model.safetensors"}
        assert {folder + name for name in names} <= set(files), message
        card = ModelCard(files[folder + CARD].decode())
        step = int(message.split("step ")[1][0]) if "step" in message else 2
        assert f"after step {step} of 2" in card.text
        for picture in (BUDGET_PICTURE, TRAINING_PICTURE):
            assert f"]({picture})" in card.text
            height, width, _ = matplotlib.image.imread(io.BytesIO(files[folder + picture])).shape
            assert height == 480 and width >= 600


def test_the_last_card(pushed):
    hub, folder = pushed
    files = hub.files(f"{USER}/tiny")
    card = ModelCard(files[CARD].decode())
    data = card.data
    assert data["base_model"] == "tiny/base" and data["datasets"] == ["some/problems"]
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert {"brpo", "trl", "anytime-reasoning", "a tag"} <= set(data["tags"])
    assert f'model_id = "{USER}/tiny"' in card.text and f"vllm serve {USER}/tiny " in card.text
    assert [steps for steps, _ in curve_tables(card)] == [[[], [2]]]

    log = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_anytime/reward@2" in entry] == [0]  # that before is kept
    results = data.eval_results
    assert data.model_name == "Tiny: trained #1"
    assert [result.metric_args for result in results] == [{"thinking_budget": budget} for budget in (2, 4, 6)]
    assert {(result.metric_type, result.dataset_type) for result in results} == {("accuracy", "some/benchmark")}

    paths = [f".eval_results/anytime_some-benchmark_{budget}.yaml" for budget in (2, 4, 6)]
    assert [path for path in files if path.startswith(".eval_results")] == paths
    for path, result in zip(paths, results, strict=True):
        (entry,) = parse_eval_result_entries(yaml.safe_load(files[path]))
        assert (entry.dataset_id, entry.task_id) == ("some/benchmark", "math")
        assert entry.value == pytest.approx(100 * result.metric_value, abs=0.01)


def test_the_hub_was_asked_about_the_metadata(pushed):
    """By `huggingface_hub`, before each commit with a card. The Hub's own verdict is not to be had here."""
    hub, _ = pushed
    assert len(hub.validated) >= 3
    assert hub.validated[-1].encode() == hub.files(f"{USER}/tiny")[CARD]
    assert not [request for request in hub.unknown if not request.startswith(("HEAD", "GET"))]


def test_a_pushed_checkpoint_is_whole(pushed, tmp_path):
    """It was pushed once everything was in it, and a run can go on from it."""
    hub, _ = pushed
    for path, content in hub.files(f"{USER}/tiny").items():
        if path.startswith("last-checkpoint/"):
            copy = tmp_path / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(content)
    files = checkpoint.manifest(tmp_path / "last-checkpoint")["files"]
    assert {CARD, BUDGET_PICTURE, TRAINING_PICTURE, "rank_state_0.pth"} <= set(files)
    assert checkpoint.load_rank_state(tmp_path / "last-checkpoint", 0, torch.device("cpu"))
