"""What an evaluation measures, and how two evaluations differ."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..inference.anytime_config import AnytimeConfig

# May differ between two results that are compared. The comparison is about these, or they are chance.
NOT_COMPARED = ("model", "markers", "eos_token_ids", "chat_template_kwargs", "seed")


@dataclass(frozen=True)
class Protocol:
    """
    Description of what an evaluation measures.

    Args:
        model (`str`):
            Name of the model.
        config ([`AnytimeConfig`]):
            Markers, bridges and system prompt, and the budgets, summary length and sampling of this evaluation.
        problems (`dict[str, tuple[str, int]]`):
            Fingerprint and number of problems, by data set.
        instruction (`str`):
            Text after each question.
        num_samples (`int`):
            Traces for each question.
        num_summaries (`int`):
            Summaries for each trace and cut.
        reward (`str`):
            Name of the reward.
        seed (`int`):
            Seed of the draws.
    """

    model: str
    config: AnytimeConfig
    problems: dict[str, tuple[str, int]]
    instruction: str
    num_samples: int
    num_summaries: int
    reward: str
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol in plain types, for a file."""
        config = asdict(self.config)
        # Neither the libraries that wrote a checkpoint nor its training objective change a measurement
        values = {key: value for key, value in config.items() if key not in ("versions", "prior")}
        values |= {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "config"}
        return json.loads(json.dumps(values))


def differences(ours: dict[str, Any], theirs: dict[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """List the differences of two protocols, which are given as `Protocol.as_dict` returns them."""
    return [
        f"{name} is {_in_short(theirs.get(name))} there and {_in_short(ours.get(name))} here"
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ignore and ours.get(name) != theirs.get(name)
    ]


def _in_short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 500 else f"{shown[:500]}[…]"
