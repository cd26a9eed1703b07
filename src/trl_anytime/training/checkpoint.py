"""
Checkpoints that are whole or recognised as broken, and what a resumed run needs besides TRL's own files.

A checkpoint is whole once its manifest, written last, lists every file with its size. The manifest also records the
settings that a resumed run must share.
"""

import hashlib
import json
import os
import re
import shutil
from collections import defaultdict, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import rotate_checkpoints
from trl import GRPOConfig

MANIFEST = "manifest.json"

# They shape rollouts and advantages, or say which prompts come next
_FIXED = (
    "loss_type",
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "seed",
    "shuffle_dataset",
)
# How a batch is dealt out to ranks and micro-batches: may change where no rollouts are in use
_GEOMETRY = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "world_size")
# They may change, at the price that the run is another one from here
_REPORTED = (
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "beta",
    "epsilon",
    "epsilon_high",
    "max_grad_norm",
    "bf16",
    "fp16",
    "max_completion_length",
)
# Of a model's config: where it was loaded from, and how it is computed
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


# Whole or broken


def begin(folder: Path) -> None:
    """Mark the checkpoint in `folder` as unfinished; what an earlier attempt left there is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder / MANIFEST, {"files": None})


def finish(folder: Path, settings: Mapping[str, Any]) -> None:
    """Mark the checkpoint in `folder` as whole, once its files are on the disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = path.stat().st_size
    _write(folder / MANIFEST, {"files": files, "settings": settings})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at one blow, so that it is never seen half written."""
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest of a whole checkpoint.

    Raises:
        `ValueError`: If the checkpoint is not whole; the message says why.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: it is not a checkpoint of `ReliableGRPOTrainer`, or in part."
        ) from None
    except json.JSONDecodeError:
        raise ValueError(f"{folder / MANIFEST} cannot be read.") from None
    if content["files"] is None:
        raise ValueError(f"{folder} is unfinished: the run ended while saving it.")
    for name, size in content["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{folder} is broken: {name} should have {size} bytes, it has {found or 'none'}.")
    return content


def remove_unfinished(output_dir: Path) -> None:
    """Delete the checkpoints in `output_dir` that a run has begun and not finished."""
    for path in output_dir.glob(f"checkpoint-*/{MANIFEST}"):
        if json.loads(path.read_text())["files"] is None:
            shutil.rmtree(path.parent, ignore_errors=True)


def last_whole(output_dir: Path) -> tuple[Path, list[str]]:
    """
    The checkpoint to go on from.

    Returns:
        `tuple`: the last whole checkpoint in `output_dir`, and why each later one is not.

    Raises:
        `ValueError`: If there is none.
    """
    numbered = [(int(match[1]), path) for path in output_dir.glob("*") if (match := _number(path))]
    reasons = []
    for _, folder in sorted(numbered, reverse=True):
        try:
            manifest(folder)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return folder, reasons
    raise ValueError(" ".join([f"No whole checkpoint in {output_dir}.", *reasons]))


def rotate(output_dir: Path, save_total_limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `save_total_limit`, and those that a run has begun and not finished."""
    if save_total_limit is not None:
        remove_unfinished(output_dir)
    rotate_checkpoints(str(output_dir), save_total_limit, best, use_mtime=True)


def _number(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


# Settings


def settings(
    args: GRPOConfig,
    model: PreTrainedModel,
    frozen: PreTrainedModel | None,
    num_prompts: int | None,
    rollouts_in_use: bool,
    further: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """
    What a resumed run is compared by.

    Args:
        args ([`~trl.GRPOConfig`]):
            Settings of the run.
        model ([`~transformers.PreTrainedModel`]):
            The model in training, perhaps with adapters.
        frozen ([`~transformers.PreTrainedModel`], *optional*):
            A model whose weights matter and are not in the checkpoint: under adapters, or the reference. `None` if
            there is none, or if it is sharded.
        num_prompts (`int`, *optional*):
            Rows of the training data; a stream has none.
        rollouts_in_use (`bool`):
            Whether training is in the middle of a generation batch.
        further (`Mapping`):
            What a trainer adds to `"fixed"`, which must not change, and to `"reported"`, which may.

    Returns:
        `dict`: of what can be written as JSON.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    for adapter in adapters.values():
        for name in ("base_model_name_or_path", "inference_mode", "peft_version"):
            adapter.pop(name, None)
    compared = {
        "fixed": {
            **{name: getattr(args, name) for name in _FIXED},
            **further["fixed"],
            **{f"model.config.{name}": value for name, value in config.items()},
            **{
                f"peft_config[{name!r}].{key}": value
                for name, adapter in adapters.items()
                for key, value in adapter.items()
            },
            "number of prompts": num_prompts,
            "rollouts per optimiser step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "weights of the base or reference model": None if frozen is None else _fingerprint(frozen),
        },
        "geometry": {name: getattr(args, name) for name in _GEOMETRY},
        "reported": {**{name: getattr(args, name) for name in _REPORTED}, **further["reported"]},
        "rollouts_in_use": rollouts_in_use,
        "steps_between_generations": generate_every(args) / args.gradient_accumulation_steps,
        "save_only_model": args.save_only_model,
    }
    return json.loads(json.dumps(compared, default=_plain))


def generate_every(args: GRPOConfig) -> int:
    """Micro-batches that are trained on one generation batch."""
    assert args.steps_per_generation is not None  # filled in by TRL
    return args.steps_per_generation * args.num_iterations


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _fingerprint(model: PreTrainedModel) -> str:
    """Of the embeddings, which fine-tuning changes."""
    weight: Any = cast(torch.nn.Embedding, model.get_input_embeddings()).weight
    return hashlib.sha256(weight.detach()[:256].float().cpu().numpy().tobytes()).hexdigest()[:16]


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """
    Compare the settings of a checkpoint with those of the run that resumes it.

    Returns:
        `list[str]`: what changed and may.

    Raises:
        `ValueError`: Names what changed and must not, old and new.
    """
    if saved["save_only_model"]:
        raise ValueError(
            f"{folder} was saved with `save_only_model=True`: there is nothing to resume from. Pass it as `model` "
            "to start a new run with its weights."
        )
    fixed = _changes(saved["fixed"], now["fixed"])
    geometry = _changes(saved["geometry"], now["geometry"])
    if fixed:
        raise ValueError(
            f"{folder} was saved by a run with other settings: {'; '.join(fixed)}. Resume with the old ones, or pass "
            "the checkpoint as `model` to start a new run with its weights."
        )
    if geometry and saved["rollouts_in_use"]:
        raise ValueError(
            f"{folder} was saved by a run with other settings: {'; '.join(geometry)}. It holds rollouts that are "
            "dealt out in the old way. Resume with the old settings, or from a checkpoint at a multiple of "
            f"{saved['steps_between_generations']:g} steps."
        )
    return geometry + _changes(saved["reported"], now["reported"])


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}` was {saved.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    ]


# State of one rank


def save_rank_state(folder: Path, rank: int, state: Mapping[str, Any]) -> None:
    """Save what one rank needs to go on, made of tensors and plain Python objects."""
    torch.save(dict(state), _rank_file(folder, rank))


def has_rank_state(folder: Path, world_size: int) -> bool:
    """Whether `folder` was saved by as many ranks."""
    return len(list(folder.glob("rank_state_*.pth"))) == world_size


def load_rank_state(folder: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """
    What [`save_rank_state`] saved.

    Raises:
        `ValueError`: If the file of this rank is not there.
    """
    path = _rank_file(folder, rank)
    if not path.is_file():
        raise ValueError(f"{path} is missing: was the checkpoint saved to a disk that this machine does not see?")
    # torch cannot load onto "cpu:0", which is what the device is called on several ranks
    return torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_state_{rank}.pth"


def to_plain(value: Any) -> Any:
    """Nested dictionaries, lists and deques as ones that can be loaded without trust in the file."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple | deque) else value


def to_logs(plain: Mapping[str, Any]) -> dict[str, Any]:
    """TRL's table of completions, of which [`to_plain`] made lists."""
    return {
        name: defaultdict(deque, {key: deque(column) for key, column in values.items()})
        if isinstance(values, dict)
        else deque(values)
        for name, values in plain.items()
    }
