"""The state of a session, in memory and as a file."""

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..outside.validation import (
    MEBIBYTE,
    TOKEN_ID,
    Unfit,
    check_file,
    fields,
    free_form,
    integer,
    list_of,
    mapping_of,
    parse_json,
    string,
)

_FORMAT = 1
_MOST_BYTES = 2**40
MOST_SEED = 2**63 - 1
_ENTRY = "trl_anytime_session"  # of the metadata of the file
_FIELDS = fields(
    format=integer(1),
    prompt_ids=list_of(TOKEN_ID, least=1, most=10**7),
    token_ids=list_of(TOKEN_ID, most=10**7),
    ahead=list_of(TOKEN_ID, most=10**4),
    seed=integer(0, MOST_SEED),
    answers_here=integer(0),
    config=fields(format=integer(1)),  # AnytimeConfig checks the rest
    made_by=fields(
        backend=string(100), tokenizer=string(100), model=mapping_of(free_form), numerics=mapping_of(free_form)
    ),
    digest=string(64, least=64),
)


@dataclass(frozen=True)
class SessionState:
    """
    State of an [`AnytimeSession`] between two calls.

    Args:
        prompt_ids (`list[int]`):
            The rendered prompt.
        token_ids (`list[int]`):
            The trace so far.
        ahead (`list[int]`):
            Tokens that were drawn and do not belong to the trace yet.
        seed (`int`):
            Seed of the session.
        answers_here (`int`):
            Answers that were given since the last token.
        config (`dict[str, Any]`):
            Settings of the session, as in `anytime_config.json`.
        made_by (`dict[str, Any]`):
            Backend, model and tokenizer of the session, and what the last bits of its numbers depend on.
        tensors (`dict[str, torch.Tensor]`, *optional*):
            Keys and values of prompt and trace. Without them they are computed again.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    ahead: list[int]
    seed: int
    answers_here: int
    config: dict[str, Any]
    made_by: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def save(self, path: str | Path) -> Path:
        """
        Write the state into a file, which replaces an older one only when it is complete.

        Args:
            path (`str` or `Path`):
                The file. It has the form of safetensors.

        Raises:
            `OSError`: If the file cannot be written.
        """
        path = Path(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        values = {name: value for name, value in vars(self).items() if name != "tensors"}
        values |= {"format": _FORMAT}
        values["digest"] = _digest(values, tensors)
        path.parent.mkdir(parents=True, exist_ok=True)
        number, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(number)
        try:
            save_file(tensors, temporary, metadata={_ENTRY: json.dumps(values)})
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SessionState":
        """
        Read a state from a file.

        Raises:
            `ValueError`: If the file is not a session, is damaged, or is newer than this package.
            `OSError`: If the file is missing or not readable.
        """
        path = Path(path)
        check_file(path, _MOST_BYTES)
        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(_ENTRY)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a dict
        except (SafetensorError, RuntimeError, ValueError, MemoryError) as error:
            said = " ".join(str(error).split())[:200]
            raise Unfit(
                f"{path} is not a session, or is damaged ({said}). Use an older copy, or begin anew."
            ) from error
        if text is None or len(text) > 1024 * MEBIBYTE:
            raise Unfit(f"{path} is not a session. Give a file that a session was saved to.")
        values = parse_json(text, path, fields(format=integer(1)))
        if values["format"] > _FORMAT:
            raise Unfit(
                f"{path} has format {values['format']}, but this version reads up to {_FORMAT}. Upgrade trl-anytime."
            )
        parse_json(text, path, _FIELDS)
        if values.pop("digest") != _digest(values, tensors):
            raise Unfit(f"{path} is damaged: its checksum is that of other content. Use an older copy, or begin anew.")
        del values["format"]
        known = {name: values[name] for name in cls.__dataclass_fields__ if name != "tensors"}
        return cls(**known, tensors=tensors)


def _digest(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Return a checksum of all values and tensors."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
