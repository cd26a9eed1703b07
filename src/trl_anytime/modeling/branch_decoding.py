"""
Decoding of a trace's branches on top of its keys and values. m·A summaries cost little more than their own tokens.

The keys and values of prompt and thinking (the trunk) are neither repeated nor recomputed. Branches are the rows of an
ordinary decoding batch, with a small cache of their own (the tail). Attention takes one softmax over both parts. It
reads each trunk once for all branches that leave it.

Trunks differ in length, and rows that finish early are set aside. So trunks lie in pages of one length. A pass over
all pages costs the same number of operators, however many trunks there are.

Dimensions: B branches, S tokens of each in one forward pass, T tail tokens, P pages, N tokens of a page, K branches
that read one page, C pages that one branch reads, H heads, F key heads, E = H / F heads that share one, D head size, V
words.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import Cache

from .growing_cache import growing_cache
from .tree_attention import layout_in_use

# Most scores held at once while trunks are read: 1 GiB in float32
MAX_SCORES = 2**28
# Finished rows are dropped once they are this share of all rows, because moving the others costs about a step
_FINISHED_SHARE = 0.1
# Pages are halved until so small a share of them is filled up, but they keep at least so many tokens
_FILLED_UP, _SMALLEST_PAGE = 0.1, 64


@dataclass(frozen=True)
class Trunk:
    """
    Keys and values of prompts with their thinking, in P pages.

    Args:
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of each layer, shape (P, F, N, D).
        rollouts (`list[int]`):
            P indices of the rollouts that the pages belong to.
        positions (`list[int]`):
            P positions of the first token of each page. Before position 0 there is padding.
        lengths (`dict[int, int]`):
            Tokens of each rollout. What stands behind them fills up its last page.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    rollouts: list[int]
    positions: list[int]
    lengths: dict[int, int]

    @classmethod
    def from_cache(cls, cache: Cache, starts: torch.Tensor, rollouts: list[int]) -> "Trunk":
        """
        Return the trunk that a cache holds, a page for each row.

        Args:
            cache ([`~transformers.Cache`]):
                Keys and values of P rows.
            starts (`torch.Tensor`):
                int64 of shape (P,), index of the first token. Padding stands before it.
            rollouts (`list[int]`):
                P indices of the rollouts that the rows belong to.
        """
        layers = [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]
        positions = [-start for start in starts.tolist()]
        width = layers[0][0].size(2)
        lengths = {rollout: width + first for rollout, first in zip(rollouts, positions, strict=True)}
        return cls(layers, rollouts, positions, lengths)

    @classmethod
    def join(cls, trunks: Sequence["Trunk"]) -> "Trunk":
        """
        Return one trunk with the rollouts of several, in pages of one length.

        The trunks have one page for each rollout. They lose their layers on the way, so that memory holds everything
        once, and one layer twice.
        """
        if len(trunks) == 1:
            return trunks[0]
        lengths = {rollout: length for trunk in trunks for rollout, length in trunk.lengths.items()}
        size = _page_length(list(lengths.values()))
        places = [trunk._places(size) for trunk in trunks]
        layers = []
        for layer in range(len(trunks[0].layers)):
            parts = []
            for trunk, (pages, columns) in zip(trunks, places, strict=True):
                parts.append([x[pages, :, columns].transpose(1, 2) for x in trunk.layers[layer]])
                trunk.layers[layer] = cast(Any, None)  # frees its memory
            keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
            layers.append((keys, values))
        starts = [(r, first) for t in trunks for r in t.rollouts for first in range(0, lengths[r], size)]
        return cls(layers, [rollout for rollout, _ in starts], [first for _, first in starts], lengths)

    def _places(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find the tokens of new pages of `size` tokens, where each rollout has one page now.

        Returns:
            `tuple`: page and column of each token, int64 of shape (new pages, 1) and (new pages, size). The last token
                of a rollout fills up its last page.
        """
        assert len(self.lengths) == len(self.rollouts)
        new = [
            (page, start - first, self.lengths[rollout] - 1 - first)
            for page, (rollout, first) in enumerate(zip(self.rollouts, self.positions, strict=True))
            for start in range(0, self.lengths[rollout], size)
        ]
        pages, starts, last = torch.tensor(new, device=self.layers[0][0].device).unsqueeze(2).unbind(1)
        return pages, torch.minimum(starts + torch.arange(size, device=starts.device), last)

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the pages hold, with what fills them up."""
        return len(self.rollouts) * self.layers[0][0].size(2)

    def select(self, pages: list[int]) -> "Trunk":
        """Return the trunk with only these pages."""
        index = torch.tensor(pages, device=self.layers[0][0].device)
        layers = [(keys[index], values[index]) for keys, values in self.layers]
        rollouts = [self.rollouts[page] for page in pages]
        lengths = {rollout: self.lengths[rollout] for rollout in rollouts}
        return Trunk(layers, rollouts, [self.positions[page] for page in pages], lengths)


def _page_length(lengths: list[int]) -> int:
    """Return the length of a page for rollouts of these lengths."""
    size = max(lengths)
    while size > _SMALLEST_PAGE:
        filled = sum(-(-length // size) * size for length in lengths)
        if filled <= (1 + _FILLED_UP) * sum(lengths):
            break
        size = max(_SMALLEST_PAGE, -(-size // 2))
    return size


@dataclass(frozen=True)
class BranchContext:
    """
    Common context of the branches that leave a trace at the same cut with the same bridge.

    Args:
        rollout (`int`):
            Index of the rollout.
        seen (`int`):
            Number of trunk tokens that the branches see, at least one.
        token_ids (`list[int]`):
            Tokens between the trunk and the first sampled token: the rest of the thinking up to the cut, and the
            bridge.
        num_branches (`int`):
            Number of branches.
        history (`list[int]`):
            All tokens before the first sampled one.
    """

    rollout: int
    seen: int
    token_ids: list[int]
    num_branches: int
    history: list[int]


@dataclass(frozen=True)
class _Readers:
    """Which rows of the batch read which page. All are numbers: a mask as an index would make the host wait."""

    index: torch.Tensor  # int64 of shape (P, K), rows of the batch, filled up with 0
    hidden: torch.Tensor  # bool of shape (P, 1, K, 1, 1, N), True where a row does not see a token
    positions: torch.Tensor  # int64 of shape (P, N)
    pages: torch.Tensor  # int64 of shape (B, C), the pages of each row, filled up with 0
    columns: torch.Tensor  # int64 of shape (B, C), where the row stands in `index`
    filled_up: torch.Tensor  # bool of shape (B, C, 1, 1, 1, 1)

    @classmethod
    def from_rows(cls, trunk: Trunk, rows: dict[int, list[int]], seen: torch.Tensor) -> "_Readers":
        """Lay out which rows read each rollout, and how many tokens each row has `seen`, shape (B,)."""
        device = seen.device
        readers = [rows.get(rollout, []) for rollout in trunk.rollouts]
        most = max(map(len, readers))
        index = torch.tensor([row + [0] * (most - len(row)) for row in readers], device=device)
        first = torch.tensor(trunk.positions, device=device)[:, None]
        positions = first + torch.arange(trunk.layers[0][0].size(2), device=device)
        hidden = (positions[:, None] < 0) | (positions[:, None] >= seen[index][..., None])

        places: list[list[tuple[int, int]]] = [[] for _ in range(len(seen))]
        for page, page_rows in enumerate(readers):
            for column, row in enumerate(page_rows):
                places[row].append((page, column))
        most = max(map(len, places))
        padded = [row + [(0, 0)] * (most - len(row)) for row in places]
        pages, columns = torch.tensor(padded, device=device).unbind(2)
        filled_up = [[False] * len(row) + [True] * (most - len(row)) for row in places]
        shape = hidden.shape
        return cls(
            index,
            hidden.view(shape[0], 1, shape[1], 1, 1, shape[2]),
            positions,
            pages,
            columns,
            torch.tensor(filled_up, device=device).view(*pages.shape, 1, 1, 1, 1),
        )


@dataclass(frozen=True)
class BranchLayout:
    """
    Attention layout of B branches, for all layers of one forward pass.

    Args:
        trunk ([`Trunk`]):
            The pages.
        readers ([`_Readers`]):
            The branches that read each page.
        tail_starts (`torch.Tensor`):
            int64 of shape (B,), index of a branch's first tail token. Padding stands before it.
        position_ids (`torch.Tensor`):
            int64 of shape (B, S).
    """

    trunk: Trunk
    readers: _Readers
    tail_starts: torch.Tensor
    position_ids: torch.Tensor

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None,
        dropout: float,
        sliding_window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        Compute the attention of one layer.

        Args:
            module (`torch.nn.Module`):
                The attention layer.
            query (`torch.Tensor`):
                Shape (B, H, S, D).
            key, value (`torch.Tensor`):
                Shape (B, F, T, D), the tail. It ends with the S tokens.
            scaling, sliding_window, softcap, sinks:
                As in [`~trl_anytime.modeling.tree_attention.tree_attention_forward`].

        Returns:
            `torch.Tensor`: shape (B, H, S, D).
        """
        assert dropout == 0, "sampling is done without dropout"
        scaling = query.size(-1) ** -0.5 if scaling is None else scaling
        query_BFESD = query.unflatten(1, (key.size(1), -1))
        # Layers with multi-head latent attention cache compressed states, from which they compute keys and values
        expand = getattr(module, "expand_kv", None)

        tail_T = torch.arange(key.size(2), device=key.device)
        query_S1 = tail_T[-query.size(2) :, None]
        hidden_BST = (tail_T > query_S1) | (tail_T < self.tail_starts[:, None, None])
        if sliding_window is not None:
            hidden_BST = hidden_BST | (query_S1 - tail_T >= sliding_window)
        output, mass = _attend(query_BFESD, key, value, hidden_BST[:, None, None], scaling, softcap)
        outputs, masses = [output[:, None]], [mass[:, None]]
        if sinks is not None:  # attends to nothing
            masses.append(sinks.float().view(1, 1, *query_BFESD.shape[1:3], 1, 1).expand_as(masses[0]))
            outputs.append(torch.zeros_like(outputs[0]))

        keys, values = self.trunk.layers[module.layer_idx]
        if expand is not None:
            keys, values = expand(keys, values)
        readers = self.readers
        num_scores = query.size(1) * query.size(2) * readers.hidden[0].numel()
        read = [
            _attend(
                # Keys are read once for all queries: (P, F, K·E·S, D) against (P, F, N, D)
                query_BFESD[readers.index[pages]].transpose(1, 2),
                keys[pages],
                values[pages],
                self._hidden(pages, sliding_window),
                scaling,
                softcap,
            )
            for pages in _slices(len(keys), max(1, MAX_SCORES // num_scores))
        ]
        # Every branch gathers what it got from its pages: (B, C, F, E, S, ·)
        for found, parts in zip((outputs, masses), zip(*read, strict=True), strict=True):
            part = parts[0] if len(parts) == 1 else torch.cat(parts)
            found.append(part.transpose(1, 2)[readers.pages, readers.columns])
        masses[-1] = masses[-1].masked_fill(readers.filled_up, -torch.inf)

        # A part weighs as much as its share of the denominator
        weights = torch.cat(masses, dim=1).softmax(dim=1)
        output = (torch.cat(outputs, dim=1) * weights).sum(dim=1)
        return output.flatten(1, 2).to(query.dtype)

    def _hidden(self, pages: slice, sliding_window: int | None) -> torch.Tensor:
        """Return what readers of these pages do not see, bool that broadcasts to (P, F, K, E, S, N)."""
        hidden = self.readers.hidden[pages]
        if sliding_window is None:
            return hidden
        query_PKS1 = self.position_ids[self.readers.index[pages]][..., None]
        distance = query_PKS1 - self.readers.positions[pages, None, None]
        return hidden | (distance >= sliding_window)[:, None, :, None]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, start + step) for start in range(0, length, step)]


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attend to one part of the keys.

    Args:
        query (`torch.Tensor`):
            Shape (*, Q…, D). The batch dimensions * are those of the keys.
        key, value (`torch.Tensor`):
            Shape (*, N, D).
        hidden (`torch.Tensor`):
            Bool that broadcasts to (*, Q…, N), True where a query does not see a key.

    Returns:
        `tuple`: the output, shape (*, Q…, D), and the log of the softmax's denominator, shape (*, Q…, 1), both in
        float32.
    """
    inner = query.shape[key.dim() - 2 : -1]
    scores = _exact_matmul(query.flatten(key.dim() - 2, -2), key.transpose(-1, -2)).mul_(scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(-2, inner).masked_fill_(hidden, -torch.inf)
    # A query may see nothing here, if its window ends behind the trunk. Its weight must be -inf, not NaN.
    largest = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    # As fused kernels do: weights in the precision of the values, sums in float32
    output = _exact_matmul(weights.flatten(-1 - len(inner), -2).to(value.dtype), value).unflatten(-2, inner)
    return output / total.clamp(min=torch.finfo(torch.float32).tiny), largest + total.log()


def _exact_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """
    Multiply matrices, (*, I, J) and (*, J, L), to float32, also under autocast.

    In half precision, a score of 200 may be off by a half, and its weight by two thirds.
    """
    device = left.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        if left.is_cuda and left.dtype == right.dtype != torch.float32:  # the operator is for GPUs
            product = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
            return product.unflatten(0, left.shape[:-2])
        return left.float() @ right.float()


class BranchRows:
    """Rows of one decoding batch: their tails, and the trunk below them."""

    def __init__(
        self,
        model: torch.nn.Module,
        trunk: Trunk,
        contexts: Sequence[BranchContext],
        max_new_tokens: int | None = None,
    ):
        self.model, self.device = model, trunk.layers[0][0].device
        self.trunk = trunk
        self.contexts = contexts
        self.owners = list(range(len(contexts)))  # the context of each row
        width = max(len(context.token_ids) for context in contexts)
        self.tail = growing_cache(None if max_new_tokens is None else width + max_new_tokens)
        self.starts = torch.tensor([width - len(context.token_ids) for context in contexts], device=self.device)
        self.seen = torch.tensor([context.seen for context in contexts], device=self.device)
        self._read_trunk()
        padded = [[0] * (width - len(context.token_ids)) + context.token_ids for context in contexts]
        self.first_tokens = torch.tensor(padded, device=self.device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Append `token_ids`, shape (B, S), and return the logits of the next token, shape (B, V)."""
        first = self.tail.get_seq_length()
        index = torch.arange(first, first + token_ids.size(1), device=self.device)
        position_ids = (self.seen[:, None] + index - self.starts[:, None]).clamp(min=0)
        with layout_in_use():
            outputs = self.model(
                input_ids=token_ids,
                position_ids=position_ids,
                past_key_values=self.tail,
                use_cache=True,
                logits_to_keep=1,
                tree=BranchLayout(self.trunk, self.readers, self.starts, position_ids),
            )
        return outputs.logits[:, -1]

    def select(self, rows: list[int]) -> None:
        """Continue with these rows only. A row that is named twice becomes two rows."""
        index = torch.tensor(rows, device=self.device)
        self.owners = [self.owners[row] for row in rows]
        self.starts, self.seen = self.starts[index], self.seen[index]
        self.tail.batch_select_indices(index)
        self._read_trunk()

    def _read_trunk(self) -> None:
        rows: dict[int, list[int]] = {}
        for row, owner in enumerate(self.owners):
            rows.setdefault(self.contexts[owner].rollout, []).append(row)
        used = [page for page, rollout in enumerate(self.trunk.rollouts) if rollout in rows]
        if len(used) <= len(self.trunk.rollouts) // 2:  # few enough to be worth a copy
            self.trunk = self.trunk.select(used)
        self.readers = _Readers.from_rows(self.trunk, rows, self.seen)


def decode_branches(
    model: torch.nn.Module,
    trunk: Trunk,
    contexts: Sequence[BranchContext],
    choose: Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor],
    *,
    needs_history: bool,
    eos_token_ids: Collection[int],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """
    Sample the branches of all contexts together.

    Args:
        model (`torch.nn.Module`):
            A model with tree attention (see [`~trl_anytime.modeling.tree_attention.enable_tree_attention`]).
        trunk ([`Trunk`]):
            The trunk of all rollouts.
        contexts (`Sequence[BranchContext]`):
            C contexts.
        choose (`Callable`):
            Function from the tokens so far, shape (B, tokens), and logits, shape (B, V), to the next tokens, shape
            (B,), -1 where the logits are no distribution. Shorter rows are filled up on the left with their own first
            token. So rules that ask which tokens have occurred still hold.
        needs_history (`bool`):
            Whether `choose` looks at the tokens so far. If not, it gets `None` for them.
        eos_token_ids (`Collection[int]`):
            Tokens that end a branch. They are part of it.
        max_new_tokens (`int`):
            Most tokens sampled for a branch.

    Returns:
        `list[list[list[int]]]`: for each context, the token ids of its branches.

    Raises:
        `FloatingPointError`: If the logits of a row are no distribution.
    """
    rows = BranchRows(model, trunk, contexts, max_new_tokens)
    logits = rows.forward(rows.first_tokens)
    rows.select([c for c, context in enumerate(contexts) for _ in range(context.num_branches)])
    slots = torch.arange(len(rows.owners), device=rows.device)  # where the tokens of each row are written
    logits = logits[torch.tensor(rows.owners, device=rows.device)]

    history = None
    if needs_history:
        longest = max(len(context.history) for context in contexts)
        histories = [[c.history[0]] * (longest - len(c.history)) + c.history for c in contexts]
        history = torch.tensor(histories, device=rows.device)[torch.tensor(rows.owners, device=rows.device)]
    eos = torch.tensor(list(eos_token_ids), device=rows.device)
    sampled = torch.zeros(len(slots), max_new_tokens, dtype=torch.long, device=rows.device)
    lengths = torch.full_like(slots, max_new_tokens)
    finished = torch.zeros_like(slots, dtype=torch.bool)
    for step in range(max_new_tokens):
        so_far = None if history is None else torch.cat([history[slots], sampled[slots, :step]], dim=1)
        tokens = choose(so_far, logits)
        sampled[slots, step] = tokens
        ends = torch.isin(tokens, eos) & ~finished
        lengths[slots] = torch.where(ends, step + 1, lengths[slots])
        finished = finished | ends
        # The one wait for the device of a token
        num_finished, num_broken = torch.stack([finished.sum(), (tokens < 0).sum()]).tolist()
        refuse_broken_logits(num_broken, len(tokens), "answers")
        if num_finished == len(finished) or step + 1 == max_new_tokens:
            break
        if num_finished > _FINISHED_SHARE * len(finished):
            live = (~finished).nonzero()[:, 0]
            rows.select(live.tolist())
            slots, tokens, finished = slots[live], tokens[live], finished[live]
        logits = rows.forward(tokens[:, None])

    branches = iter([row[:length] for row, length in zip(sampled.tolist(), lengths.tolist(), strict=True)])
    return [[next(branches) for _ in range(context.num_branches)] for context in contexts]


def refuse_broken_logits(num_broken: int, num_rows: int, what: str) -> None:
    """
    Refuse logits that are no distribution.

    Args:
        num_broken (`int`):
            Rows for which -1 was chosen in place of a token.
        num_rows (`int`):
            All rows.
        what (`str`):
            What is sampled, for the message.

    Raises:
        `FloatingPointError`: If there are such rows.
    """
    if num_broken:
        raise FloatingPointError(
            f"The model's logits are NaN or infinite for {num_broken} of {num_rows} {what} that are sampled. Check "
            "the weights: a learning rate that is too high or float16 are common causes."
        )
