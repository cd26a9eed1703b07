"""
Estimate of the memory that one GPU needs for a run.

Weights, gradients and optimiser states are counted. To find what forward and backward hold besides, the model's layers
run on the largest micro-batch. Their tensors have a shape and no content, and those alive are counted. What generation
holds is computed from the shapes of its largest tensors.
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
from ..modeling.branch_decoding import MAX_SCORES
from ..modeling.support import unsupported_structure
from ..modeling.trace_decoding import FINISHED_SHARE
from ..modeling.tree_attention import TreeLayout, enable_tree_attention, layout_in_use
from ..outside.tables import aligned
from .batch_sizes import most_tokens
from .finding import OK, WARNING, Finding

_GIB = 2**30
# Logits are computed in tiles of at most this many tokens and words (TRL's fused LM head)
_TILE_TOKENS, _TILE_WORDS = 4096, 32768
# Bytes of state for each trained weight, by `optim`. Others keep two moments in the precision of the weight.
_ADAM = ("adamw_torch", "adamw_torch_fused")
_BYTES_OF_OPTIMIZER = {"sgd": 0, "adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2}
_FULL_SHARD = ("fsdp", "zero3")


@dataclass(frozen=True)
class Launch:
    """
    Distribution of a run over GPUs.

    Args:
        num_processes (`int`, *optional*, defaults to `1`):
            Number of GPUs.
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
            Bytes that are held throughout: weights, gradients, optimiser states.
        training (`dict[str, int]`):
            Further bytes that an update needs at most.
        generating (`dict[str, int]`):
            Further bytes that generation needs at most.
        missing (`str`, *optional*):
            Why `training` and `generating` are not known, if they are not.
    """

    always: dict[str, int]
    training: dict[str, int]
    generating: dict[str, int]
    missing: str | None = None

    @property
    def peak(self) -> int:
        """Return the bytes of the larger of the two phases."""
        return sum(self.always.values()) + max(sum(self.training.values()), sum(self.generating.values()))

    def table(self) -> str:
        """Return the parts in GiB as a table."""
        rows = [["memory per GPU", "GiB"]]
        for parts, note in (
            (self.always, ""),
            (self.training, " (while updating)"),
            (self.generating, " (while generating)"),
        ):
            rows += [[f"{name}{note}", _gib(size)] for name, size in parts.items()]
        return aligned([*rows, ["at least" if self.missing else "at most at a time", _gib(self.peak)]])

    def finding(self, available: int | None) -> Finding:
        """Report whether the run fits into the `available` bytes of a GPU."""
        said = f"The run needs about {_gib(self.peak)} GiB per GPU."
        if self.missing is not None:
            said = (
                f"The run needs at least {_gib(self.peak)} GiB per GPU. The rest is unknown, because {self.missing}."
            )
        if available is None:
            return Finding("memory", OK, f"{said} Pass `--gpu-memory` to compare this with a GPU.")
        said += f" The GPU has {_gib(available)} GiB."
        if self.peak <= available:
            return Finding("memory", OK, said)
        updating = sum(self.training.values()) >= sum(self.generating.values())
        parts = {**self.always, **(self.training if updating else self.generating)}
        largest = max(parts, key=lambda name: parts[name])
        return Finding("memory", WARNING, f"{said} The largest part is: {largest}.", _ADVICE[largest])


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
        "Lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` by the same factor. Or set "
        "`gradient_checkpointing: true`. Or lower the last of `budgets`, or `num_summaries`."
    ),
    "LM head": "Lower `per_device_train_batch_size` and raise `gradient_accumulation_steps` to match.",
    "keys and values": "Set `max_cached_tokens`, or `use_vllm: true`.",
    "logits": "Set `max_cached_tokens`, or `use_vllm: true`.",
    "cast weights": "Train LoRA adapters with `use_peft: true`, or set `use_vllm: true`.",
    "scores": "Set `max_cached_tokens`, or `use_vllm: true`.",
    "vLLM": "Lower `vllm_gpu_memory_utilization`, or set `vllm_enable_sleep_mode: true`.",
}


def _gib(size: int) -> str:
    return f"{size / _GIB:,.1f}" if size >= _GIB else f"{size / _GIB:.3g}"


@contextmanager
def without_memory() -> Iterator[FakeTensorMode]:
    """Give tensors that are made inside a shape, but no content."""
    with FakeTensorMode() as mode:
        yield mode


def planned_model(config: PretrainedConfig, dtype: torch.dtype, peft_config: Any = None) -> PreTrainedModel:
    """
    Build the model that `config` describes, inside [`without_memory`].

    It has adapters if `peft_config` is given.
    """
    # PEFT cannot move adapters without content, so they are made on the meta device, which has no content either
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
    Report the estimate of [`estimate_memory`], within a few seconds.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Config of the model.
        dtype (`torch.dtype`):
            Precision of the weights.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapters that are trained.
        args, launch, prompt_length, max_bridge_length, available:
            See [`estimate_memory`].

    Returns:
        `tuple`: the finding, and the parts as a table. If the layers do not run without content, both have only what
            is held throughout.
    """
    with without_memory() as mode:
        model = planned_model(config, dtype, peft_config)
        reason = "`packing` is 'rows'" if args.packing == "rows" else unsupported_structure(model)
        if reason is None:
            try:
                estimate = estimate_memory(model, args, launch, prompt_length, max_bridge_length, mode, available)
            except Exception as error:  # layers that need the content of tensors, such as experts, raise anything
                reason = f"the model's layers do not run without content ({type(error).__name__})"
        if reason is not None:
            estimate = MemoryEstimate(static_memory(model, args, launch), {}, {}, missing=reason)
    return estimate.finding(available), estimate.table()


def _size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def static_memory(model: torch.nn.Module, args: BRPOConfig, launch: Launch) -> dict[str, int]:
    """
    Return the bytes of weights, gradients and optimiser states on one GPU.

    What is sharded is divided by the number of GPUs.

    Args:
        model (`torch.nn.Module`):
            The model in the precision of its weights, not sharded.
        args ([`BRPOConfig`]):
            Settings.
        launch ([`Launch`]):
            Distribution over GPUs.
    """
    weights = [*model.parameters(), *model.buffers()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in _BYTES_OF_OPTIMIZER:
        states = _BYTES_OF_OPTIMIZER[optim] * sum(parameter.numel() for parameter in trained)
    else:  # Adam's two moments, and a step count per tensor. Other optimisers take about as much, or less.
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
    Estimate the most bytes that one GPU holds. Call this inside [`without_memory`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model without content, from [`planned_model`]. Tree attention is enabled on it.
        args ([`BRPOConfig`]):
            Settings.
        launch ([`Launch`]):
            Distribution over GPUs.
        prompt_length (`int`):
            Tokens of the longest prompt.
        max_bridge_length (`int`):
            Tokens of the longest bridge.
        mode (`FakeTensorMode`):
            The mode in which the model was made, from [`without_memory`].
        available (`int`, *optional*):
            Bytes of the GPU. vLLM takes a share of them in colocate mode.
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
        generating = generation_memory(config, args, prompt_length, max_bridge_length, compute_bytes)
        if half_precision and launch.sharding not in _FULL_SHARD:
            # Kept while tokens are decoded. Autocast keeps none of the frozen ones.
            linear = {module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)}
            generating["cast weights"] = 2 * sum(
                weight.numel() for weight in linear if weight.requires_grad and weight.dtype == torch.float32
            )
    return MemoryEstimate(always, training, generating)


def generation_memory(
    config: PretrainedConfig, args: BRPOConfig, prompt_length: int, max_bridge_length: int, compute_bytes: int
) -> dict[str, int]:
    """
    Return the most bytes that transformers hold on a rank while traces and summaries are sampled.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            Config of the language model.
        args, prompt_length, max_bridge_length:
            See [`estimate_memory`].
        compute_bytes (`int`):
            Bytes of a number in the precision of the computation.

    Returns:
        `dict[str, int]`: the caches of traces and summaries; the logits of all summaries with what becomes of them
            while a token is drawn; and the scores of attention that are held at a time, with what summaries see.
    """
    assert args.steps_per_generation is not None  # filled in by TRL
    num_rollouts = args.per_device_train_batch_size * args.steps_per_generation
    trace = prompt_length + args.budgets[-1]
    per_rollout = prompt_length + most_tokens(args, max_bridge_length)[0]
    if args.max_cached_tokens is not None:
        num_rollouts = min(num_rollouts, max(1, args.max_cached_tokens // per_rollout))
    # Finished traces are set aside before the others move
    tokens = num_rollouts * max(per_rollout, int((1 + FINISHED_SHARE) * trace))
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads

    num_branches = num_rollouts * len(args.budgets) * args.num_summaries
    # The model's logits; in float32 their scores, their probabilities and the noise that draws from them. To leave out
    # tokens, they are sorted, with an index of eight bytes each.
    sorts = args.top_p < 1 or bool(args.top_k) or bool(args.min_p)
    per_logit = compute_bytes + (24 if sorts else 12)

    # All summaries read the trunk together, and before that each cut's bridge, with its first token, does
    num_queries = max(num_branches, num_rollouts * len(args.budgets) * (max_bridge_length + 1))
    num_scores = min(num_queries * num_heads * trace, MAX_SCORES)
    return {
        "keys and values": tokens * 2 * config.num_hidden_layers * num_key_heads * head_dim * compute_bytes,
        "logits": num_branches * config.vocab_size * per_logit,
        "scores": num_scores * (4 + compute_bytes) + num_branches * trace,
    }


def run_layers(
    model: PreTrainedModel, args: BRPOConfig, prompt_length: int, max_bridge_length: int, mode: FakeTensorMode
) -> tuple[int, int, torch.Tensor]:
    """
    Run the model's layers forward and backward on a micro-batch that reaches every budget.

    The arguments are those of [`estimate_memory`].

    Returns:
        `tuple`: bytes that are alive after the forward pass, bytes at the peak of both passes, and the last hidden
            states. Weights and gradients are not counted.
    """
    batch, budgets, num_summaries = args.per_device_train_batch_size, args.budgets, args.num_summaries
    with unset_fake_temporarily():  # the layout reads sizes from the content of tensors
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
        # Saving the state of random generators would need content
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
    """Return the same layout without content."""

    def emptied(value: Any) -> Any:
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    def fields_of(one: Any) -> dict[str, Any]:
        return {f.name: emptied(getattr(one, f.name)) for f in dataclasses.fields(one)}

    budgets = tuple(type(branches)(**fields_of(branches)) for branches in layout.budgets)
    return TreeLayout(**{**fields_of(layout), "budgets": budgets})


class PeakMemory(TorchDispatchMode):
    """
    Counter of the bytes of tensors that are made inside, with or without content.

    Attributes:
        live (`int`):
            Bytes of the tensors that are alive.
        peak (`int`):
            The largest value of `live` so far.
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
