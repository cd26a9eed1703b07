"""
Packed rollouts: one row holds the thinking, then every summary as a branch that leaves the thinking at its cut.

Dimensions: R rollouts, M budgets, A summaries per budget, T packed tokens (the longest rollout of the batch).

The drawing shows a rollout with thinking z1 … z4 that is cut after 2 and after 4 tokens (budgets 2 and 4). It has two
summaries at each cut. b are bridge tokens (inserted), s are summary tokens (sampled). The prompt stands before the
row, and every token sees it.

```txt
index        0  1  2  3 | 4  5 | 6  7  8 | 9 10 |11 12
token       z1 z2 z3 z4 | b  s | b  s  s | b  s | b  s
position     0  1  2  3 | 2  3 | 2  3  4 | 4  5 | 4  5   after the prompt; restarts at the cut
trained      1  1  1  1 | 0  1 | 0  1  1 | 0  1 | 0  1
sees z1 z2   .  .  x  x | x  x | x  x  x | x  x | x  x   as well as the earlier tokens of its own branch, and itself
sees z3 z4   .  .  .  . | .  . | .  .  . | x  x | x  x
```
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedRollouts:
    """
    R packed rollouts: [thinking][branch 1] … [branch M·A]. A branch is a bridge and a summary. Branches are ordered by
    budget.

    All coordinates count tokens from the first thinking token.

    Args:
        token_ids (`torch.Tensor`):
            int64 of shape (R, T), right-padded.
        cuts (`torch.Tensor`):
            int64 of shape (R, M), the thinking tokens that the branches of each budget see.
        spans (`torch.Tensor`):
            int64 of shape (R, M, A, 3): start of the bridge, start of the summary, end of the summary. A bridge has at
            least one token. So the left neighbour of every trained token is also its predecessor. A branch that
            [`~PackedRollouts.prune`] has left out has no tokens.
    """

    token_ids: torch.Tensor
    cuts: torch.Tensor
    spans: torch.Tensor

    @classmethod
    def pack(
        cls,
        traces: Sequence[Sequence[int]],
        cuts: Sequence[Sequence[int]],
        bridges: Sequence[Sequence[Sequence[int]]],
        summaries: Sequence[Sequence[Sequence[Sequence[int]]]],
        pad_token_id: int = 0,
    ) -> "PackedRollouts":
        """
        Pack rollouts that are given as token ids.

        Args:
            traces (`Sequence[Sequence[int]]`):
                R traces.
            cuts (`Sequence[Sequence[int]]`):
                R × M cuts in tokens, c_1 ≤ … ≤ c_M ≤ |z|.
            bridges (`Sequence[Sequence[Sequence[int]]]`):
                R × M bridges.
            summaries (`Sequence[Sequence[Sequence[Sequence[int]]]]`):
                R × M × A summaries.
            pad_token_id (`int`, *optional*, defaults to `0`):
                Token that fills up the shorter rollouts on the right.

        Returns:
            [`PackedRollouts`]: the R rollouts, with T tokens each.
        """
        rows, spans = [], []
        for thinking, row_bridges, row_summaries in zip(traces, bridges, summaries, strict=True):
            row, row_spans = list(thinking), []
            for bridge, budget_summaries in zip(row_bridges, row_summaries, strict=True):
                assert len(bridge) > 0, "a bridge has at least one token"
                for summary in budget_summaries:
                    start = len(row)
                    row.extend(bridge)
                    row.extend(summary)
                    row_spans.append((start, start + len(bridge), len(row)))
            rows.append(torch.tensor(row))
            spans.append(row_spans)
        token_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        cuts_RM = torch.tensor(cuts)
        return cls(token_ids, cuts_RM, torch.tensor(spans).view(*cuts_RM.shape, -1, 3))

    def __getitem__(self, rows: slice | torch.Tensor) -> "PackedRollouts":
        return PackedRollouts(self.token_ids[rows], self.cuts[rows], self.spans[rows])

    @property
    def thinking_lengths(self) -> torch.Tensor:
        """Return |z| in tokens, shape (R,)."""
        return self.spans[:, 0, 0, 0]

    @property
    def lengths(self) -> torch.Tensor:
        """Return the number of packed tokens, shape (R,)."""
        return self.spans[:, -1, -1, 2]

    def indices(self) -> torch.Tensor:
        """Return the index of each token, shape (R, T)."""
        return torch.arange(self.token_ids.size(1), device=self.token_ids.device).expand_as(self.token_ids)

    def branches(self) -> torch.Tensor:
        """
        Return the branch j·A + a of each token, int64 of shape (R, T).

        Thinking has -1. Padding counts to the last branch.
        """
        starts = self.spans[..., 0].flatten(1).contiguous()
        return torch.searchsorted(starts, self.indices().contiguous(), right=True) - 1

    def positions(self) -> torch.Tensor:
        """Return the position of each token after the prompt, shape (R, T). A branch goes on from its cut."""
        branch_RT = self.branches()
        num_summaries = self.spans.size(2)
        cut_RT = self.cuts.gather(1, branch_RT.clamp(min=0) // num_summaries)
        start_RT = self.spans[..., 0].flatten(1).gather(1, branch_RT.clamp(min=0))
        return torch.where(branch_RT < 0, self.indices(), cut_RT + self.indices() - start_RT)

    def trained(self) -> torch.Tensor:
        """
        Return a mask of the tokens that the policy sampled, bool of shape (R, T).

        True for thinking and summaries, False for bridges and padding.
        """
        branch_RT = self.branches()
        summary_start_RT = self.spans[..., 1].flatten(1).gather(1, branch_RT.clamp(min=0))
        sampled_RT = (branch_RT < 0) | (self.indices() >= summary_start_RT)
        return sampled_RT & (self.indices() < self.lengths[:, None])

    def summary_lengths(self) -> torch.Tensor:
        """Return the tokens of each summary, its bridge left out, shape (R, M, A)."""
        return self.spans[..., 2] - self.spans[..., 1]

    def summary_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` of shape (R, T) over the tokens of each summary, to shape (R, M, A)."""
        summary_RT = (self.branches() + 1).masked_fill(~self.trained(), 0)  # 0 for all that is no summary
        sums = values.new_zeros(len(values), self.spans[0, ..., 0].numel() + 1)
        return sums.scatter_add(1, summary_RT, values)[:, 1:].view(self.spans.shape[:3])

    def visible(self) -> torch.Tensor:
        """
        Return what each token may see, as a dense mask for tests and drawings. Training never builds it.

        Returns:
            `torch.Tensor`: bool of shape (R, T, T), True where query token t sees key token s.
        """
        index_RT, branch_RT = self.indices(), self.branches()
        query, key = index_RT[:, :, None], index_RT[:, None, :]
        cut_RT = self.cuts.gather(1, branch_RT.clamp(min=0) // self.spans.size(2))
        limit_RT = torch.where(branch_RT < 0, index_RT + 1, cut_RT)  # a token sees the thinking below this index
        sees_thinking = (branch_RT[:, None, :] < 0) & (key < limit_RT[:, :, None])
        sees_own_branch = (branch_RT[:, :, None] == branch_RT[:, None, :]) & (key <= query)
        real_RT = index_RT < self.lengths[:, None]
        return (sees_thinking | sees_own_branch) & real_RT[:, None, :] & real_RT[:, :, None]

    def prune(self, advantages: torch.Tensor) -> tuple["PackedRollouts", torch.Tensor]:
        """
        Leave out tokens that the gradient does not need.

        A branch is kept if any of its tokens has an advantage. The thinking is kept up to its last token with an
        advantage, and up to the last cut of a kept branch. A branch that is left out has no tokens.

        Args:
            advantages (`torch.Tensor`):
                Shape (R, T), per token.

        Returns:
            `tuple`: the remaining rows with T' tokens, at least one each, and where each of their tokens stood. The
            latter is int64 of shape (R, T'), -1 for padding.
        """
        index_RT, branch_RT = self.indices(), self.branches()
        real_RT = index_RT < self.lengths[:, None]
        needed_RT = (advantages != 0) & real_RT
        num_branches = self.spans[0, ..., 0].numel()
        # Column 0 is for the thinking, whose branch is -1
        live = torch.zeros(len(branch_RT), num_branches + 1, device=branch_RT.device)
        live_RB = live.scatter_add(1, branch_RT + 1, needed_RT.to(live))[:, 1:] > 0
        thinking_RT = branch_RT < 0
        cuts_RB = self.cuts.repeat_interleave(self.spans.size(2), dim=1)
        last_R = torch.where(needed_RT & thinking_RT, index_RT + 1, 0).amax(1)
        length_R = torch.maximum(last_R, torch.where(live_RB, cuts_RB, 0).amax(1))
        # A row keeps at least one token, because a forward pass needs one
        empty_R = (length_R == 0) & ~live_RB.any(1)
        length_R = torch.where(empty_R, self.thinking_lengths.clamp(max=1), length_R)
        live_RB[:, 0] |= empty_R & (self.thinking_lengths == 0)

        in_live_branch_RT = live_RB.gather(1, branch_RT.clamp(min=0)) & real_RT
        kept_RT = torch.where(thinking_RT, index_RT < length_R[:, None], in_live_branch_RT)
        before_RT = torch.nn.functional.pad(kept_RT.cumsum(1), (1, 0))  # kept tokens before each place
        spans = before_RT.gather(1, self.spans.flatten(1)).view_as(self.spans)
        order_RT = (~kept_RT).int().argsort(dim=1, stable=True)[:, : int(kept_RT.sum(1).amax())]
        source_RT = order_RT.masked_fill(~kept_RT.gather(1, order_RT), -1)
        token_ids = self.token_ids.gather(1, order_RT).masked_fill(source_RT < 0, 0)
        return PackedRollouts(token_ids, torch.minimum(self.cuts, length_R[:, None]), spans), source_RT

    def token_advantages(self, thinking: torch.Tensor, summary: torch.Tensor, budgets: Sequence[int]) -> torch.Tensor:
        """
        Spread advantages over the tokens that they train.

        Args:
            thinking (`torch.Tensor`):
                Shape (R, M), one advantage per thinking segment b_{j-1} < t ≤ b_j.
            summary (`torch.Tensor`):
                Shape (R, M, A), one advantage per summary.
            budgets (`Sequence[int]`):
                Thinking budgets b_1 < … < b_m in tokens.

        Returns:
            `torch.Tensor`: shape (R, T), 0 on bridges and padding.
        """
        branch_RT = self.branches()
        limits = torch.tensor(list(budgets), device=branch_RT.device)
        segment_RT = torch.searchsorted(limits, self.indices().contiguous(), right=True).clamp(max=len(budgets) - 1)
        summary_values = summary.flatten(1).gather(1, branch_RT.clamp(min=0))
        thinking_values = thinking.gather(1, segment_RT)
        return torch.where(branch_RT < 0, thinking_values, summary_values) * self.trained()
