"""Train reasoning language models to be good at any thinking budget, on top of TRL."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .brpo_config import BRPOConfig
    from .brpo_trainer import BRPOTrainer

__version__ = "0.1.0"
__all__ = ["BRPOConfig", "BRPOTrainer"]

_MODULE_OF = {"BRPOConfig": ".brpo_config", "BRPOTrainer": ".brpo_trainer"}


# Lazy, so that a verifier's worker process, which imports `trl_anytime.rewards`, does not load torch and TRL.
def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
