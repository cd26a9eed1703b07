"""
How much memory one GPU needs for the shape of a run.

Weights, gradients and optimiser states are counted. What forward and backward hold besides is found by running the
model's layers on the largest micro-batch with tensors that have a shape and no content, and by noting what is alive.
"""

import dataclasses
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..brpo_config import BRPOConfig
from ..method.packing import PackedRollouts
from ..modeling.support import unsupported_structure
from ..modeling.tree_attention import TreeLayout, enable_tree_attention, layout_in_use
from ..outside.tables import aligned
from .batch_sizes import most_tokens
from .finding import OK, WARNING, Finding

_GIB = 2**30
# Logits are computed in tiles of at most so many tokens, and so many words (TRL's fused LM head)
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
# Bytes of state for each weight in training, by `optim`: two moments in its own precision, or as said here
_ADAM = ("adamw_torch", "adamw_torch_fused")
_BYTES_OF_OPTIMIZER = {"sgd": 0, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}
_FULL_SHARD = ("fsdp", "zero3")


@dataclass(frozen=True)
class Launch:
    """
    How a run is spread over GPUs.

    Args:
        num_processes (`int`, *optional*, defaults to `1`):
            GPUs.
        sharding (`str`, *optional*, defaults to `"none"`):
            `"none"` (the whole model on each), `"fsdp"`, `"zero2"` or `"zero3"`.
    """

    num_processes: int = 1
    sharding: str = "none"


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes on one GPU.

    Args:
        always (`dict[str, int]`):
            What stays: weights, gradients, optimiser states.
        training (`dict[str, int]`):
            What an update needs besides, at most.
        generating (`dict[str, int]`):
            What generation needs besides, at most.
        missing (`str`, *optional*):
            Why the last two are not known, if they are not.
    """

    always: dict[str, int]
    training: dict[str, int]
    generating: dict[str, int]
    missing: str | None = None

    @property
    def peak(self) -> int:
        """The larger of the two phases."""
        return sum(self.always.values()) + max(sum(self.training.values()), sum(self.generating.values()))

    def table(self) -> str:
        """The parts, in GiB."""
        rows = [["memory per GPU", "GiB"]]
        for parts, note in (
            (self.always, ""),
            (self.training, " (while updating)"),
            (self.generating, " (while generating)"),
        ):
            rows += [[f"{name}{note}", _gib(size)] for name, size in parts.items()]
        return aligned([*rows, ["at least" if self.missing else "at most at a time", _gib(self.peak)]])

    def finding(self, available: int | None) -> Finding:
        """Whether it fits into the `available` bytes of a GPU."""
        said = f"About {_gib(self.peak)} GiB per GPU at most."
        if self.missing is not None:
            said = f"At least {_gib(self.peak)} GiB per GPU; the rest is not estimated, because {self.missing}."
        if available is None:
            return Finding("memory", OK, f"{said} Give `--gpu-memory` to compare it with a GPU.")
        said += f" It has {_gib(available)} GiB."
        if self.peak <= available:
            return Finding("memory", OK, said)
        updating = sum(self.training.values()) >= sum(self.generating.values())
        parts = {**self.always, **(self.training if updating else self.generating)}
        largest = max(parts, key=lambda name: parts[name])
        return Finding("memory", WARNING, f"{said} The largest part: {largest}.", _ADVICE[largest])


_SHARDING_ADVICE = (
    "Shard it over GPUs (`examples/accelerate_configs/fsdp2.yaml`), or train LoRA adapters with `use_peft: true`."
)
_ADVICE = {
    "weights": _SHARDING_ADVICE,
    "gradients": _SHARDING_ADVICE,
    "optimiser states": _SHARDING_ADVICE,
    "reference model": "Set `beta: 0`, or train LoRA adapters, which need no second model.",
    "gathered weights": "Train with more GPUs, or a smaller model.",
    "activations": (
        "Lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` as much; set "
        "`gradient_checkpointing: true`; or lower the last budget or `num_summaries`."
    ),
    "LM head": "Lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` as much.",
    "keys and values": "Set `max_cached_tokens`, or `use_vllm: true`.",
    "vLLM": "Lower `vllm_gpu_memory_utilization`, or set `vllm_enable_sleep_mode: true`.",
}


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f}" if size >= _GIB else f"{size / _GIB:.3g}"


@contextmanager
def without_memory() -> Iterator[FakeTensorMode]:
    """Tensors that are made inside have a shape and no content."""
    with FakeTensorMode() as mode:
        yield mode


def planned_model(config: PretrainedConfig, dtype: torch.dtype, peft_config: Any = None) -> PreTrainedModel:
    """The model that `config` describes, within [`without_memory`]; with adapters if `peft_config` is given."""
    # PEFT cannot move adapters without content, and so they are made on the device that has none either
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if peft_config is not None:
            from peft import get_peft_model

            model = cast(PreTrainedModel, get_peft_model(model, peft_config))
    made: dict[torch.Tensor, torch.Tensor] = {}  # embeddings may be tied
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[tensor] = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                own[name] = None if tensor is None else cast(Any, made[tensor])
    return model


def memory_finding(
    config: PretrainedConfig,
    dtype: torch.dtype,
    peft_config: Any,
    args: BRPOConfig,
    launch: Launch,
    prompt_length: int,
    max_bridge_length: int,
    available: int | None,
) -> tuple[Finding, str]:
    """
    The estimate of [`estimate_memory`] for a report, in a few seconds.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            The model's.
        dtype (`torch.dtype`):
            Precision of its weights.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters that are trained.
        args, launch, prompt_length, max_bridge_length, available:
            As there.

    Returns:
        `tuple`: what is to be said, and the parts as a table. Where layers cannot be run without content, only what is
            held always.
    """
    with without_memory() as mode:
        model = planned_model(config, dtype, peft_config)
        reason = "`packing` is 'rows'" if args.packing == "rows" else unsupported_structure(model)
        if reason is None:
            try:
                estimate = estimate_memory(model, args, launch, prompt_length, max_bridge_length, mode, available)
            except Exception as error:  # whatever layers that need the content of tensors come to, such as experts
                reason = f"the model's layers do not run without content ({type(error).__name__})"
        if reason is not None:
            estimate = MemoryEstimate(static_memory(model, args, launch), {}, {}, missing=reason)
    return estimate.finding(available), estimate.table()


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def static_memory(model: torch.nn.Module, args: BRPOConfig, launch: Launch) -> dict[str, int]:
    """
    Bytes of weights, gradients and optimiser states on one GPU: those of the tensors, divided by the GPUs where they
    are sharded.

    Args:
        model (`torch.nn.Module`):
            The model in the precision of its weights, not sharded.
        args ([`BRPOConfig`]):
            Settings.
        launch ([`Launch`]):
            How the run is spread.
    """
    weights = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _BYTES_OF_OPTIMIZER:
        states = _BYTES_OF_OPTIMIZER[optim] * sum(parameter.numel() for parameter in trained)
    else:  # Adam's two moments, and the number of steps of each tensor; others come to about as much or less
        states = 2 * _size(trained) + (4 * len(trained) if optim in _ADAM else 0)
    weight_shards = launch.num_processes if launch.sharding in _FULL_SHARD else 1
    by_state = launch.num_processes if launch.sharding != "none" else 1
    held = {
        "weights": _size(weights) // weight_shards,
        "gradients": _size(trained) // by_state,
        "optimiser states": states // by_state,
    }
    if args.beta and not is_peft_model(model):
        held["reference model"] = held["weights"]
    return held


def estimate_memory(
    model: PreTrainedModel,
    args: BRPOConfig,
    launch: Launch,
    prompt_length: int,
    max_bridge_length: int,
    mode: FakeTensorMode,
    available: int | None = None,
) -> MemoryEstimate:
    """
    Estimate what one GPU holds at the most, within [`without_memory`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model without content, from [`planned_model`]. It is given tree attention.
        args ([`BRPOConfig`]):
            Settings.
        launch ([`Launch`]):
            How the run is spread.
        prompt_length (`int`):
            Tokens of the longest prompt.
        max_bridge_length (`int`):
            Tokens of the longest bridge.
        mode (`FakeTensorMode`):
            The mode in which the model was made, from [`without_memory`].
        available (`int`, *optional*):
            Bytes of the GPU, of which vLLM takes a share in colocate mode.
    """
    always = static_memory(model, args, launch)
    config = model.config.get_text_config()
    half_precision = args.bf16 or args.fp16
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    dtype = matrices[0].dtype
    compute_bytes = 2 if half_precision else dtype.itemsize

    forwarded, peak, last_hidden = run_layers(model, args, prompt_length, max_bridge_length, mode)
    num_tokens = last_hidden.size(0) * last_hidden.size(1)
    head = cast(torch.nn.Linear, model.get_output_embeddings()).weight
    # Gradients in float32 of the hidden states and of the head, and a tile of logits
    lm_head = 4 * num_tokens * head.size(1) + min(num_tokens, _TILE_TOKENS) * _TILE_WORDS * compute_bytes
    lm_head += 4 * head.numel() if head.requires_grad else 0
    training = {"activations": max(peak, forwarded + lm_head) - lm_head, "LM head": lm_head}
    if launch.sharding in _FULL_SHARD:  # a layer in use, and the next one on its way
        blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
        largest = max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)
        training["gathered weights"] = 2 * max(largest, head.numel()) * compute_bytes

    generating = {}
    engine = int((available or 0) * args.vllm_gpu_memory_utilization)
    if args.use_vllm and args.vllm_mode == "colocate" and engine:
        generating["vLLM"] = engine
        if not args.vllm_enable_sleep_mode:
            training["vLLM"] = engine
    elif not args.use_vllm:
        tokens = _cached_tokens(args, prompt_length, max_bridge_length)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        generating["keys and values"] = tokens * 2 * config.num_hidden_layers * num_heads * head_dim * compute_bytes
    return MemoryEstimate(always, training, generating)


def _cached_tokens(args: BRPOConfig, prompt_length: int, max_bridge_length: int) -> int:
    """Tokens whose keys and values a rank holds while transformers generate: traces, and summaries at all cuts."""
    assert args.steps_per_generation is not None  # filled in by TRL
    per_rollout = prompt_length + most_tokens(args, max_bridge_length)[0]
    tokens = args.per_device_train_batch_size * args.steps_per_generation * per_rollout
    return tokens if args.max_cached_tokens is None else max(min(tokens, args.max_cached_tokens), per_rollout)


def run_layers(
    model: PreTrainedModel, args: BRPOConfig, prompt_length: int, max_bridge_length: int, mode: FakeTensorMode
) -> tuple[int, int, torch.Tensor]:
    """
    Run the model's layers forward and backward on a micro-batch that reaches every budget. Arguments as for
    [`estimate_memory`].

    Returns:
        `tuple`: bytes that are alive after the forward pass, and at the peak of both, weights and gradients left out;
            and the last hidden states.
    """
    batch, budgets, num_summaries = args.per_device_train_batch_size, args.budgets, args.num_summaries
    with unset_fake_temporarily():  # the layout's sizes are read off
        packed = PackedRollouts.pack(
            [[0] * budgets[-1]] * batch,
            [budgets] * batch,
            [[[0] * max_bridge_length] * len(budgets)] * batch,
            [[[[0] * args.max_summary_length] * num_summaries] * len(budgets)] * batch,
        )
        length = prompt_length + packed.token_ids.size(1)
        layout = TreeLayout.from_packed(packed, torch.full((batch,), prompt_length), length)
    layout = _emptied(layout, mode)

    base_model: Any = cast(Any, model).get_base_model() if is_peft_model(model) else model
    enable_tree_attention(base_model)
    model.train()
    if args.gradient_checkpointing:
        # The states of random generators have content
        given = cast(dict[str, Any], args.gradient_checkpointing_kwargs or {})
        kwargs = {"use_reentrant": False, **given, "preserve_rng_state": False}
        if is_peft_model(model):
            base_model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

    dtype = torch.bfloat16 if args.bf16 else torch.float16
    autocast = torch.autocast("cpu", dtype) if args.bf16 or args.fp16 else nullcontext()
    tokens = torch.zeros(batch, length, dtype=torch.long)
    with PeakMemory() as memory, layout_in_use():
        with autocast:
            hidden = base_model.base_model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                position_ids=layout.position_ids,
                tree=layout,
                use_cache=False,
            ).last_hidden_state
        forwarded = memory.live
        hidden.backward(torch.ones_like(hidden))
    return forwarded, memory.peak, hidden.detach()


def _emptied(layout: TreeLayout, mode: FakeTensorMode) -> TreeLayout:
    """The same layout without content."""

    def emptied(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def fields_of(one: Any) -> dict[str, Any]:
        return {f.name: emptied(getattr(one, f.name)) for f in dataclasses.fields(one)}

    budgets = tuple(type(branches)(**fields_of(branches)) for branches in layout.budgets)
    return TreeLayout(**{**fields_of(layout), "budgets": budgets})


class PeakMemory(TorchDispatchMode):
    """
    Notes the bytes of tensors that are made inside, with or without content.

    Attributes:
        live (`int`):
            Bytes that are alive now.
        peak (`int`):
            The most that were alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), inputs)
        return output

    def _note(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in inputs:
            return

        def forget(_: Any) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)
