"""Batch sizes of a run, in prompts, traces, summaries and tokens, and its numbers of optimiser steps."""

import math
from dataclasses import dataclass

from ..brpo_config import BRPOConfig
from ..outside.tables import aligned
from ..training.checkpoint import generate_every
from .finding import ERROR, WARNING, Finding

# Warn above this number of optimiser steps on one generation batch. The paper's recipes take half as many.
_MOST_UPDATES = 4


def most_tokens(args: BRPOConfig, max_bridge_length: int) -> tuple[int, int]:
    """
    Return the most tokens that one rollout can have after the prompt.

    Returns:
        `tuple`: tokens when packed into one row, b_m + m · A · (bridge + summary), and as separate rows that are
            padded to the longest.
    """
    branch = max_bridge_length + args.max_summary_length
    thinking, num_branches = args.budgets[-1], len(args.budgets) * args.num_summaries
    return thinking + num_branches * branch, (1 + num_branches) * (thinking + branch)


@dataclass(frozen=True)
class BatchArithmetic:
    """
    Sizes of a run's batches. They count all ranks together, unless it says otherwise.

    Args:
        num_processes (`int`):
            Ranks W.
        thinkings_per_rank (`int`):
            Traces of one generation batch on one rank.
        thinkings_per_step (`int`):
            Traces of one optimiser step on one rank.
        micro_batch (`int`):
            Traces that one rank forwards together.
        num_generations (`int`):
            Traces G per prompt.
        summaries_per_thinking (`int`):
            Summaries m · A of one trace.
        tokens_per_row (`int`, *optional*):
            Most tokens of a packed row, with its prompt. `None` if not known.
        updates_per_generation (`float`):
            Optimiser steps on one generation batch. Not a whole number if the two are not aligned.
        num_prompts (`int`, *optional*):
            Rows of the training data. `None` for a stream, or if not known.
        epochs (`float`, *optional*):
            Passes over the training data. `None` if `max_steps` is given instead.
        max_steps (`int`, *optional*):
            Optimiser steps of the run, if they are given.
    """

    num_processes: int
    thinkings_per_rank: int
    thinkings_per_step: int
    micro_batch: int
    num_generations: int
    summaries_per_thinking: int
    tokens_per_row: int | None
    updates_per_generation: float
    num_prompts: int | None
    epochs: float | None
    max_steps: int | None

    @classmethod
    def from_settings(cls, args: BRPOConfig, num_prompts: int | None, tokens_per_row: int | None) -> "BatchArithmetic":
        """
        Calculate the sizes from settings.

        Args:
            args ([`BRPOConfig`]):
                Settings.
            num_prompts, tokens_per_row (`int`, *optional*):
                See the class.
        """
        assert args.steps_per_generation is not None and args.num_generations is not None  # filled in by TRL
        given_steps = args.max_steps > 0
        return cls(
            args.world_size,
            args.per_device_train_batch_size * args.steps_per_generation,
            args.per_device_train_batch_size * args.gradient_accumulation_steps,
            args.per_device_train_batch_size,
            args.num_generations,
            len(args.budgets) * args.num_summaries,
            tokens_per_row,
            generate_every(args) / args.gradient_accumulation_steps,
            num_prompts,
            None if given_steps else args.num_train_epochs,
            args.max_steps if given_steps else None,
        )

    @property
    def prompts_per_generation(self) -> int:
        """Return the prompts of one generation batch. TRL ensures that it is a whole number."""
        return self.thinkings_per_rank * self.num_processes // self.num_generations

    @property
    def prompts_per_step(self) -> float:
        """Return the prompts of one optimiser step."""
        return self.thinkings_per_step * self.num_processes / self.num_generations

    @property
    def generations_per_epoch(self) -> int | None:
        """Return the generation batches of one epoch. Prompts that do not fill one are left out."""
        return None if self.num_prompts is None else self.num_prompts // self.prompts_per_generation

    @property
    def updates_per_epoch(self) -> int | None:
        """Return the optimiser steps of one epoch."""
        generations = self.generations_per_epoch
        return None if generations is None else math.ceil(generations * self.updates_per_generation)

    @property
    def num_updates(self) -> int | None:
        """Return the optimiser steps of the run."""
        if self.epochs is None or self.updates_per_epoch is None:
            return self.max_steps
        return math.ceil(self.epochs * self.updates_per_epoch)

    def table(self) -> str:
        """Return two tables as text: the sizes of the batches, and the numbers of steps."""
        ranks = self.num_processes
        columns = {
            "generation batch": self.thinkings_per_rank * ranks,
            "optimiser step": self.thinkings_per_step * ranks,
            "micro-batch": self.micro_batch,
        }
        if ranks > 1:
            columns["generation batch, per rank"] = self.thinkings_per_rank
            columns["optimiser step, per rank"] = self.thinkings_per_step
        tokens = self.tokens_per_row
        rows = [
            ["", *columns],
            ["prompts", *(f"{n / self.num_generations:,g}" for n in columns.values())],
            ["traces", *(f"{n:,}" for n in columns.values())],
            ["summaries", *(f"{n * self.summaries_per_thinking:,}" for n in columns.values())],
            ["packed tokens, at most", *("?" if tokens is None else f"{n * tokens:,}" for n in columns.values())],
        ]
        steps = [
            ["optimiser steps per generation batch", f"{self.updates_per_generation:g}"],
            ["micro-batches per optimiser step and rank", f"{self.thinkings_per_step // self.micro_batch}"],
            *(
                [name, "?" if number is None else f"{number:,}"]
                for name, number in (
                    ("prompts in the data", self.num_prompts),
                    ("generation batches per epoch", self.generations_per_epoch),
                    ("optimiser steps per epoch", self.updates_per_epoch),
                    ("optimiser steps of the run", self.num_updates),
                )
            ),
        ]
        return f"{aligned(rows)}\n\n{aligned(steps)}"

    def findings(self) -> list[Finding]:
        """Find sizes that would fail, or that are unusual."""
        found = []
        if self.num_prompts is not None and self.num_prompts < self.prompts_per_generation:
            found.append(
                Finding(
                    "batch",
                    ERROR,
                    f"The data has {self.num_prompts} prompts, but a generation batch needs "
                    f"{self.prompts_per_generation}. Batches that are not full are left out, so nothing would be "
                    "trained.",
                    "Lower `generation_batch_size` (or `steps_per_generation` and `per_device_train_batch_size`) to "
                    f"at most {self.num_prompts * self.num_generations} traces on all ranks together.",
                )
            )
        if self.prompts_per_step <= 1:
            found.append(
                Finding(
                    "batch",
                    WARNING,
                    f"Prompts per optimiser step: {self.prompts_per_step:g}, with {self.num_generations} traces "
                    "each. The gradient reflects a single problem.",
                    "Raise `gradient_accumulation_steps`. The paper uses 32 prompts per step.",
                )
            )
        updates = self.updates_per_generation
        if updates % 1 and (1 / updates) % 1:
            found.append(
                Finding(
                    "batch",
                    WARNING,
                    f"A generation batch takes {updates:g} optimiser steps, so some steps mix traces of two policies.",
                    "Make `steps_per_generation` × `num_iterations` a multiple of `gradient_accumulation_steps`, or "
                    "the other way round.",
                )
            )
        elif updates > _MOST_UPDATES:
            found.append(
                Finding(
                    "batch",
                    WARNING,
                    f"A generation batch takes {updates:g} optimiser steps. The last one learns from traces of a "
                    f"policy that is {updates - 1:g} steps old. In the paper's recipes it is 1 step old.",
                    "Raise `gradient_accumulation_steps`, or lower `generation_batch_size`, `steps_per_generation` or "
                    "`num_iterations`.",
                )
            )
        return found
