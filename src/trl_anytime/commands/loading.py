"""Load what a command's options name: tokenizer and anytime config, model, engine, a server's client."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inference.anytime_config import AnytimeConfig


_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_ADAPTER_CONFIG = "adapter_config.json"


def load_tokenizer_and_config(options: argparse.Namespace, run: Path | None = None) -> "tuple[Any, AnytimeConfig]":
    """
    Load the model's tokenizer and anytime config, and apply the options for budgets and sampling.

    Args:
        options (`Namespace`):
            Options with `model`.
        run (`Path`, *optional*):
            Folder of the run, if the model is a checkpoint of it. It is taken for files that the checkpoint lacks.
    """
    from dataclasses import replace

    from transformers import AutoTokenizer

    from ..inference.anytime_config import ANYTIME_CONFIG_NAME, AnytimeConfig
    from ..outside.model_files import load_files

    tokenizer = load_files("tokenizer", _holder(options.model, run, _TOKENIZER), AutoTokenizer.from_pretrained)
    config = AnytimeConfig.from_pretrained(
        _holder(options.model, run, (ANYTIME_CONFIG_NAME,)),
        tokenizer,
        think_end=options.think_end,
        truncation_bridge=options.truncation_bridge,
        answer_bridge=options.answer_bridge,
    )
    given = vars(options)
    sampling = {
        name: given[name] for name in ("temperature", "top_p", "top_k", "min_p") if given.get(name) is not None
    }
    changes = {name: given[name] for name in ("budgets", "max_summary_length") if given.get(name) is not None}
    if given.get("system_prompt") is not None:
        changes["system_prompt"] = given["system_prompt"] or None
    return tokenizer, replace(config, sampling=replace(config.sampling, **sampling), **changes)


def _holder(model: str, run: Path | None, names: Sequence[str]) -> str:
    """Return where files are taken from: a checkpoint, else its run, else the base model of an adapter."""
    from ..outside.validation import MEBIBYTE, fields, read_json, string

    if run is None:
        return model
    for folder in (Path(model), run):
        if any((folder / name).is_file() for name in names):
            return str(folder)
    adapter = Path(model, _ADAPTER_CONFIG)
    if not adapter.is_file():
        return model
    return read_json(adapter, fields(base_model_name_or_path=string(10_000, least=1)), MEBIBYTE)[
        "base_model_name_or_path"
    ]


def checksum_of_weights(model: str) -> str | None:
    """Return a checksum of the weights in a model's folder, or `None` for a model of the Hub."""
    from ..outside.files import weight_files
    from ..training.checkpoint import checksum

    return " ".join(f"{file.name}:{checksum(file):08x}" for file in weight_files(Path(model))) or None


def make_client(options: argparse.Namespace) -> Any:
    from ..inference.serving import check_served
    from ..rollout.http_backend import CompletionClient

    client = CompletionClient(
        options.base_url,
        options.served_name,
        options.api_key,
        options.timeout,
        options.patience,
        concurrency=vars(options).get("concurrency", 1),
        folder=options.model,
    )
    if options.served_name is None:
        check_served(client, options.model)
    return client


def load_model(options: argparse.Namespace) -> Any:
    """Return a server's client, an engine, or a model, as the options say."""
    if options.base_url:
        return make_client(options)
    if vars(options).get("backend") == "vllm":
        if Path(options.model, _ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{options.model} holds an adapter, which --backend vllm does not load. Leave the option out, or "
                "merge the adapter into its base model."
            )
        return _vllm()(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            generation_config="vllm",
            enable_prefix_caching=True,
        )
    from transformers import AutoModelForCausalLM

    from ..outside.model_files import load_files

    device = _device(options.device)
    model = load_files("weights", options.model, AutoModelForCausalLM.from_pretrained, dtype=options.dtype)
    return model.to(device)


def check_machine(options: argparse.Namespace) -> None:
    """Refuse a missing library or device before anything is loaded."""
    if options.base_url:
        return
    if vars(options).get("backend") == "vllm":
        _vllm()
    else:
        _device(options.device)


def _vllm() -> Any:
    """Return vLLM's engine."""
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(
            f"vLLM cannot be imported ({error}). Run `pip install 'trl-anytime[vllm]'`, or leave out --backend vllm."
        ) from error
    return LLM


def _device(name: str | None) -> str:
    """Return a device that works. The default is a GPU, if there is one."""
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used ({reason}). Leave it out, or set --device cpu.") from error
    return device
