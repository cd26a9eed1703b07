"""
Decoding of a trace's branches on top of its keys and values. m·A summaries cost little more than their own tokens.

The keys and values of prompt and thinking (the trunk) are neither repeated nor recomputed. Branches are the rows of an
ordinary decoding batch, with a small cache of their own (the tail). Attention takes one softmax over both parts. It
reads each trunk once for all branches that leave it.

Dimensions: B branches, S tokens of each in one forward pass, T tail tokens, R trunks, N trunk tokens, K branches of
one trunk, H heads, F key heads, E = H / F heads that share one, D head size, V words.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from transformers import Cache

from .growing_cache import growing_cache
from .tree_attention import layout_in_use

# Most scores held at once while trunks are read: 1 GiB in float32
_MAX_SCORES = 2**28
# Finished rows are dropped once they are this share of all rows, because moving the others costs about a step
_FINISHED_SHARE = 0.1


@dataclass(frozen=True)
class Trunk:
    """
    Keys and values of R prompts with their thinking.

    Args:
        layers (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Keys and values of each layer, shape (R, F, N, D).
        starts (`torch.Tensor`):
            int64 of shape (R,), index of the first token. Padding stands before it.
        rollouts (`list[int]`):
            R indices of the rollouts that the rows belong to.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    starts: torch.Tensor
    rollouts: list[int]

    @classmethod
    def from_cache(cls, cache: Cache, starts: torch.Tensor, rollouts: list[int]) -> "Trunk":
        """Return the trunk that a cache holds. Arguments as for the class."""
        layers = cast(list[Any], cache.layers)
        return cls([(layer.keys, layer.values) for layer in layers], starts, rollouts)

    def select(self, rows: list[int]) -> "Trunk":
        """Return the trunk with only these rows."""
        index = torch.tensor(rows, device=self.starts.device)
        layers = [(keys[index], values[index]) for keys, values in self.layers]
        return Trunk(layers, self.starts[index], [self.rollouts[row] for row in rows])


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
class _TrunkReaders:
    """A trunk with the branches that leave it."""

    trunk: Trunk
    index: torch.Tensor  # int64 of shape (R, K), rows of the batch, filled up with 0
    # The places of `index` that are not filled up, as numbers: a mask would make the host wait for a GPU at each use
    trunk_rows: torch.Tensor  # int64 of shape (B',), ascending
    columns: torch.Tensor  # int64 of shape (B',)
    branches: torch.Tensor  # int64 of shape (B',), what stands there
    ends: list[int]  # R + 1 numbers: the places of trunk r are those from ends[r] to ends[r + 1]
    sees: torch.Tensor  # bool of shape (R, K, N)

    @classmethod
    def from_rows(cls, trunk: Trunk, rows: list[list[int]], seen: torch.Tensor) -> "_TrunkReaders":
        """Lay out which rows of the batch read each of R trunks, and how many tokens each row has `seen`."""
        device = seen.device
        most = max(map(len, rows))
        index = torch.tensor([branches + [0] * (most - len(branches)) for branches in rows], device=device)
        places = [(r, k, branch) for r, branches in enumerate(rows) for k, branch in enumerate(branches)]
        trunk_rows, columns, branches = torch.tensor(places, device=device).unbind(1)
        key = torch.arange(trunk.layers[0][0].size(2), device=device)
        start = trunk.starts[:, None, None]
        sees = (key >= start) & (key < start + seen[index][..., None])
        return cls(trunk, index, trunk_rows, columns, branches, [0, *accumulate(map(len, rows))], sees)


@dataclass(frozen=True)
class BranchLayout:
    """
    Attention layout of B branches, for all layers of one forward pass.

    Args:
        readers (`list[_TrunkReaders]`):
            The trunks, each with the branches that read it.
        tail_starts (`torch.Tensor`):
            int64 of shape (B,), index of a branch's first tail token. Padding stands before it.
        position_ids (`torch.Tensor`):
            int64 of shape (B, S).
    """

    readers: list[_TrunkReaders]
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
        sees_BST = (tail_T <= query_S1) & (tail_T >= self.tail_starts[:, None, None])
        if sliding_window is not None:
            sees_BST = sees_BST & (query_S1 - tail_T < sliding_window)
        output, mass = _attend(query_BFESD, key, value, sees_BST[:, None, None], scaling, softcap)
        if sinks is not None:
            sink_mass = sinks.float().view(1, *query_BFESD.shape[1:3], 1, 1)
            total = torch.logaddexp(mass, sink_mass)
            output, mass = output * (mass - total).exp(), total

        for readers in self.readers:
            keys, values = readers.trunk.layers[module.layer_idx]
            if expand is not None:
                keys, values = expand(keys, values)
            num_rows = max(1, _MAX_SCORES // (query.size(1) * query.size(2) * readers.sees[0].numel()))
            for start in range(0, len(keys), num_rows):
                rows = slice(start, start + num_rows)
                index, sees_RKSN = readers.index[rows], readers.sees[rows, :, None]
                if sliding_window is not None:
                    key_positions = torch.arange(keys.size(2), device=keys.device) - readers.trunk.starts[rows, None]
                    distance = self.position_ids[index][..., None] - key_positions[:, None, None]
                    sees_RKSN = sees_RKSN & (distance < sliding_window)
                # Keys are read once for all queries: (R, F, K·E·S, D) against (R, F, N, D)
                part = query_BFESD[index].transpose(1, 2)
                part_output, part_mass = _attend(
                    part, keys[rows], values[rows], sees_RKSN[:, None, :, None], scaling, softcap
                )
                places = slice(readers.ends[start], readers.ends[min(start + num_rows, len(keys))])
                branch = readers.branches[places]
                place = readers.trunk_rows[places] - start, readers.columns[places]
                part_output, part_mass = part_output.transpose(1, 2)[place], part_mass.transpose(1, 2)[place]
                total = torch.logaddexp(mass[branch], part_mass)
                output[branch] = (
                    output[branch] * (mass[branch] - total).exp() + part_output * (part_mass - total).exp()
                )
                mass[branch] = total
        return output.flatten(1, 2).to(query.dtype)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sees: torch.Tensor,
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
        sees (`torch.Tensor`):
            Bool that broadcasts to (*, Q…, N), True where a query sees a key.

    Returns:
        `tuple`: the output, shape (*, Q…, D), and the log of the softmax's denominator, shape (*, Q…, 1), both in
        float32.
    """
    inner = query.shape[key.dim() - 2 : -1]
    flat = query.flatten(key.dim() - 2, -2)
    scores = (flat @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(-2, inner).masked_fill_(~sees, -torch.inf)
    # A query may see nothing here, if its window ends behind the trunk. Its weight must be -inf, not NaN.
    largest = scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    output = (weights.flatten(-1 - len(inner), -2).to(value.dtype) @ value).float().unflatten(-2, inner)
    return output / total.clamp(min=torch.finfo(torch.float32).tiny), largest + total.log()


class BranchRows:
    """Rows of one decoding batch: their tails, and the trunks below them."""

    def __init__(self, model: torch.nn.Module, trunks: Sequence[Trunk], contexts: Sequence[BranchContext]):
        self.model, self.device = model, trunks[0].starts.device
        self.trunks = list(trunks)
        self.contexts = contexts
        self.owners = list(range(len(contexts)))  # the context of each row
        self.tail = growing_cache()
        width = max(len(context.token_ids) for context in contexts)
        self.starts = torch.tensor([width - len(context.token_ids) for context in contexts], device=self.device)
        self.seen = torch.tensor([context.seen for context in contexts], device=self.device)
        self._read_trunks()
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
                tree=BranchLayout(self.readers, self.starts, position_ids),
            )
        return outputs.logits[:, -1]

    def select(self, rows: list[int]) -> None:
        """Continue with these rows only. A row that is named twice becomes two rows."""
        index = torch.tensor(rows, device=self.device)
        self.owners = [self.owners[row] for row in rows]
        self.starts, self.seen = self.starts[index], self.seen[index]
        self.tail.batch_select_indices(index)
        self._read_trunks()

    def _read_trunks(self) -> None:
        in_rollout: dict[int, list[int]] = {}
        for row, owner in enumerate(self.owners):
            in_rollout.setdefault(self.contexts[owner].rollout, []).append(row)
        self.readers = []
        trunks, self.trunks = self.trunks, []
        for trunk in trunks:
            used = [row for row, rollout in enumerate(trunk.rollouts) if rollout in in_rollout]
            if not used:
                continue
            if len(used) <= len(trunk.rollouts) // 2:  # few enough to be worth a copy
                trunk = trunk.select(used)
            branches = [in_rollout.get(rollout, []) for rollout in trunk.rollouts]
            self.readers.append(_TrunkReaders.from_rows(trunk, branches, self.seen))
            self.trunks.append(trunk)


def decode_branches(
    model: torch.nn.Module,
    trunks: Sequence[Trunk],
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
        trunks (`Sequence[Trunk]`):
            The trunks of all rollouts.
        contexts (`Sequence[BranchContext]`):
            C contexts.
        choose (`Callable`):
            Function from the tokens so far, shape (B, tokens), and logits, shape (B, V), to the next tokens, shape
            (B,). Shorter rows are filled up on the left with their own first token. So rules that ask which tokens
            have occurred still hold.
        needs_history (`bool`):
            Whether `choose` looks at the tokens so far. If not, it gets `None` for them.
        eos_token_ids (`Collection[int]`):
            Tokens that end a branch. They are part of it.
        max_new_tokens (`int`):
            Most tokens sampled for a branch.

    Returns:
        `list[list[list[int]]]`: for each context, the token ids of its branches.
    """
    rows = BranchRows(model, trunks, contexts)
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
        num_finished = int(finished.sum())  # the one wait for the device of a token
        if num_finished == len(finished) or step + 1 == max_new_tokens:
            break
        if num_finished > _FINISHED_SHARE * len(finished):
            live = (~finished).nonzero()[:, 0]
            rows.select(live.tolist())
            slots, tokens, finished = slots[live], tokens[live], finished[live]
        logits = rows.forward(tokens[:, None])

    branches = iter([row[:length] for row, length in zip(sampled.tolist(), lengths.tolist(), strict=True)])
    return [[next(branches) for _ in range(context.num_branches)] for context in contexts]
