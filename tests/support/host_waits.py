"""How often the host would wait for a GPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostWaits(TorchDispatchMode):
    """Counts operators whose result or size the host has to know, by name."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masks or name in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
