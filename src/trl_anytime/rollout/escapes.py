"""
Escapes: summaries that resume the reasoning although their trace was closed by force.

Only summaries behind a truncation bridge are escapes. A model that ended its thinking by itself has nothing to resume.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..rewards.agreement import contradicts_itself, read_answer
from .markers import ThinkingMarkers
from .templates import find_think_start, template_of
from .types import Rollout

# What is counted, in the order in which a summary is looked at
REOPENED, CONTRADICTED, UNANSWERED = "reopened", "contradicted", "unanswered"
ESCAPES = (REOPENED, CONTRADICTED, UNANSWERED)


class EscapeSearch:
    """
    Search for signs that a summary resumes the reasoning.

    Args:
        markers ([`ThinkingMarkers`]):
            Markers of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
    """

    def __init__(self, markers: ThinkingMarkers, tokenizer: PreTrainedTokenizerBase):
        self._markers = markers
        self._start = find_think_start(markers.think_end, template_of(tokenizer))
        # The text of a summary lacks markers that are special tokens
        found = tokenizer.convert_tokens_to_ids(self._start) if self._start else None
        self._start_id = found if isinstance(found, int) and found != tokenizer.unk_token_id else None

    def kind(self, token_ids: Sequence[int], text: str, clipped: bool) -> str | None:
        r"""
        Return the sign that a summary behind a forced cut shows, or `None`.

        Args:
            token_ids (`Sequence[int]`):
                Token ids of the summary.
            text (`str`):
                Its text, without special tokens.
            clipped (`bool`):
                Whether it is cut off at its length limit.

        Returns:
            `str` or `None`: one of `ESCAPES`.

            - `"reopened"`: it has the start of thinking, or the end of thinking once more.
            - `"contradicted"`: it has two `\boxed{}` one after the other with different answers.
            - `"unanswered"`: it is cut off at its length limit, and the box that is graded has not come.
        """
        if self._start_id in token_ids or (self._start and self._start in text):
            return REOPENED
        if self._markers.count_think_end(token_ids):
            return REOPENED
        if contradicts_itself(text):
            return CONTRADICTED
        if clipped and read_answer(text, self._markers.answer_bridge, clipped) is None:
            return UNANSWERED
        return None

    def kinds(
        self, rollout: Rollout, texts: Sequence[Sequence[str]], clipped: Sequence[Sequence[bool]]
    ) -> list[list[str | None] | None]:
        """
        Return the signs of all summaries of a rollout.

        Args:
            rollout ([`Rollout`]):
                The rollout.
            texts (`Sequence[Sequence[str]]`):
                M × A texts of its summaries, without special tokens.
            clipped (`Sequence[Sequence[bool]]`):
                See [`Rollout.clipped`].

        Returns:
            `list`: for each of M budgets the A signs, or `None` if the trace ended by itself within the budget.
        """
        return [
            [self.kind(*summary) for summary in zip(*at_budget, strict=True)]
            if self._markers.is_forced(bridge)
            else None
            for bridge, *at_budget in zip(rollout.bridges, rollout.summaries, texts, clipped, strict=True)
        ]
