"""
The definition of a packed rollout, computed the plain way: one row for the thinking and one for each branch.

Tree attention is checked against it. Models without tree attention are trained with it.
"""

from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..method.packing import PackedRollouts


def forward_rows(
    model: torch.nn.Module,
    packed: PackedRollouts,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    **kwargs: Any,
) -> Any:
    """
    Compute the log-probabilities of packed rows from separate rows.

    This is a drop-in replacement of [`~trl_anytime.modeling.tree_attention.forward_packed`].

    Args:
        model (`torch.nn.Module`):
            A model with TRL's fused LM head, wrapped or not.
        packed ([`PackedRollouts`]):
            The R rollouts that stand in the last T columns of `input_ids`.
        input_ids (`torch.Tensor`):
            int64 of shape (R, L).
        attention_mask (`torch.Tensor`):
            int64 of shape (R, L), 0 on padding.
        labels (`torch.Tensor`):
            int64 of shape (R, L). Only tokens that the policy sampled keep their label.

    Returns:
        The model's output, with `log_probs` and `entropy` of shape (R, L - 1) aligned with `input_ids`. Its `aux_loss`
        counts each token once per row that contains it.
    """
    num_tokens = input_ids.size(1)
    prompt_width = num_tokens - packed.token_ids.size(1)
    rollouts, sources, sampled = [], [], []
    for i, (thinking_length, spans) in enumerate(zip(packed.thinking_lengths.tolist(), packed.spans, strict=True)):
        prompt = attention_mask[i, :prompt_width].nonzero()[:, 0]
        index = torch.arange(prompt_width, num_tokens, device=input_ids.device)
        rows = [(index[:thinking_length], len(prompt))]
        for cut, at_budget in zip(packed.cuts[i].tolist(), spans.tolist(), strict=True):
            for start, summary_start, end in at_budget:
                if start == end:  # the branch was left out
                    continue
                first_sampled = len(prompt) + cut + summary_start - start
                rows.append((torch.cat([index[:cut], index[start:end]]), first_sampled))
        for tokens, first_sampled in rows:
            source = torch.cat([prompt, tokens])
            rollouts.append(i)
            sources.append(source)
            sampled.append(torch.arange(len(source), device=source.device) >= first_sampled)

    rollout_N1 = torch.tensor(rollouts, device=input_ids.device)[:, None]
    source_NL = pad_sequence(sources, batch_first=True, padding_value=-1)
    sampled_NL = pad_sequence(sampled, batch_first=True, padding_value=False)
    real_NL = source_NL >= 0
    taken = rollout_N1, source_NL.clamp(min=0)
    row_labels = labels[taken].masked_fill(~sampled_NL, -100)
    outputs = model(
        input_ids=input_ids[taken].masked_fill(~real_NL, 0), attention_mask=real_NL.long(), labels=row_labels, **kwargs
    )

    # Each sampled token is scored in exactly one row. Its log-probability goes back to the token's place.
    scored = row_labels[:, 1:] != -100
    target = rollout_N1.expand_as(scored)[scored], source_NL[:, 1:][scored] - 1
    for name in ("log_probs", "entropy"):
        field = getattr(outputs, name, None)
        if field is not None:
            outputs[name] = field.new_zeros(len(packed.cuts), num_tokens - 1).index_put(target, field[scored])
    return outputs
