"""
Checkpoints that are complete or recognised as broken, and the state that TRL's own files lack.

A checkpoint is whole once its manifest exists. The manifest is written last. It lists every file with its size and a
checksum, and records the settings that a resumed run must share.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from trl import GRPOConfig

from ..outside.validation import MEBIBYTE, boolean, fields, integer, mapping_of, number, or_null, read_json

MANIFEST = "manifest.json"
_anything = mapping_of(lambda value, name: value)
# Schema of the manifest's settings, see [`settings`]
_CHECK_SETTINGS = fields(
    fixed=_anything,
    geometry=_anything,
    reported=_anything,
    rollouts_in_use=boolean,
    evaluation_due=boolean,
    steps_between_generations=number(0, 2**31),
    save_only_model=boolean,
)
_CHECK_FILES = mapping_of(fields(bytes=integer(0, 2**63), crc32=integer(0, 2**32)))


class UnfitCheckpoint(ValueError):
    """A checkpoint that a run cannot go on from. The message says why, and what to do."""


# Must not change: these shape rollouts and advantages, or decide which prompts come next
_FIXED = (
    "loss_type",
    "importance_sampling_level",
    "scale_rewards",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "num_generations",
    "num_iterations",
    "generation_batch_size",
    "seed",
    "shuffle_dataset",
)
# How a batch is split over ranks and micro-batches. It may change if no rollouts are in use.
_GEOMETRY = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "world_size")
# May change, but the run then differs from here on
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
    "reward_weights",
    "epsilon",
    "epsilon_high",
    "max_grad_norm",
    "bf16",
    "fp16",
    "max_completion_length",
)
# Not compared in a model's config: where it was loaded from, and how it is computed
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


# Whole or broken


def begin(folder: Path) -> None:
    """Mark the checkpoint in `folder` as unfinished, and remove what an earlier attempt left there."""
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
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32": checksum(path)}
    _write(folder / MANIFEST, {"files": files, "settings": settings})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file atomically, so that it is never seen half written."""
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def checksum(path: Path) -> int:
    """
    Compute the CRC-32 of a file, at some 3 GB/s.

    It finds flipped bits. It does not protect against forgery.
    """
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _read_manifest(folder: Path) -> dict[str, Any]:
    """
    Read the manifest in `folder`.

    The checkpoint may be whole, unfinished (`"files"` is then `None`) or broken.

    Raises:
        `ValueError`: If there is no manifest, or if it cannot be read. The message says which.
    """
    path = folder / MANIFEST
    try:
        return read_json(path, _check_manifest, 64 * MEBIBYTE)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}. The checkpoint is incomplete, or was not saved by `trl_anytime`. Resume "
            "from another one."
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def _check_manifest(value: Any, name: str) -> Any:
    """Check that the value is what [`begin`] or [`finish`] writes."""
    fields(files=or_null(_CHECK_FILES))(value, name)
    return value if value["files"] is None else fields(settings=_CHECK_SETTINGS)(value, name)


def manifest(folder: Path) -> dict[str, Any]:
    """
    Return the manifest of a whole checkpoint, after a check of all its files.

    Raises:
        `ValueError`: If the checkpoint is not whole. The message says why.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder.")
    content = _read_manifest(folder)
    if content["files"] is None:
        raise ValueError(f"{folder} is unfinished: the run ended while saving it.")
    for name, recorded in content["files"].items():
        path, size = folder / name, recorded["bytes"]
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise ValueError(f"{folder} is broken: {name} should have {size} bytes, but has {found or 'none'}.")
        try:
            changed = checksum(path) != recorded["crc32"]
        except OSError as error:
            raise ValueError(f"{folder} is broken: {name} cannot be read: {error}.") from None
        if changed:
            raise ValueError(f"{folder} is broken: the content of {name} has changed since it was saved.")
    return content


def remove_unfinished(output_dir: Path) -> None:
    """
    Delete the checkpoints in `output_dir` that a run has begun and not finished.

    A checkpoint whose manifest cannot be read is kept, so that the user can look into it.
    """
    for folder in output_dir.glob("checkpoint-*"):
        if is_unfinished(folder):
            shutil.rmtree(folder, ignore_errors=True)


def is_unfinished(folder: Path) -> bool:
    """Return whether the manifest of a checkpoint says that it has been begun and not finished."""
    try:
        return _read_manifest(folder)["files"] is None
    except ValueError:
        return False


def rotate(output_dir: Path, limit: int | None, kept: Collection[Path]) -> None:
    """
    Delete the checkpoints of the lowest steps until `limit` are left.

    The times of files are not used, because a clock may be set back.

    Args:
        output_dir (`Path`):
            Folder that holds the checkpoints of a run.
        limit (`int`, *optional*):
            Number of checkpoints to keep. All are kept if it is `None` or not positive.
        kept (`Collection[Path]`):
            Checkpoints that are never deleted: the one just saved, and the best one. After a restart from an earlier
            checkpoint, the one just saved may have a lower step than others.
    """
    if limit is None or limit <= 0:
        return
    numbered = checkpoints_of(output_dir)
    surplus = len(numbered) - limit
    for _, folder in [entry for entry in numbered if entry[1] not in kept][: max(surplus, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def last_whole(output_dir: Path) -> tuple[Path, list[str]]:
    """
    Find the checkpoint to resume from.

    Returns:
        `tuple`: the last whole checkpoint in `output_dir`, and the reasons why later ones are not whole.

    Raises:
        `ValueError`: If there is no whole checkpoint.
    """
    reasons = []
    for _, folder in reversed(checkpoints_of(output_dir)):
        try:
            manifest(folder)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return folder, reasons
    raise ValueError(" ".join([f"No whole checkpoint in {output_dir}.", *reasons]))


def checkpoints_of(output_dir: Path) -> list[tuple[int, Path]]:
    """Return the steps and folders of the checkpoints in `output_dir`, the lowest step first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in output_dir.glob("*")]
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


# Settings


def settings(
    args: GRPOConfig,
    model: PreTrainedModel,
    frozen: PreTrainedModel | None,
    num_prompts: int | None,
    prompts: str | None,
    rollouts_in_use: bool,
    extra_settings: Mapping[str, Mapping[str, Any]],
    evaluation_due: bool,
) -> dict[str, Any]:
    """
    Return the settings that a resumed run is compared by.

    Args:
        args ([`~trl.GRPOConfig`]):
            Settings of the run.
        model ([`~transformers.PreTrainedModel`]):
            The model in training, perhaps with adapters.
        frozen ([`~transformers.PreTrainedModel`], *optional*):
            A model whose weights matter but are not in the checkpoint: the base model under adapters, or the
            reference model. `None` if there is none, if it is sharded, or if it changes during training.
        num_prompts (`int`, *optional*):
            Rows of the training data. `None` for a stream.
        prompts (`str`, *optional*):
            Fingerprint of the prompts, see [`fingerprint_of_prompts`].
        rollouts_in_use (`bool`):
            Whether training is in the middle of a generation batch.
        extra_settings (`Mapping`):
            Settings that a trainer adds to `"fixed"`, which must not change, and to `"reported"`, which may.
        evaluation_due (`bool`):
            Whether the evaluation of this step was skipped. A resumed run does it first.

    Returns:
        `dict`: settings that can be written as JSON.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    adapters = {name: adapter.to_dict() for name, adapter in getattr(model, "peft_config", {}).items()}
    for adapter in adapters.values():
        for name in ("base_model_name_or_path", "inference_mode", "peft_version"):
            adapter.pop(name, None)
    compared = {
        "fixed": {
            **{name: getattr(args, name) for name in _FIXED},
            **extra_settings["fixed"],
            **{f"model.config.{name}": value for name, value in config.items()},
            **{
                f"peft_config[{name!r}].{key}": value
                for name, adapter in adapters.items()
                for key, value in adapter.items()
            },
            "number of prompts": num_prompts,
            "prompts in their order": prompts,
            "rollouts per optimiser step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "weights of the base or reference model": None if frozen is None else fingerprint_of_weights(frozen),
        },
        "geometry": {name: getattr(args, name) for name in _GEOMETRY},
        "reported": {**{name: getattr(args, name) for name in _REPORTED}, **extra_settings["reported"]},
        "rollouts_in_use": rollouts_in_use,
        "evaluation_due": evaluation_due,
        "steps_between_generations": generate_every(args) / args.gradient_accumulation_steps,
        "save_only_model": args.save_only_model,
    }
    return json.loads(json.dumps(compared, default=_plain))


def generate_every(args: GRPOConfig) -> int:
    """Return the number of micro-batches that are trained on one generation batch."""
    assert args.steps_per_generation is not None  # filled in by TRL
    return args.steps_per_generation * args.num_iterations


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def fingerprint_of_weights(model: PreTrainedModel) -> str:
    """
    Hash a sample of the weights that are not in a checkpoint.

    With adapters these are the frozen weights, and the originals of what `modules_to_save` trains. Layers with an
    adapter are left out, because merging for vLLM and separating again rounds their weights.
    """
    hashed = hashlib.sha256()
    adapted = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if adapted and (parameter.requires_grad or ".base_layer." in name):
            continue
        flat = parameter.detach().reshape(-1)
        hashed.update(flat[:: max(1, len(flat) // 4096)].float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def fingerprint_of_prompts(prompts: Iterable[Any]) -> str:
    """Hash prompts (texts or conversations) in their order."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps(prompt, default=str).encode() + b"\n")
    return hashed.hexdigest()[:16]


def compare_settings(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """
    Compare the settings of a checkpoint with those of the run that resumes it.

    Returns:
        `list[str]`: the changes that are allowed.

    Raises:
        `ValueError`: If a setting changed that must not. Names it with its old and new value.
    """
    if saved["save_only_model"]:
        raise ValueError(
            f"{folder} was saved with `save_only_model=True`, so a run cannot resume from it. Pass it as `model` to "
            "start a new run with its weights."
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
            f"{folder} was saved by a run with other settings: {'; '.join(geometry)}. It was saved in the middle of a "
            "generation batch, whose split over ranks and micro-batches cannot change. Resume with the old settings, "
            f"or from a checkpoint at a multiple of {saved['steps_between_generations']:g} steps."
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
    """Save the state that one rank needs to resume. It consists of tensors and plain Python objects."""
    torch.save(dict(state), _rank_file(folder, rank))


def load_rank_state(folder: Path, rank: int, device: torch.device) -> dict[str, Any]:
    """
    Load the state that [`save_rank_state`] saved.

    Raises:
        `ValueError`: If the file of this rank is missing.
    """
    path = _rank_file(folder, rank)
    if not path.is_file():
        raise ValueError(
            f"{path} is missing. The checkpoint may be on a disk that this machine does not see. Save checkpoints to "
            "a disk that all machines share."
        )
    # torch cannot load onto "cpu:0", which is the device's name with several ranks
    return torch.load(path, map_location="cpu" if device.type == "cpu" else device, weights_only=True)


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_state_{rank}.pth"


def to_plain(value: Any) -> Any:
    """Convert nested dictionaries, lists and deques to types that can be loaded from an untrusted file."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    return [to_plain(item) for item in value] if isinstance(value, list | tuple | deque) else value


def to_logs(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Restore TRL's table of completions from the lists that [`to_plain`] made."""
    return {
        name: defaultdict(deque, {key: deque(column) for key, column in values.items()})
        if isinstance(values, dict)
        else deque(values)
        for name, values in plain.items()
    }
