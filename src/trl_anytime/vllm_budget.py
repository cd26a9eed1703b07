"""
Logits processor for thinking budgets inside vLLM's engine and server, exact to the token.

    vllm serve MODEL --logits-processors trl_anytime.vllm_budget:VLLMThinkingBudget

A request names its budget by `"vllm_xargs": {"thinking_budget": 1000}`. With `SamplingParams` it is
`extra_args={"thinking_budget": 1000}`. 0 means no thinking, and -1 leaves the request as it is.

A request without a budget gets the largest budget of the model's training. To set another default, -1 included, start
the engine with `--additional-config '{"thinking_budget": 500}'`. If `max_tokens` leaves too little room for an answer,
the default is lowered.

vLLM's own `thinking_token_budget` does less. It does not add the answer bridge after a trace that ended by itself. Its
sampler (0.31) also misses such an end if the text that it forces is more than the end marker. It then forces that text
in the middle of the answer.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from .inference.anytime_config import AnytimeConfig
from .rollout.encoding import encode
from .rollout.markers import EndScan, render_prompt
from .rollout.sampling import BUDGET_FIELD, NO_BUDGET

_Processor = Callable[..., torch.Tensor]  # takes tokens so far and logits, and the prompt before them if asked


class VLLMThinkingBudget(AdapterLogitsProcessor):
    """
    Logits processor that enforces a thinking budget, as [`ThinkingBudgetLogitsProcessor`] does in `generate()`.

    A request names its budget in the field `thinking_budget` of `vllm_xargs` (server) or `extra_args` (engine). 0
    means no thinking, and -1 leaves the request as it is. The default is the last budget of the anytime config, or the
    field `thinking_budget` of the engine's `additional_config`. It applies only where the prompt ends as the chat
    template ends it. It is lowered if `max_tokens` leaves too little room for an answer.

    Markers and bridges come from [`AnytimeConfig.from_pretrained`] for the tokenizer's folder. If an adapter is
    served, that is the adapter's folder. If it has no config, the model's is used.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        super().__init__(vllm_config, device, is_pin_memory)
        model = vllm_config.model_config
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
        folder = model.tokenizer
        try:
            AnytimeConfig.from_pretrained(folder)
        except FileNotFoundError:
            folder = model.model
        self._anytime_config = config = AnytimeConfig.from_pretrained(folder, tokenizer)
        additional = vllm_config.additional_config
        default = additional.get(BUDGET_FIELD) if isinstance(additional, dict) else None
        self._default = config.budgets[-1] if default is None else _checked(default)
        question = config.question(tokenizer, "?")
        _, opening = render_prompt(tokenizer, question, config.chat_template_kwargs)
        self._opening = encode(tokenizer, opening) if opening else []

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a value that is not a budget."""
        budget = (sampling_params.extra_args or {}).get(BUDGET_FIELD)
        if budget is not None:
            _checked(budget)

    def is_argmax_invariant(self) -> bool:
        """Return `False`, because it forces tokens."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> _Processor | None:
        """Return the processor of a request, or `None` if it has no budget."""
        config = self._anytime_config
        asked = (params.extra_args or {}).get(BUDGET_FIELD)
        budget = self._default if asked is None else asked
        if budget == NO_BUDGET:
            return None
        if asked is not None:
            return _Budget(config, budget)
        if params.max_tokens is not None:  # a server limits it to the room in the context
            around = config.markers.max_bridge_length + config.max_summary_length + 1  # and EOS
            budget = min(budget, max(params.max_tokens - around, 0))
        limit, opening = _Budget(config, budget), self._opening

        def limit_thinking(prompt_ids: list[int], token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            is_chat = list(prompt_ids[len(prompt_ids) - len(opening) :]) == opening
            return limit(token_ids, logits) if is_chat else logits

        return limit_thinking


def _checked(budget: Any) -> int:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < NO_BUDGET:
        raise ValueError(
            f"`{BUDGET_FIELD}` must be an int of at least {NO_BUDGET}, got {budget!r}. Set the number of thinking "
            f"tokens, 0 for no thinking, or {NO_BUDGET} for no budget."
        )
    return budget


class _Budget:
    """Logits processor that enforces the budget of one request."""

    def __init__(self, config: AnytimeConfig, budget: int):
        self._config, self._budget = config, budget
        self._cut: int | None = None  # thinking tokens, once known
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
