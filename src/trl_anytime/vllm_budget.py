"""
Thinking budgets inside vLLM, exact to the token: a logits processor for its engine and its server.

    vllm serve MODEL --logits-processors trl_anytime.vllm_budget:VLLMThinkingBudget

A request asks for a budget by `"vllm_xargs": {"thinking_budget": 1000}`, and `SamplingParams` by
`extra_args={"thinking_budget": 1000}`. vLLM's own `thinking_token_budget` does less: it puts no answer bridge behind a
trace that ended by itself. Its sampler (0.31) also overlooks such an end if the text that it forces is more than the
end marker, and then forces that text in the middle of the answer.
"""

from typing import Any

import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .inference.anytime_config import AnytimeConfig
from .rollout.markers import EndScan

BUDGET_FIELD = "thinking_budget"


class VLLMThinkingBudget(AdapterLogitsProcessor):
    """
    Holds requests that ask for a thinking budget to it, as [`ThinkingBudgetLogitsProcessor`] does in `generate()`.

    Markers and bridges are those of [`AnytimeConfig.from_pretrained`].
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
        self._anytime_config = AnytimeConfig.from_pretrained(model.model, tokenizer)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what is not a budget."""
        budget = (sampling_params.extra_args or {}).get(BUDGET_FIELD)
        if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
            raise ValueError(f"`{BUDGET_FIELD}` must be a positive int (thinking tokens), got {budget!r}.")

    def is_argmax_invariant(self) -> bool:
        """Return `False`, because it forces tokens."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> "_Budget | None":
        """Return the processor of a request that asks for a budget, else `None`."""
        budget = (params.extra_args or {}).get(BUDGET_FIELD)
        return None if budget is None else _Budget(self._anytime_config, budget)


class _Budget:
    """Holds one request to its budget."""

    def __init__(self, config: AnytimeConfig, budget: int):
        self._config, self._budget = config, budget
        self._cut: int | None = None  # thinking tokens, once that is certain
        self._bridge: tuple[int, ...] = ()
        self._scan = EndScan(config.markers)

    def __call__(self, token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
        """Return logits, (V,), that leave only the forced token if there is one."""
        forced = self._forced(token_ids)
        if forced is None:
            return logits
        only = torch.full_like(logits, -torch.inf)
        only[forced] = 0.0
        return only

    def _forced(self, token_ids: list[int]) -> int | None:
        markers = self._config.markers
        if self._cut is None:
            within = token_ids if len(token_ids) <= self._budget else token_ids[: self._budget]
            end = self._scan.end_of_thinking(within)
            if end is not None:
                self._cut, self._bridge = end, markers.answer_bridge_ids
            elif len(token_ids) >= self._budget:
                self._cut, self._bridge = self._budget, markers.truncation_bridge_ids + markers.answer_bridge_ids
            else:
                return None
        step = len(token_ids) - self._cut
        if step < len(self._bridge):
            return self._bridge[step]
        is_over = step >= len(self._bridge) + self._config.max_summary_length
        return self._config.eos_token_ids[0] if is_over else None
