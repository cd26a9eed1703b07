"""Answers at any thinking budget, in batches and with the token ids that training splices."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..method.budgets import check_budgets
from ..modeling.support import admit, branching_mismatch
from ..modeling.tree_attention import plain_attention
from ..outside.display import for_html
from ..rollout.backend import Generation, PrefixGeneration
from ..rollout.http_backend import CompletionClient, ServerGeneration
from ..rollout.sampling import Sampling
from ..rollout.settling import Settling, StopWhenSettled
from ..rollout.transformers_backend import TransformersGeneration, unsupported_sampling
from ..rollout.types import Rollout
from .anytime_config import AnytimeConfig

logger = logging.get_logger(__name__)

_SHOWN = 40  # characters of a text in one line


@dataclass(frozen=True)
class BudgetAnswer:
    """
    Answers of a model at one budget.

    Args:
        budget (`int`):
            The budget in thinking tokens.
        thinking_tokens (`int`):
            Thinking tokens before the answer.
        finished (`bool`):
            Whether the trace ended by itself within the budget. Otherwise it was cut.
        answers (`list[str]`):
            Texts of the answers, without the bridge.
        answer_ids (`list[list[int]]`):
            Token ids of the answers, with EOS if it came.
        num_tokens (`list[int]`):
            Tokens of each answer after the prompt, including trace and bridge.
        well_formed (`list[bool]`):
            Whether the trace was ended exactly once. Otherwise training gives no reward.
    """

    budget: int
    thinking_tokens: int
    finished: bool
    answers: list[str]
    answer_ids: list[list[int]]
    num_tokens: list[int]
    well_formed: list[bool]


@dataclass(frozen=True, repr=False)
class AnytimeOutput:
    """
    Thinking trace with the answers at several budgets. A notebook shows it as a table.

    Args:
        thinking (`str`):
            The trace, up to the largest budget.
        answers (`list[BudgetAnswer]`):
            One for each budget.
        rollout ([`Rollout`]):
            The same as token ids.
    """

    thinking: str
    answers: list[BudgetAnswer]
    rollout: Rollout

    @property
    def ended(self) -> str:
        """
        Return how the thinking ended.

        Returns:
            `str`: `"finished"` (with the end of thinking), `"budget"` (cut at the last budget), `"settled"` (stopped,
            see [`Settling`]) or `"eos"` (broken off without the end of thinking).
        """
        thinking = self.rollout.thinking
        if thinking.settled:
            return "settled"
        return "finished" if thinking.finished else "eos" if thinking.ended_with_eos else "budget"

    @property
    def check_tokens(self) -> int:
        """Return the tokens of all checks of [`Settling`], bridges included."""
        return sum(check.num_tokens for check in self.rollout.checks)

    @classmethod
    def from_rollout(
        cls, rollout: Rollout, config: AnytimeConfig, tokenizer: PreTrainedTokenizerBase
    ) -> "AnytimeOutput":
        """Decode a rollout that was cut at the budgets of a config."""
        thinking = rollout.thinking
        answers = [
            BudgetAnswer(
                budget=budget,
                thinking_tokens=cut,
                finished=thinking.finished and len(thinking.token_ids) <= budget,
                answers=tokenizer.batch_decode(summaries, skip_special_tokens=True),
                answer_ids=summaries,
                num_tokens=[cut + len(bridge) + len(ids) for ids in summaries],
                well_formed=formed,
            )
            for budget, cut, bridge, summaries, formed in zip(
                config.budgets,
                rollout.cuts,
                rollout.bridges,
                rollout.summaries,
                rollout.well_formed(config.markers),
                strict=True,
            )
        ]
        return cls(str(tokenizer.decode(thinking.token_ids)), answers, rollout)

    def __repr__(self) -> str:
        """Return one line: the first answer at each budget, in short."""
        answers = ", ".join(f"{answer.budget}: {_in_short(answer.answers[0])!r}" for answer in self.answers)
        num_tokens = len(self.rollout.thinking.token_ids)
        return f"AnytimeOutput(thinking of {num_tokens} tokens: {_in_short(self.thinking)!r}, answers {{{answers}}})"

    def _repr_html_(self) -> str:
        """Return the curve as a notebook shows it: a row for each budget, a bar for its thinking tokens."""
        width_of_token = 8 / (max(answer.thinking_tokens for answer in self.answers) or 1)  # in em
        bar = '<div style="background: #4c78a8; height: 0.8em; width: {:.2f}em"></div>'
        rows = [
            f"<tr><td>{answer.budget}</td>"
            f"<td>{bar.format(answer.thinking_tokens * width_of_token)}"
            f"{answer.thinking_tokens}{'' if answer.finished else ', cut'}</td>"
            f'<td style="text-align: left">{"<hr>".join(map(_cell, answer.answers, answer.well_formed))}</td></tr>'
            for answer in self.answers
        ]
        return (
            f"<details><summary>Thinking, {len(self.rollout.thinking.token_ids)} tokens ({self.ended})</summary>"
            f"{for_html(self.thinking)}</details>"
            "<table><thead><tr><th>budget</th><th>thinking tokens</th><th>answer</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )


def _cell(answer: str, well_formed: bool) -> str:
    return for_html(answer) + ("" if well_formed else " <em>(ill-formed)</em>")


def _in_short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} [...]"


def anytime_generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    budgets: Sequence[int] | None = None,
    num_summaries: int = 1,
    *,
    config: AnytimeConfig | None = None,
    sampling: Sampling | None = None,
    max_summary_length: int | None = None,
    seed: int | None = None,
    max_cached_tokens: int | None = None,
    stop_when: str | Settling | None = None,
) -> list[AnytimeOutput]:
    """
    Think once for each prompt, and answer at one or several budgets.

    Bridges are spliced as in training. Budgets that cut a trace at the same place share their answers.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `vllm.LLM` or [`CompletionClient`]):
            The model, an engine, or a server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts, which are used unchanged, or conversations.
        budgets (`Sequence[int]`, *optional*):
            Thinking budgets in tokens, increasing. Defaults to those of the config.
        num_summaries (`int`, *optional*, defaults to `1`):
            Answers at each budget.
        config ([`AnytimeConfig`], *optional*):
            Anytime config of the model. Defaults to [`AnytimeConfig.from_pretrained`].
        sampling ([`Sampling`], *optional*):
            Sampling settings. Defaults to the config's.
        max_summary_length (`int`, *optional*):
            Most tokens of an answer. Defaults to the config's.
        seed (`int`, *optional*):
            Seed of the draws.
        max_cached_tokens (`int`, *optional*):
            See [`TransformersGeneration`].
        stop_when (`str` or [`Settling`], *optional*):
            `"settled"` ends a trace before its last budget when its answers have settled, by the defaults of
            [`Settling`]. Up to there its tokens are those that it would have without.

    Returns:
        `list[AnytimeOutput]`: one for each prompt.

    Raises:
        `ValueError`: If the model has no thinking markers, or a budget is beyond its context. Also if the backend
            cannot stop when the answers have settled.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from trl_anytime import anytime_generate

    >>> model = AutoModelForCausalLM.from_pretrained("outputs/quickstart/model")
    >>> tokenizer = AutoTokenizer.from_pretrained("outputs/quickstart/model")
    >>> question = [{"role": "user", "content": "a. g. hf ca bd fb e. de h"}]
    >>> (output,) = anytime_generate(model, tokenizer, [question], budgets=[4, 10, 40])
    >>> [(answer.budget, answer.answers[0]) for answer in output.answers]
    ```
    """
    if isinstance(prompts, str):
        raise ValueError("`prompts` is a single text. Pass a list of prompts.")
    if config is None:
        config = find_config(model, tokenizer)
    config = replace(
        config.with_tokenizer(tokenizer),
        budgets=check_budgets(config.budgets if budgets is None else budgets),
        sampling=sampling or config.sampling,
        max_summary_length=max_summary_length or config.max_summary_length,
    )
    prompt_ids = config.prompt_ids(tokenizer, prompts)
    if not prompt_ids:
        return []
    config.check_context(max(map(len, prompt_ids)), config.budgets[-1], context_length(model), "the model's")
    settings = replace(config.rollout_settings(num_summaries), stop=stop_rule(stop_when, config, tokenizer))
    with open_backend(model, tokenizer, config.sampling, seed, max_cached_tokens) as generation:
        rollouts = generation.roll_out(prompt_ids, settings)
    return [AnytimeOutput.from_rollout(rollout, config, tokenizer) for rollout in rollouts]


def stop_rule(
    stop_when: str | Settling | None, config: AnytimeConfig, tokenizer: PreTrainedTokenizerBase
) -> StopWhenSettled | None:
    """
    Return the rule that `stop_when` names, see [`anytime_generate`].

    Raises:
        `ValueError`: If there is no such rule, or it does not fit the budgets and the sampling of the config.
    """
    if stop_when is None:
        return None
    settling = Settling() if stop_when == "settled" else stop_when
    if not isinstance(settling, Settling):
        raise ValueError(f"`stop_when` must be 'settled' or a `Settling`, got {stop_when!r}.")
    return StopWhenSettled(
        settling.resolved(config.budgets[-1], config.sampling.temperature),
        config.markers,
        tokenizer,
        config.max_summary_length,
        config.eos_token_ids,
    )


def find_config(model: Any, tokenizer: PreTrainedTokenizerBase) -> AnytimeConfig:
    """Find the config beside a model, an engine's model, or the tokenizer of a served model."""
    if isinstance(model, CompletionClient):
        return AnytimeConfig.from_pretrained(tokenizer.name_or_path, tokenizer)
    if is_transformers_model(model):
        for path in (model.name_or_path, tokenizer.name_or_path):  # an adapter's base has none
            if path:
                return AnytimeConfig.from_pretrained(path, tokenizer)
        return AnytimeConfig.from_tokenizer(tokenizer)
    return AnytimeConfig.from_pretrained(model.llm_engine.model_config.model, tokenizer)


def context_length(model: Any) -> int | None:
    """Return how many tokens a prompt and its continuation may have, or `None` if that is not known."""
    if isinstance(model, CompletionClient):
        return model.max_model_len
    if is_transformers_model(model):
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return model.llm_engine.model_config.max_model_len


def is_transformers_model(model: Any) -> bool:
    """Return whether `model` is a model of transformers. Otherwise it is an engine or a server."""
    return isinstance(model, torch.nn.Module)


@contextmanager
def open_backend(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    seed: int | None = None,
    max_cached_tokens: int | None = None,
) -> Iterator[Generation]:
    """
    Open the backend of a model, an engine or a server. A model is left as it was.

    Args:
        model, tokenizer, sampling, seed, max_cached_tokens:
            See [`anytime_generate`].
    """
    if isinstance(model, CompletionClient):
        yield ServerGeneration(model, sampling, seed)
    elif is_transformers_model(model):
        if seed is not None:
            set_seed(seed)
        with _ready(model):
            yield _transformers_backend(model, tokenizer, sampling, max_cached_tokens)
    else:
        from ..rollout.vllm_backend import EngineGeneration  # needs vLLM

        parameters = sampling.vllm()
        yield EngineGeneration(model.llm_engine, parameters if seed is None else {**parameters, "seed": seed})


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Turn off dropout inside, and restore the model's mode and attention afterwards."""
    training = model.training
    model.eval()
    try:
        with plain_attention(model):
            yield
    finally:
        model.train(training)


def _transformers_backend(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, max_cached_tokens: int | None
) -> Generation:
    generation_config = sampling.generation_config()
    pad_token_id = padding_token(tokenizer)
    reason = admit(model, (partial(unsupported_sampling, generation_config=generation_config), branching_mismatch))
    if reason is None:
        return TransformersGeneration(lambda: nullcontext(model), generation_config, pad_token_id, max_cached_tokens)
    logger.warning_once(
        f"{model.config.model_type} cannot reuse the cache of a trace for its answers, because {reason}. Every answer "
        "computes its trace again, which is slower."
    )
    return PrefixGeneration(GenerateSampler(model, generation_config, pad_token_id))


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad shorter prompts with. Any token works, because padding is masked."""
    return cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class GenerateSampler:
    """
    [`~trl_anytime.rollout.backend.Sampler`] that uses plain `generate()`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`]):
            Sampling settings.
        pad_token_id (`int`):
            Padding on the left of shorter prompts.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Receives the tokens as they come. Prompts are then sampled one at a time.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts that are sampled together.
        should_stop (`Callable`, *optional*):
            Asked after each token whether the tokens of a prompt so far are enough. Prompts are then sampled one at a
            time.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        pad_token_id: int,
        streamer: BaseStreamer | None = None,
        batch_size: int = 16,
        should_stop: Callable[[list[int]], bool] | None = None,
    ):
        self._model, self._generation_config, self._pad_token_id = model, generation_config, pad_token_id
        self._streamer, self._should_stop = streamer, should_stop
        self._batch_size = 1 if streamer or should_stop else batch_size

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        generation_config = GenerationConfig.from_dict(
            {
                **self._generation_config.to_dict(),
                "max_new_tokens": max_new_tokens,
                "eos_token_id": stop_token_ids,
                "pad_token_id": self._pad_token_id,
            }
        )
        sampled = []
        for first in range(0, len(prompt_ids), self._batch_size):
            rows = prompt_ids[first : first + self._batch_size]
            width = max(map(len, rows))
            padded = [[self._pad_token_id] * (width - len(ids)) + ids for ids in rows]
            mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]
            device = self._model.device
            output = self._model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=generation_config,
                stopping_criteria=self._criteria(width),
                streamer=self._streamer,
            )
            sampled += [_up_to_stop(ids, stop_token_ids) for ids in output[:, width:].tolist()]
        return sampled, None

    def _criteria(self, width: int) -> StoppingCriteriaList | None:
        return None if self._should_stop is None else StoppingCriteriaList([_Asks(self._should_stop, width)])


class _Asks(StoppingCriteria):
    """Criterion that asks a function about the tokens behind a prompt of `width` tokens."""

    def __init__(self, should_stop: Callable[[list[int]], bool], width: int):
        self._should_stop, self._width = should_stop, width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        (tokens,) = input_ids[:, self._width :].tolist()
        return torch.tensor([self._should_stop(tokens)], device=input_ids.device)


def _up_to_stop(token_ids: list[int], stop_token_ids: list[int]) -> list[int]:
    """Drop the padding after the first stop token."""
    ends = (i for i, token in enumerate(token_ids) if token in stop_token_ids)
    return token_ids[: next(ends, len(token_ids) - 1) + 1]
