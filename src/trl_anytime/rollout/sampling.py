"""Settings of sampling, for all backends."""

from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

from ..outside.validation import integer, number

# Field by which a vLLM request tells `VLLMThinkingBudget` its budget, and the value that leaves the request as it is
BUDGET_FIELD = "thinking_budget"
NO_BUDGET = -1

# These bounds exclude only values that no model is sampled with, infinity among them
SAMPLING = {
    "temperature": number(0, 1000),
    "top_p": number(1e-9, 1),
    "top_k": integer(-1),  # vLLM's own value for all tokens
    "min_p": number(0, 1),
    "repetition_penalty": number(1e-9, 1000),
}


@dataclass(frozen=True)
class Sampling:
    """
    Settings of sampling, for traces and summaries alike.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature. 0 takes the most probable token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Tokens are drawn from the most probable ones that together have this probability.
        top_k (`int`, *optional*, defaults to `0`):
            Tokens are drawn from this many of the most probable ones. 0 for all.
        min_p (`float`, *optional*, defaults to `0.0`):
            Tokens are drawn from those whose probability is at least this share of the largest one.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Factor that makes tokens that have occurred less probable.

    Raises:
        `ValueError`: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, check in SAMPLING.items():
            check(getattr(self, name), name)

    @classmethod
    def from_config(cls, args: Any) -> "Sampling":
        """Read the settings from a [`~trl.GRPOConfig`], where `None` means that a setting is off."""
        return cls(args.temperature, args.top_p, args.top_k or 0, args.min_p or 0.0, args.repetition_penalty)

    def generation_config(self) -> GenerationConfig:
        """Return the settings for transformers. All are set, so that none comes from the model's own."""
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, repetition_penalty=self.repetition_penalty)
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p or None,
            repetition_penalty=self.repetition_penalty,
        )

    def vllm(self) -> dict[str, Any]:
        """Return the settings for vLLM, for an engine and in requests."""
        return {**asdict(self), "top_k": max(self.top_k, 0)}


def is_clipped(summary: Sequence[int], max_summary_length: int, eos_token_ids: Container[int]) -> bool:
    """Return whether a summary is cut off at `max_summary_length` tokens without EOS."""
    return len(summary) == max_summary_length and summary[-1] not in eos_token_ids
