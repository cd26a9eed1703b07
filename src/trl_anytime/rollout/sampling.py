"""How tokens are drawn, whatever draws them."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig

from ..outside.validation import integer, number

# How a vLLM request tells `VLLMThinkingBudget` its budget, and what tells it to leave the request as it is
BUDGET_FIELD = "thinking_budget"
NO_BUDGET = -1

# The bounds keep out what no model was sampled with, infinity first
SAMPLING = {
    "temperature": number(0, 1000),
    "top_p": number(1e-9, 1),
    "top_k": integer(-1),  # vLLM's own value for all
    "min_p": number(0, 1),
    "repetition_penalty": number(1e-9, 1000),
}


@dataclass(frozen=True)
class Sampling:
    """
    How tokens are drawn, in traces and summaries alike.

    Args:
        temperature (`float`, *optional*, defaults to `1.0`):
            0 takes the most probable token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Tokens are drawn from the most probable ones that together have this probability.
        top_k (`int`, *optional*, defaults to `0`):
            Tokens are drawn from so many; 0 for all.
        min_p (`float`, *optional*, defaults to `0.0`):
            Tokens are drawn from those with this share of the largest probability.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            Factor against tokens that have occurred.

    Raises:
        `ValueError`: For a value out of range.
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
        """Read the settings off a [`~trl.GRPOConfig`], which has `None` for some that are off."""
        return cls(args.temperature, args.top_p, args.top_k or 0, args.min_p or 0.0, args.repetition_penalty)

    def generation_config(self) -> GenerationConfig:
        """The settings of transformers. Every one is set: what is not would come from the model's own."""
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
        """The settings of vLLM, for an engine and in requests."""
        return {**asdict(self), "top_k": max(self.top_k, 0)}
