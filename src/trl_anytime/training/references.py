"""Reference answers in place of sampled summaries: their tokens behind the bridge, and what they earn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..brpo_config import BRPOConfig
from ..method.likelihood import likelihood_rewards
from ..method.packing import PackedRollouts
from ..rewards.base import ANSWER_COLUMNS
from ..rewards.verifier.gold_answers import column_values, find_column, gold_alternatives
from ..rollout.backend import Generation, RolloutSettings
from ..rollout.encoding import encode
from ..rollout.markers import ThinkingMarkers
from ..rollout.types import Rollout


def reference_texts(rows: Any, template: str) -> list[str]:
    """
    Return the text of each reference answer.

    Answers are read as gold answers are: the content of the last box, what follows `####`, and so on.

    Args:
        rows (`Dataset` or `Mapping[str, Sequence[Any]]`):
            Columns of the data, with `answer` or `solution` among them.
        template (`str`):
            Text behind the answer bridge, in which `{answer}` stands for the answer.

    Raises:
        `ValueError`: If there is no such column, or a row has no answer or several.
    """
    columns = getattr(rows, "column_names", None) or list(rows)
    column = find_column(columns, ANSWER_COLUMNS)
    texts = []
    for row, value in enumerate(column_values(rows, column, columns)):
        answers = gold_alternatives(value, any_text=True)
        if answers is None or len(answers) != 1:
            raise ValueError(
                f"Row {row}: `{column}` is {value!r}. `summary_reward` needs one reference answer per row. Mend or "
                "drop such rows."
            )
        texts.append(template.replace("{answer}", answers[0]))
    return texts


def encode_reference(
    text: str, tokenizer: PreTrainedTokenizerBase, markers: ThinkingMarkers, eos_token_id: int
) -> tuple[list[int], bool]:
    """
    Encode a reference answer as the model would write it behind the answer bridge, with EOS at its end.

    Args:
        text (`str`):
            The reference answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        markers ([`ThinkingMarkers`]):
            Its bridges.
        eos_token_id (`int`):
            Ends the answer.

    Returns:
        `tuple`: the token ids, and whether the answer's first token would melt into the bridge in one text. Then the
        answer is encoded by itself.

    Raises:
        `ValueError`: If the tokenizer cannot encode the answer.
    """
    bridge = list(markers.answer_bridge_ids)
    try:
        joint = encode(tokenizer, markers.answer_bridge + text)
    except ValueError:  # of words alone, such a tokenizer may know none of both together
        joint = []
    melts = joint[: len(bridge)] != bridge
    ids = encode(tokenizer, text) if melts else joint[len(bridge) :]
    return [*ids, eos_token_id], melts


@dataclass
class ReferenceAnswers:
    """
    Reference answers of a generation batch, which stand where sampled summaries would.

    N rollouts on this rank, M budgets.

    Args:
        kind (`str`):
            The reward, see [`~trl_anytime.method.likelihood.likelihood_rewards`].
        token_ids (`list[list[int]]`):
            N answers.
        rewards (`torch.Tensor`, *optional*):
            Shape (N, M), what they have earned at each cut. Set by [`~ReferenceAnswers.score`].
    """

    kind: str
    token_ids: list[list[int]]
    rewards: torch.Tensor | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Mapping[str, Any]],
        args: BRPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        markers: ThinkingMarkers,
    ) -> "ReferenceAnswers":
        """Encode the answers of N rows of the data."""
        assert args.summary_reward is not None
        texts = reference_texts({name: [row[name] for row in rows] for name in rows[0]}, args.reference_template)
        eos_token_id = cast(int, tokenizer.eos_token_id)
        return cls(
            args.summary_reward, [encode_reference(text, tokenizer, markers, eos_token_id)[0] for text in texts]
        )

    def roll_out(
        self, generation: Generation, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings
    ) -> list[Rollout]:
        """Think once for each prompt, and put its answer behind each cut. Nothing is sampled there."""
        rollouts = generation.roll_out(prompt_ids, replace(settings, num_summaries=0))
        return [
            replace(rollout, summaries=[[ids] for _ in rollout.cuts], summary_logprobs=None)
            for rollout, ids in zip(rollouts, self.token_ids, strict=True)
        ]

    def score(self, rollouts: Sequence[Rollout], packed: PackedRollouts, logprobs: torch.Tensor) -> list[Rollout]:
        """
        Reward each cut by the policy's log-probabilities.

        Args:
            rollouts (`Sequence[Rollout]`):
                N rollouts, see [`~ReferenceAnswers.roll_out`].
            packed ([`PackedRollouts`]):
                The same as packed rows.
            logprobs (`torch.Tensor`):
                Shape (N, T), log-probabilities of their tokens.

        Returns:
            `list[Rollout]`: the rollouts. Where an engine has sampled the thinking, the answers get the policy's own
            log-probabilities, so that no importance correction is made for tokens that nothing has sampled.
        """
        sums, lengths = packed.summary_sums(logprobs)[:, :, 0], packed.summary_lengths()[:, :, 0]
        self.rewards = likelihood_rewards(self.kind, sums, lengths)
        return [
            replace(rollout, summary_logprobs=[[row[start:end].tolist()] for ((_, start, end),) in spans.tolist()])
            if rollout.thinking.logprobs is not None
            else rollout
            for rollout, row, spans in zip(rollouts, logprobs, packed.spans, strict=True)
        ]

    @contextmanager
    def rewarding(self, trainer: Any) -> Iterator[None]:
        """Let TRL find one reward function in the trainer, which returns what the answers have earned."""

        def earned(**kwargs: Any) -> list[float]:
            assert self.rewards is not None
            return self.rewards.flatten().tolist()

        inside: dict[str, Any] = {
            "reward_funcs": [earned],
            "reward_func_names": [self.kind],
            "reward_processing_classes": [None],
            "reward_weights": torch.ones(1),
        }
        before = {name: getattr(trainer, name) for name in inside}
        vars(trainer).update(inside)
        try:
            yield
        finally:
            vars(trainer).update(before)
