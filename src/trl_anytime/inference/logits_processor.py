"""Logits processor for a thinking budget inside plain `generate()`."""

from collections.abc import Sequence
from typing import cast

import torch
from transformers import LogitsProcessor

from ..method.budgets import check_budgets
from .anytime_config import AnytimeConfig


class ThinkingBudgetLogitsProcessor(LogitsProcessor):
    """
    Logits processor that enforces a thinking budget in plain `generate()`, with the bridges of the training.

    Truncation bridge and answer bridge close a trace that reaches the budget. The answer bridge follows a trace that
    ends before. EOS ends an answer that reaches its limit. The processor decides each step from the tokens so far.
    So rows may be at different points, and sampling, streaming and beam search work unchanged.

    Args:
        config ([`AnytimeConfig`]):
            Markers and bridges, and the limit of an answer.
        budgets (`int` or `Sequence[int]`):
            Budget in thinking tokens, one for all rows or one for each.
        prompt_length (`int`):
            Columns of `input_ids`, including padding on the left.

    Attributes:
        max_new_tokens (`int`):
            Value to pass to `generate()`. With less, it may stop before this processor ends the answer.

    Raises:
        `ValueError`: If a budget is not a positive int.

    Example:

    ```python
    >>> config = AnytimeConfig.from_pretrained(model_id)
    >>> inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    >>> processor = ThinkingBudgetLogitsProcessor(config, budgets=1000, prompt_length=inputs.input_ids.size(1))
    >>> model.generate(**inputs, logits_processor=[processor], max_new_tokens=processor.max_new_tokens)
    ```
    """

    def __init__(self, config: AnytimeConfig, budgets: int | Sequence[int], prompt_length: int):
        self.budgets = [budgets] if isinstance(budgets, int) else list(budgets)
        for budget in self.budgets:
            check_budgets([budget])
        markers = config.markers
        self.prompt_length = prompt_length
        self._config = config
        self._after_end = torch.tensor(markers.answer_bridge_ids)
        self._after_cut = torch.tensor(markers.truncation_bridge_ids + markers.answer_bridge_ids)
        self.max_new_tokens = max(self.budgets) + markers.max_bridge_length + config.max_summary_length + 1  # EOS

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores, (B, V), in which rows with a forced token allow only that token."""
        forced_B = self.forced(input_ids[:, self.prompt_length :])
        rows = (forced_B >= 0).nonzero()[:, 0]
        forced_scores = torch.full_like(scores[rows], -torch.inf).scatter_(1, forced_B[rows, None], 0.0)
        return cast(torch.FloatTensor, scores.index_copy(0, rows, forced_scores))

    def forced(self, generated: torch.Tensor) -> torch.Tensor:
        """
        Return the tokens that must come next.

        Args:
            generated (`torch.Tensor`):
                int64 of shape (B, T), the tokens after the prompt.

        Returns:
            `torch.Tensor`: int64 of shape (B,), -1 where the model is free.
        """
        device, (num_rows, length) = generated.device, generated.shape
        # The same number of rows for each prompt, with several sequences or beams
        budget_B = torch.tensor(self.budgets, device=device).repeat_interleave(num_rows // len(self.budgets))
        end_B = self._ends(generated)
        finished_B = end_B <= budget_B
        cut_B = torch.where(finished_B, end_B, budget_B)
        step_B = length - cut_B  # tokens since the trace
        forced_B = torch.full_like(step_B, -1)
        for rows_B, bridge in ((finished_B, self._after_end), (~finished_B, self._after_cut)):
            in_bridge_B = rows_B & (step_B >= 0) & (step_B < len(bridge))
            forced_B[in_bridge_B] = bridge.to(device)[step_B[in_bridge_B]]
            over_B = rows_B & (step_B >= len(bridge) + self._config.max_summary_length)
            forced_B[over_B] = self._config.eos_token_ids[0]
        return forced_B

    def _ends(self, generated: torch.Tensor) -> torch.Tensor:
        """Count the tokens up to and including the first end of thinking, (B,). Without one it is huge."""
        markers, never = self._config.markers, torch.iinfo(torch.long).max
        if markers.in_text or not generated.size(1):
            ends = [markers.end_of_thinking(row) for row in generated.tolist()]
            return torch.tensor([never if end is None else end for end in ends], device=generated.device)
        found = generated == markers.think_end_ids[0]
        return torch.where(found.any(dim=1), found.int().argmax(dim=1) + 1, never)
