"""
Decoding of traces. It leaves their keys and values for the branches, and drops finished traces on the way.

`generate()` of transformers prepares each call anew, copies its cache for every token, and runs until the last row has
finished. None of this is done here. The tokens are the same.

Dimensions: R rows, N tokens of the longest prompt, V words.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from .branch_decoding import Trunk, refuse_broken_logits
from .growing_cache import growing_cache

# Once more than this share of the rows has finished, decoding continues without them, which copies the cache of the
# others
FINISHED_SHARE = 0.25


def decode_traces(
    model: torch.nn.Module,
    prompts: Sequence[list[int]],
    choose: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor],
    find_end: Callable[[int, list[int], int], int | None],
    *,
    needs_history: bool,
    stop_token_ids: Collection[int],
    max_new_tokens: int,
    pad_token_id: int,
    settle: Callable[[Trunk, list[list[int]], list[int], int], Collection[int]] | None = None,
    settle_every: int = 1,
    settled_leave: bool = False,
) -> tuple[list[list[int]], Trunk]:
    """
    Sample a trace for each prompt.

    Args:
        model (`torch.nn.Module`):
            A causal language model, ready to generate.
        prompts (`Sequence[list[int]]`):
            Token ids of the prompts.
        choose (`Callable`):
            Function from the tokens so far, shape (R, tokens), and logits, shape (R, V), to the next tokens, shape
            (R,), -1 where the logits are no distribution. Shorter prompts are filled up on the left.
        find_end (`Callable`):
            Function from the index of a trace, its tokens, and how many of them it has seen before, to the number of
            tokens up to the end of the trace, or `None`. It is asked every few tokens, and whenever a stop token
            came.
        needs_history (`bool`):
            Whether `choose` looks at the tokens so far. If not, it gets `None` for them.
        stop_token_ids (`Collection[int]`):
            Tokens that end a trace. `find_end` finds them, too.
        max_new_tokens (`int`):
            Most tokens of a trace.
        pad_token_id (`int`):
            Token that fills up shorter prompts.
        settle (`Callable`, *optional*):
            Function from the trunk so far, the tokens of all traces, the indices of those that go on, and how many
            tokens these have, to the indices of those that need not go on. Decoding ends when no trace has to.
        settle_every (`int`, *optional*, defaults to `1`):
            Tokens between two calls of `settle`.
        settled_leave (`bool`, *optional*, defaults to `False`):
            Whether such a trace leaves the batch as a finished one does. If tokens are drawn, the draws of the others
            depend on it.

    Returns:
        `tuple`: the token ids of each trace up to its end, and the trunk, which may have tokens behind the end of a
        trace, and lacks its last token.

    Raises:
        `FloatingPointError`: If the logits of a row are no distribution.
    """
    device: torch.device = model.device  # type: ignore[assignment]
    width = max(map(len, prompts))
    padded = torch.tensor([[pad_token_id] * (width - len(ids)) + ids for ids in prompts], device=device)
    starts = torch.tensor([width - len(ids) for ids in prompts], device=device)
    is_padded = any(len(ids) < width for ids in prompts)
    stops = torch.tensor(list(stop_token_ids), device=device)
    cache = growing_cache(max_length=width + max_new_tokens)
    rows = list(range(len(prompts)))  # the index of the prompt that each row continues
    sampled: list[list[int]] = [[] for _ in prompts]
    running, settled, trunks = set(rows), set[int](), []
    look_every, seen = max(8, max_new_tokens // 64), 0
    # The prompts, and what is sampled for them
    token_ids = torch.nn.functional.pad(padded, (0, max_new_tokens))
    has_stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
    position = torch.arange(token_ids.size(1), device=device)
    first = 0
    for length in range(width, width + max_new_tokens):
        outputs = model(
            input_ids=token_ids[:, first:length],
            # Without padding the attention is causal, for which the kernels need no mask
            attention_mask=(position[:length] >= starts[:, None]).long() if is_padded else None,
            position_ids=(position[first:length] - starts[:, None]).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens = choose(token_ids[:, :length] if needs_history else None, outputs.logits[:, -1])
        token_ids[:, length] = tokens
        first = length
        has_stopped = has_stopped | torch.isin(tokens, stops)
        # The one wait for the device of a token
        num_stopped, num_broken = torch.stack([has_stopped.sum(), (tokens < 0).sum()]).tolist()
        refuse_broken_logits(num_broken, len(tokens), "traces")
        num_sampled = length + 1 - width
        is_last = num_sampled == max_new_tokens
        is_look = num_stopped > FINISHED_SHARE * len(rows) or num_sampled % look_every == 0 or is_last
        is_check = settle is not None and num_sampled % settle_every == 0
        if not is_look and not is_check:
            continue

        for row, new in zip(rows, token_ids[:, width + seen : length + 1].tolist(), strict=True):
            if row in running:
                sampled[row] += new
                end = find_end(row, sampled[row], seen)
                if end is not None or is_last:
                    sampled[row] = sampled[row][:end]
                    running.remove(row)
        seen = num_sampled
        if settle is not None and is_check and running - settled:
            trunk = Trunk.from_cache(cache, starts, rows)
            settled |= set(settle(trunk, sampled, sorted(running - settled), num_sampled))
            if settled_leave:
                running -= settled
        finished = [r for r, row in enumerate(rows) if row not in running]
        # A check removes no rows by itself
        if running - settled and (not is_look or len(finished) <= FINISHED_SHARE * len(rows)):
            continue
        trunk = Trunk.from_cache(cache, starts, rows)
        if not running - settled:
            trunks.append(trunk)
            break
        trunks.append(trunk.select(finished))
        live = torch.tensor([r for r, row in enumerate(rows) if row in running], device=device)
        cache.batch_select_indices(live)
        token_ids, starts, has_stopped = token_ids[live], starts[live], has_stopped[live]
        rows = [row for row in rows if row in running]
    del cache, trunk  # the memory that they hold is given back layer by layer
    return sampled, Trunk.join(trunks)
