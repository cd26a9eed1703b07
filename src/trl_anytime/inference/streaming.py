"""Streaming for one prompt: its thinking trace and answers are printed as they come."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..outside.display import for_terminal
from ..rollout.backend import RolloutSettings
from ..rollout.http_backend import CompletionClient
from ..rollout.sampling import Sampling
from ..rollout.settling import Check, Settling
from ..rollout.transformers_backend import own_draws
from ..rollout.types import Rollout, Thinking
from .anytime_config import AnytimeConfig
from .generate import GenerateSampler, padding_token, stop_rule


class EscapedStreamer(TextStreamer):
    """Streamer that prints a model's text with control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(for_terminal(text), stream_end)


class StreamingSampler:
    """
    [`~trl_anytime.rollout.backend.Sampler`] for one prompt at a time that prints the text as it comes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`CompletionClient`]):
            The model, or a server.
        tokenizer, sampling, seed:
            See [`anytime_generate`].
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int | None = None
    ) -> None:
        self._model, self._tokenizer, self._sampling, self._seed = model, tokenizer, sampling, seed
        if not isinstance(model, CompletionClient):
            model.eval()
            if seed is not None:
                set_seed(seed)

    def __call__(
        self,
        prompt_ids: list[list[int]],
        max_new_tokens: int,
        stop_token_ids: list[int],
        num_generations: int = 1,
        should_stop: Callable[[list[int]], bool] | None = None,
    ) -> tuple[list[list[int]], None]:
        """
        Continue a prompt. See [`~trl_anytime.rollout.backend.Sampler`].

        `should_stop` is asked after each token whether the tokens so far are enough.
        """
        streamer = EscapedStreamer(cast(Any, self._tokenizer), skip_prompt=True, skip_special_tokens=True)
        if not isinstance(self._model, CompletionClient):
            sample = self._local_sampler(streamer, should_stop)
            return sample(prompt_ids, max_new_tokens, stop_token_ids, num_generations)[0], None
        streamer.put(torch.tensor(prompt_ids))  # skipped
        token_ids: list[int] = []
        with closing(
            self._model.stream(prompt_ids[0], max_new_tokens, stop_token_ids, self._sampling, self._seed)
        ) as stream:
            for token in chain.from_iterable(stream):
                token_ids.append(token)
                streamer.put(torch.tensor([token]))
                if should_stop is not None and should_stop(token_ids):
                    break
        streamer.end()
        return [token_ids], None

    def quietly(
        self, prompt_ids: list[int], max_new_tokens: int, stop_token_ids: list[int], count: int
    ) -> list[list[int]]:
        """Return some continuations of a prompt, and print nothing. Other draws are not touched."""
        if isinstance(self._model, CompletionClient):
            return self._model.complete(
                [prompt_ids], max_new_tokens, stop_token_ids, self._sampling, count, self._seed
            )
        with own_draws(self._model.device):
            return self._local_sampler()([prompt_ids] * count, max_new_tokens, stop_token_ids, 1)[0]

    def _local_sampler(
        self, streamer: TextStreamer | None = None, should_stop: Callable[[list[int]], bool] | None = None
    ) -> GenerateSampler:
        generation_config, pad_token_id = self._sampling.generation_config(), padding_token(self._tokenizer)
        return GenerateSampler(self._model, generation_config, pad_token_id, streamer, should_stop=should_stop)


def stream_answers(
    sample: StreamingSampler,
    tokenizer: PreTrainedTokenizerBase,
    config: AnytimeConfig,
    prompt: Any,
    context: int | None,
    stop_when: str | Settling | None = None,
) -> Rollout:
    """
    Think, then answer at each budget of the config, and print everything as it comes.

    Args:
        sample ([`StreamingSampler`]):
            Sampler that prints what it samples.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        config ([`AnytimeConfig`]):
            Anytime config of the model, with the budgets and the summary length to use.
        prompt (`str` or `list[dict]`):
            The prompt.
        context (`int`, *optional*):
            Tokens that the model can hold. `None` if not known.
        stop_when (`str` or [`Settling`], *optional*):
            See [`anytime_generate`]. A check computes its trace again, as the answers do. It is not printed.

    Raises:
        `ValueError`: If a budget is beyond the context.
    """
    settings = replace(config.rollout_settings(1), stop=stop_rule(stop_when, config, tokenizer))
    (prompt_ids,) = config.prompt_ids(tokenizer, [prompt])
    config.check_context(len(prompt_ids), config.budgets[-1], context, "the model's")
    thinking, checks = _stream_thinking(sample, prompt_ids, settings)
    if thinking.settled:
        cost = sum(check.num_tokens for check in checks)
        print(f"\n--- settled after {checks[-1].cut} thinking tokens ({len(checks)} checks of {cost} tokens)")
    contexts, summaries = settings.contexts(thinking), []
    for place in contexts:
        at = ", ".join(str(config.budgets[j]) for j in place.budgets)
        print(f"\n--- answer after {place.cut} thinking tokens (budget {at})", flush=True)
        known = settings.known_summaries(place, checks)
        if known is None:
            context_ids = place.token_ids(prompt_ids, thinking)
            known, _ = sample([context_ids], config.max_summary_length, config.eos_token_ids)
        else:
            print(for_terminal(str(tokenizer.decode(known[0], skip_special_tokens=True))))
        summaries.append(known)
    return replace(Rollout.assemble(prompt_ids, thinking, contexts, summaries), checks=checks)


def _stream_thinking(
    sample: StreamingSampler, prompt_ids: list[int], settings: RolloutSettings
) -> tuple[Thinking, list[Check]]:
    """Sample a trace that is printed as it comes, and return it with its checks."""
    most, stops = settings.budgets[-1], settings.stop_token_ids

    def trace(token_ids: list[int]) -> Thinking:
        return Thinking.from_tokens(token_ids, settings.markers, settings.eos_token_ids)

    if settings.stop is None:
        (token_ids,), _ = sample([prompt_ids], most, stops)
        return trace(token_ids), []
    watch = settings.stop.watch()

    def has_settled(token_ids: list[int]) -> bool:
        if len(token_ids) < watch.next_cut or len(token_ids) == most:
            return False
        so_far = trace(token_ids)
        if so_far.finished or so_far.ended_with_eos:
            return False
        place = settings.check_context(watch.next_cut)
        context_ids = place.token_ids(prompt_ids, so_far)
        answers = sample.quietly(context_ids, settings.max_summary_length, settings.eos_token_ids, place.num_summaries)
        return watch.add(place.cut, answers)

    (token_ids,), _ = sample([prompt_ids], most, stops, should_stop=has_settled)
    thinking = trace(token_ids)
    return thinking if watch.settled_at is None else thinking.stopped(watch.settled_at), watch.checks
