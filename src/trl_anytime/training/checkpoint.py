"""
Checkpoints that are whole or recognised as broken, and what a resumed run needs besides TRL's own files.

A checkpoint is whole once its manifest, written last, lists every file with its size and a checksum. The manifest also
records the settings that a resumed run must share.
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
# What a manifest says besides its files, as [`settings`] has it
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

# They shape rollouts and advantages, or say which prompts come next
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
    "reward_weights",
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
            files[str(path.relative_to(folder))] = {"bytes": path.stat().st_size, "crc32": _checksum(path)}
    _write(folder / MANIFEST, {"files": files, "settings": settings})


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file at one blow, so that it is never seen half written."""
    new = path.with_suffix(".new")
    with open(new, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _checksum(path: Path) -> int:
    """CRC-32 of a file: it is meant to find flipped bits, at some 3 GB/s, and not to stop a forger."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _read_manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest in `folder`, of a checkpoint that is whole, unfinished (`"files"` is then `None`) or broken.

    Raises:
        `ValueError`: If there is none, or if it is not one of ours; the message says which.
    """
    path = folder / MANIFEST
    try:
        return read_json(path, _check_manifest, 64 * MEBIBYTE)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {MANIFEST}: it is not a checkpoint of `trl_anytime`, or in part.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None


def _check_manifest(value: Any, name: str) -> Any:
    """Check for what [`begin`] or [`finish`] writes."""
    fields(files=or_null(_CHECK_FILES))(value, name)
    return value if value["files"] is None else fields(settings=_CHECK_SETTINGS)(value, name)


def manifest(folder: Path) -> dict[str, Any]:
    """
    The manifest of a whole checkpoint, whose files are all read for it.

    Raises:
        `ValueError`: If the checkpoint is not whole; the message says why.
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
            raise ValueError(f"{folder} is broken: {name} should have {size} bytes, it has {found or 'none'}.")
        try:
            changed = _checksum(path) != recorded["crc32"]
        except OSError as error:
            raise ValueError(f"{folder} is broken: {name} cannot be read: {error}.") from None
        if changed:
            raise ValueError(f"{folder} is broken: {name} has other content than was saved.")
    return content


def remove_unfinished(output_dir: Path) -> None:
    """
    Delete the checkpoints in `output_dir` that a run has begun and not finished. One whose manifest cannot be read is
    left: a look at it may be worth more than its place on the disk.
    """
    for folder in output_dir.glob("checkpoint-*"):
        try:
            unfinished = _read_manifest(folder)["files"] is None
        except ValueError:
            continue
        if unfinished:
            shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, kept: Collection[Path]) -> None:
    """
    Delete the checkpoints of the lowest steps until `limit` are left. The times of files do not matter: a clock may go
    back.

    Args:
        output_dir (`Path`):
            Where the checkpoints of a run are.
        limit (`int`, *optional*):
            How many to keep; all if it is `None` or not positive.
        kept (`Collection[Path]`):
            What is never deleted: the checkpoint just saved, and the best one. The former may have a lower number
            than others, which a run left that went on from an earlier checkpoint.
    """
    if limit is None or limit <= 0:
        return
    numbered = _numbered(output_dir)
    surplus = len(numbered) - limit
    for _, folder in [entry for entry in numbered if entry[1] not in kept][: max(surplus, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def last_whole(output_dir: Path) -> tuple[Path, list[str]]:
    """
    The checkpoint to go on from.

    Returns:
        `tuple`: the last whole checkpoint in `output_dir`, and why each later one is not.

    Raises:
        `ValueError`: If there is none.
    """
    reasons = []
    for _, folder in reversed(_numbered(output_dir)):
        try:
            manifest(folder)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return folder, reasons
    raise ValueError(" ".join([f"No whole checkpoint in {output_dir}.", *reasons]))


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    """The folders of checkpoints in `output_dir` by their steps, the lowest first."""
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
    What a resumed run is compared by.

    Args:
        args ([`~trl.GRPOConfig`]):
            Settings of the run.
        model ([`~transformers.PreTrainedModel`]):
            The model in training, perhaps with adapters.
        frozen ([`~transformers.PreTrainedModel`], *optional*):
            A model whose weights matter and are not in the checkpoint: under adapters, or the reference. `None` if
            there is none, or if it is sharded or changes in training.
        num_prompts (`int`, *optional*):
            Rows of the training data; a stream has none.
        prompts (`str`, *optional*):
            Fingerprint of their prompts, see [`fingerprint_of_prompts`].
        rollouts_in_use (`bool`):
            Whether training is in the middle of a generation batch.
        extra_settings (`Mapping`):
            What a trainer adds to `"fixed"`, which must not change, and to `"reported"`, which may.
        evaluation_due (`bool`):
            Whether the evaluation of this step was left out, to be done first when the run goes on.

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
    """Micro-batches that are trained on one generation batch."""
    assert args.steps_per_generation is not None  # filled in by TRL
    return args.steps_per_generation * args.num_iterations


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def fingerprint_of_weights(model: PreTrainedModel) -> str:
    """
    Hash a sample of the weights that are not in a checkpoint.

    Of a model with adapters these are the frozen ones; of what `modules_to_save` trains, the original. Layers with an
    adapter are left out: merged for vLLM and separated again, they come back rounded.
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
    """Hash prompts in their order, texts or conversations."""
    hashed = hashlib.sha256()
    for prompt in prompts:
        hashed.update(json.dumps(prompt, default=str).encode() + b"\n")
    return hashed.hexdigest()[:16]


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
