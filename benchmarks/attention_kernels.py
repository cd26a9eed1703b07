"""
Which attention kernel takes the branches of one budget, and what its mask and its shared key heads cost:

    python benchmarks/attention_kernels.py --device cuda --dtype bfloat16     # each of torch's kernels
    python benchmarks/attention_kernels.py --json                             # a list of objects, on the CPU

Compared are the mask as booleans and as numbers that are added, and heads that share keys: repeated, `enable_gqa`, and
folded into the queries, as tree attention does. Times are the fastest of several runs, forward and backward. Bytes are
what the backward pass keeps, where the mask of numbers is kept once for all layers.
"""

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from trl_anytime.modeling.tree_attention import additive_mask

KERNELS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def saved_bytes(run: Callable[[], torch.Tensor], shared: torch.Tensor) -> int:
    """Bytes of the storages that the backward pass keeps, without that of the `shared` mask."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    kept.pop(shared.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--queries", type=int, default=512, help="tokens of the branches of one budget")
    parser.add_argument("--keys", type=int, default=8768, help="trunk and branches")
    parser.add_argument("--heads", type=int, nargs=2, default=[12, 2], help="of queries and of keys")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    if not cuda:
        torch.set_num_threads(1)  # steadier than several on a busy machine
    dtype, (heads, key_heads) = getattr(torch, options.dtype), options.heads
    sharing, trunk = heads // key_heads, options.keys - options.queries

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, options.head_dim, dtype=dtype, device=options.device, requires_grad=True)

    query, key, value = sample(heads, options.queries), *(sample(key_heads, options.keys) for _ in range(2))
    index = torch.arange(options.queries, device=options.device)
    own = (index[:, None] >= index) & (index[:, None] // 128 == index // 128)  # branches of 128 tokens
    sees = torch.cat([own.new_ones(options.queries, trunk), own], dim=1)[None]
    once, folded = additive_mask(sees, dtype, 1), additive_mask(sees, dtype, sharing)

    def repeated(mask: torch.Tensor) -> torch.Tensor:
        keys, values = (x.repeat_interleave(sharing, dim=1) for x in (key, value))
        return scaled_dot_product_attention(query, keys, values, attn_mask=mask)

    ways: dict[str, tuple[Callable[[], torch.Tensor], torch.Tensor]] = {
        "booleans, repeated": (lambda: repeated(sees[:, None]), folded),
        "numbers, repeated": (lambda: repeated(once), once),
        "numbers, enable_gqa": (
            lambda: scaled_dot_product_attention(query, key, value, attn_mask=once, enable_gqa=True),
            once,
        ),
        "numbers, folded": (
            lambda: scaled_dot_product_attention(
                query.unflatten(1, (key_heads, sharing)).flatten(2, 3), key, value, attn_mask=folded
            ),
            folded,
        ),
    }
    results = []
    for kernel, backend in KERNELS.items():
        for way, (run, mask) in ways.items():
            row = {"kernel": kernel, "way": way}
            try:
                with nullcontext() if backend is None else sdpa_kernel(backend):
                    row["milliseconds"] = round(1000 * fastest(run, options.repeats, cuda), 3)
                    row["saved_mib"] = round(saved_bytes(run, mask) / 2**20, 2)
            except RuntimeError as error:  # the kernel does not take it
                row["refused"] = str(error).splitlines()[0][:80]
            results.append(row)
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for row in results:
        took = row.get("refused") or f"{row['milliseconds']:10.2f} ms {row['saved_mib']:10.2f} MiB"
        print(f"{row['kernel']:16}{row['way']:22}{took}")


def fastest(run: Callable[[], torch.Tensor], repeats: int, cuda: bool) -> float:
    """Seconds of the fastest run, forward and backward."""
    times = []
    for _ in range(repeats + 1):  # the first warms up
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter() if cuda else time.process_time()
        run().sum().backward()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() if cuda else time.process_time()) - start)
    return min(times[1:])


if __name__ == "__main__":
    main()
