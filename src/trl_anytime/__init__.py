"""Train reasoning language models to be good at any thinking budget, on top of TRL."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .brpo_config import BRPOConfig
    from .brpo_trainer import BRPOTrainer
    from .inference.anytime_config import AnytimeConfig
    from .inference.generate import anytime_generate
    from .inference.logits_processor import ThinkingBudgetLogitsProcessor
    from .inference.session import AnytimeSession
    from .rollout.http_backend import CompletionClient
    from .rollout.sampling import Sampling
    from .rollout.settling import Settling
    from .training.reliable_trainer import ReliableGRPOTrainer

__version__ = "0.1.0"
__all__ = [
    "AnytimeConfig",
    "AnytimeSession",
    "BRPOConfig",
    "BRPOTrainer",
    "CompletionClient",
    "ReliableGRPOTrainer",
    "Sampling",
    "Settling",
    "ThinkingBudgetLogitsProcessor",
    "anytime_generate",
]

_MODULE_OF = {
    "AnytimeConfig": ".inference.anytime_config",
    "AnytimeSession": ".inference.session",
    "BRPOConfig": ".brpo_config",
    "BRPOTrainer": ".brpo_trainer",
    "CompletionClient": ".rollout.http_backend",
    "ReliableGRPOTrainer": ".training.reliable_trainer",
    "Sampling": ".rollout.sampling",
    "Settling": ".rollout.settling",
    "ThinkingBudgetLogitsProcessor": ".inference.logits_processor",
    "anytime_generate": ".inference.generate",
}


# Imports are lazy, because a verifier's worker process imports `trl_anytime.rewards` and must not load torch and TRL
def __getattr__(name: str) -> Any:
    if name == "AnytimeContract":  # the former name
        name = "AnytimeConfig"
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
