"""Streaming for one prompt: its thinking trace and answers are printed as they come."""

from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer, set_seed

from ..outside.display import for_terminal
from ..rollout.backend import Sampler
from ..rollout.http_backend import CompletionClient
from ..rollout.sampling import Sampling
from ..rollout.types import Rollout, Thinking
from .anytime_config import AnytimeConfig
from .generate import GenerateSampler, padding_token


class EscapedStreamer(TextStreamer):
    """Streamer that prints a model's text with control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(for_terminal(text), stream_end)


def streaming_sampler(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int | None = None
) -> Sampler:
    """
    Return a sampler for one prompt at a time that prints the text as it comes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`CompletionClient`]):
            The model, or a server.
        tokenizer, sampling, seed:
            See [`anytime_generate`].
    """
    streamer = EscapedStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    if isinstance(model, CompletionClient):

        def sample(
            prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
        ) -> Any:
            streamer.put(torch.tensor(prompt_ids))  # skipped
            token_ids: list[int] = []
            for tokens in model.stream(prompt_ids[0], max_new_tokens, stop_token_ids, sampling, seed):
                token_ids += tokens
                for token in tokens:
                    streamer.put(torch.tensor([token]))
            streamer.end()
            return [token_ids], None

        return sample
    if seed is not None:
        set_seed(seed)
    return GenerateSampler(model.eval(), sampling.generation_config(), padding_token(tokenizer), streamer)


def stream_answers(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    config: AnytimeConfig,
    prompt: Any,
    context: int | None,
) -> Rollout:
    """
    Think, then answer at each budget of the config, and print everything as it comes.

    Args:
        sample ([`~trl_anytime.rollout.backend.Sampler`]):
            Sampler that prints what it samples.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        config ([`AnytimeConfig`]):
            Anytime config of the model, with the budgets and the summary length to use.
        prompt (`str` or `list[dict]`):
            The prompt.
        context (`int`, *optional*):
            Tokens that the model can hold. `None` if not known.

    Raises:
        `ValueError`: If a budget is beyond the context.
    """
    settings = config.rollout_settings(1)
    (prompt_ids,) = config.prompt_ids(tokenizer, [prompt])
    config.check_context(len(prompt_ids), config.budgets[-1], context, "the model's")
    sampled, _ = sample([prompt_ids], config.budgets[-1], settings.stop_token_ids, 1)
    thinking = Thinking.from_tokens(sampled[0], config.markers, config.eos_token_ids)
    contexts, summaries = settings.contexts(thinking), []
    for place in contexts:
        at = ", ".join(str(config.budgets[j]) for j in place.budgets)
        print(f"\n--- answer after {place.cut} thinking tokens (budget {at})", flush=True)
        context_ids = place.token_ids(prompt_ids, thinking)
        sampled, _ = sample([context_ids], config.max_summary_length, config.eos_token_ids, 1)
        summaries.append(sampled)
    return Rollout.assemble(prompt_ids, thinking, contexts, summaries)
