"""
A device for tests that computes on the CPU and is as strict as a GPU.

Tensors say that they are on `gpu:0`. An operator that gets tensors of both devices fails. What makes the host wait for
the device, and what it sends there, is counted by the function that asked for it. No kernel, memory or rounding of a
GPU is simulated.

Importing this registers the device in the whole process, and libraries ask for devices that they find. So tests run it
in processes of their own (`tests.support.on_pretended_gpu`).
"""

import sys
from collections import Counter
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


def _nothing(*args, **kwargs):
    return None


_setup_privateuseone_for_python_backend(
    "gpu",
    backend_module=SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        get_amp_supported_dtype=lambda: list(HALF),
        **dict.fromkeys(
            ("_lazy_init", "manual_seed_all", "set_device", "synchronize", "set_rng_state", "empty_cache"), _nothing
        ),
    ),
)
GPU = torch.device("gpu:0")

# Operators whose result, or its size, the host has to know
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")
_TAKES_BOTH = ("copy_", "_to_copy", "lift_fresh", *_INDEXED)
_PROMOTES = ("add", "sub", "mul", "div", "where", "cat", "add_", "sub_", "mul_", "div_", "bmm", "mm", "addmm")


class OnGPU(torch.Tensor):
    """A tensor that says that it is on the GPU. Its numbers are in `host`."""

    @staticmethod
    def __new__(cls, host):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=GPU,
        )

    def __init__(self, host):
        self.host = host

    def __repr__(self):
        return f"OnGPU({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, None)


class Record(TorchDispatchMode):
    """
    What happened inside.

    Attributes:
        waits (`Counter`): How often the host waited, by the function that made it wait.
        uploads (`Counter`): How often the host sent a tensor to the device, by function.
        promotions (`Counter`): How often an operator mixed half precision with float32, by function.
        doubles (`Counter`): How often a result was in float64, by function.
        num_operators (`int`): Number of operators.
    """

    def __init__(self, package="trl_anytime"):
        super().__init__()
        self._package = f"/{package}/"
        self._functions = _Functions(self)
        self.waits, self.uploads, self.promotions, self.doubles = Counter(), Counter(), Counter(), Counter()
        self.num_operators = 0
        self.in_attention = False  # one kernel on a GPU, whatever precisions it has inside

    def __enter__(self):
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_operators += 1
        return _compute(func, args, kwargs or {}, self)

    def place(self):
        """Return the innermost function of the package or of a library, as `folder/file.py function`."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            for folder in (self._package, "/site-packages/"):
                if folder in name and "/site-packages/torch/" not in name and name != __file__:
                    return f"{name.rpartition(folder)[2]} {frame.f_code.co_qualname.replace('.<locals>', '')}"
            frame = frame.f_back
        return "tests"


class _Functions(TorchFunctionMode):
    """Calls that do not reach operators as what they are."""

    def __init__(self, record):
        super().__init__()
        self._record = record

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            self._record.waits[self._record.place()] += 1
            return args[0].host.tolist()
        if func is torch.Tensor.numpy and isinstance(args[0], OnGPU):
            raise TypeError("A tensor on the GPU has no numpy array.")
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            with torch._C.DisableTorchFunction():
                made = func(*args, **{**kwargs, "device": "cpu"})
            self._record.uploads[self._record.place()] += made.numel() > 0
            return OnGPU(made)
        if func is torch.nn.functional.scaled_dot_product_attention:
            self._record.in_attention = True
            try:
                return func(*args, **kwargs)
            finally:
                self._record.in_attention = False
        return func(*args, **kwargs)


def _is_gpu(device):
    return device is not None and torch.device(device).type == "gpu"


def _compute(func, args, kwargs, record):
    name = func.overloadpacket.__name__
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGPU)]
    # Numbers may be on the host, as for a GPU
    on_host = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]
    if on_gpu and on_host and name not in _TAKES_BOTH:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two: gpu and cpu ({func})"
        )
    if record is not None:
        _note(record, name, args, kwargs, on_gpu, on_host)
    if func is aten._pin_memory.default:
        return args[0]

    wrappers = {}

    def to_host(x):
        if isinstance(x, OnGPU):
            wrappers[id(x.host)] = x
            return x.host
        return torch.device("cpu") if isinstance(x, torch.device) and x.type == "gpu" else x

    output = func(*tree_map(to_host, args), **tree_map(to_host, kwargs))
    if name == "copy_":
        return args[0]
    device = kwargs.get("device")
    if not (_is_gpu(device) if device is not None else on_gpu):
        return output

    def to_gpu(x):
        if not isinstance(x, torch.Tensor) or isinstance(x, OnGPU):
            return x
        if record is not None and x.dtype == torch.float64 and x.dim():
            record.doubles[record.place()] += 1
        return wrappers[id(x)] if id(x) in wrappers else OnGPU(x)

    return tree_map(to_gpu, output)


def _note(record, name, args, kwargs, on_gpu, on_host):
    device = kwargs.get("device")
    if not on_gpu:
        if name == "_to_copy" and _is_gpu(device):
            record.uploads[record.place()] += 1
        return
    waits = name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 2)
    if name in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        waits |= any(index.dtype == torch.bool for index in indices)
        if any(not isinstance(index, OnGPU) and index.dim() for index in indices):
            record.uploads[record.place()] += 1
    waits |= name == "_to_copy" and device is not None and not _is_gpu(device)
    if name == "copy_":
        waits |= not isinstance(args[0], OnGPU)
        if on_host:
            record.uploads[record.place()] += 1
    if waits:
        record.waits[record.place()] += 1
    kinds = {x.dtype for x in on_gpu if x.dim() and x.is_floating_point()}
    if not record.in_attention and name in _PROMOTES and torch.float32 in kinds and kinds & set(HALF):
        record.promotions[record.place()] += 1


def to_gpu(value):
    """Move a module, in place, or return a tensor on the GPU."""
    if isinstance(value, torch.Tensor):
        return OnGPU(value.detach())
    moved = {}
    for module in value.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    new = OnGPU(tensor.detach())
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                own[name] = moved[id(tensor)]
    return value
