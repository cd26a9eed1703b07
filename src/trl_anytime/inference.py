"""Answers at any thinking budget: whole batches with the tokens that training splices, or inside `generate()`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from .admission import decoding_objection, structural_objection
from .attention import enable_tree_attention, plain_attention
from .budgets import check_budgets
from .contract import AnytimeContract, Sampling, check_context
from .display import for_terminal
from .generation import Generation, PrefixGeneration, RolloutSettings, Sampler
from .rollout import Rollout, Thinking
from .server import CompletionClient, ServerGeneration
from .transformers_generation import TransformersGeneration, sampling_objection

logger = logging.get_logger(__name__)


# Whole batches


@dataclass(frozen=True)
class BudgetAnswer:
    """
    What a model answers when it may think for so many tokens.

    Args:
        budget (`int`):
            The budget in thinking tokens.
        thinking_tokens (`int`):
            Thinking tokens that it used.
        finished (`bool`):
            Whether the thinking ended by itself within the budget; else it was cut.
        answers (`list[str]`):
            A answers, without the bridge.
        answer_ids (`list[list[int]]`):
            Their tokens, up to and including EOS if it came.
        num_tokens (`list[int]`):
            Tokens after the prompt of each: thinking, bridge and answer.
        well_formed (`list[bool]`):
            Whether the thinking was ended exactly once, without which training gives no reward.
    """

    budget: int
    thinking_tokens: int
    finished: bool
    answers: list[str]
    answer_ids: list[list[int]]
    num_tokens: list[int]
    well_formed: list[bool]


@dataclass(frozen=True)
class AnytimeOutput:
    """
    A thinking and the answers at several budgets.

    Args:
        thinking (`str`):
            The thinking, up to the largest budget.
        answers (`list[BudgetAnswer]`):
            One for each budget.
        rollout ([`Rollout`]):
            The same as token ids.
    """

    thinking: str
    answers: list[BudgetAnswer]
    rollout: Rollout

    @classmethod
    def of(
        cls, rollout: Rollout, budgets: Sequence[int], contract: AnytimeContract, tokenizer: PreTrainedTokenizerBase
    ) -> "AnytimeOutput":
        """The output in a rollout that was cut at `budgets`."""
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
                budgets,
                rollout.cuts,
                rollout.bridges,
                rollout.summaries,
                rollout.well_formed(contract.markers),
                strict=True,
            )
        ]
        return cls(str(tokenizer.decode(thinking.token_ids)), answers, rollout)


def anytime_generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    budgets: Sequence[int] | None = None,
    num_summaries: int = 1,
    *,
    contract: AnytimeContract | None = None,
    sampling: Sampling | None = None,
    max_summary_length: int | None = None,
    seed: int | None = None,
    max_cached_tokens: int | None = None,
) -> list[AnytimeOutput]:
    """
    Think once for each prompt, and answer at one or several budgets.

    The tokens are those that training would have spliced. Budgets at which a thinking has the same length share their
    answers.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `vllm.LLM` or [`CompletionClient`]):
            The model, an engine, or a server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`):
            Texts, which are taken as they are, or conversations.
        budgets (`Sequence[int]`, *optional*):
            Thinking budgets in tokens, increasing. Defaults to those of the contract.
        num_summaries (`int`, *optional*, defaults to `1`):
            Answers at each budget.
        contract ([`AnytimeContract`], *optional*):
            How the model was trained. Read from beside the model if not set, or detected.
        sampling ([`Sampling`], *optional*):
            How tokens are drawn. Defaults to the contract's.
        max_summary_length (`int`, *optional*):
            Most tokens of an answer. Defaults to the contract's.
        seed (`int`, *optional*):
            Seed of the draws.
        max_cached_tokens (`int`, *optional*):
            See [`TransformersGeneration`].

    Returns:
        `list[AnytimeOutput]`: one for each prompt.

    Raises:
        `ValueError`: If the model has no thinking markers, or a budget is beyond its context.

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
        raise ValueError("`prompts` is a single text: pass a list of prompts.")
    if contract is None:
        contract = contract_of(model, tokenizer)
    contract = replace(
        contract,
        budgets=check_budgets(contract.budgets if budgets is None else budgets),
        sampling=sampling or contract.sampling,
        max_summary_length=max_summary_length or contract.max_summary_length,
    )
    prompt_ids = contract.prompt_ids(tokenizer, prompts)
    if not prompt_ids:
        return []
    check_context(max(map(len, prompt_ids)), contract.budgets[-1], contract, context_of(model), "the model's")
    settings = rollout_settings(contract, num_summaries)
    with open_backend(model, tokenizer, contract.sampling, seed, max_cached_tokens) as generation:
        rollouts = generation.roll_out(prompt_ids, settings)
    return [AnytimeOutput.of(rollout, contract.budgets, contract, tokenizer) for rollout in rollouts]


def rollout_settings(contract: AnytimeContract, num_summaries: int) -> RolloutSettings:
    """What rollouts under a contract consist of, where budgets that share a cut share its summaries."""
    return RolloutSettings(
        contract.budgets,
        num_summaries,
        contract.max_summary_length,
        contract.markers,
        contract.eos_token_ids,
        share_summaries=True,
    )


def contract_of(model: Any, tokenizer: PreTrainedTokenizerBase) -> AnytimeContract:
    """The contract beside a model, an engine's model, or a tokenizer; see [`AnytimeContract.of_model`]."""
    if isinstance(model, CompletionClient):
        return AnytimeContract.of_model(tokenizer.name_or_path, tokenizer)
    if is_transformers_model(model):
        for path in (model.name_or_path, tokenizer.name_or_path):  # an adapter's base has none
            if path:
                return AnytimeContract.of_model(path, tokenizer)
        return AnytimeContract.detect(tokenizer)
    return AnytimeContract.of_model(model.llm_engine.model_config.model, tokenizer)


def context_of(model: Any) -> int | None:
    """Tokens that a prompt and its continuation may come to, if that is known."""
    if isinstance(model, CompletionClient):
        return model.max_model_len
    if is_transformers_model(model):
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return model.llm_engine.model_config.max_model_len


def is_transformers_model(model: Any) -> bool:
    """Whether it is a model of transformers, with an adapter or without, rather than an engine or a server."""
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
    The backend of a model, an engine or a server; a model is left as it was.

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
        from .vllm_generation import EngineGeneration  # needs vLLM

        parameters = sampling.vllm()
        yield EngineGeneration(model.llm_engine, parameters if seed is None else {**parameters, "seed": seed})


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """A model without dropout, whose attention may be changed inside."""
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
    base = cast(PreTrainedModel, model if isinstance(model, PreTrainedModel) else model.get_base_model())
    config = sampling.generation_config()
    pad_token_id = _padding(tokenizer)
    objection = structural_objection(base)
    if objection is None:
        plain = base.config._attn_implementation
        enable_tree_attention(model)
        objection = sampling_objection(model, config) or decoding_objection(model)
        if objection is None:
            return TransformersGeneration(lambda: _held(model), config, pad_token_id, max_cached_tokens)
        base.set_attn_implementation(plain)
    logger.warning_once(
        f"Every answer computes its thinking once more: {type(base).__name__} cannot answer on top of the thinking's "
        f"cache, because {objection}."
    )
    return PrefixGeneration(GenerateSampler(model, config, pad_token_id))


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token will do, as padding is masked."""
    return cast(int, tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@contextmanager
def _held(model: Any) -> Iterator[Any]:
    yield model


class GenerateSampler:
    """
    A [`~trl_anytime.generation.Sampler`] by plain `generate()`.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        generation_config ([`~transformers.GenerationConfig`]):
            How tokens are sampled.
        pad_token_id (`int`):
            Filler on the left of shorter prompts.
        streamer ([`~transformers.generation.streamers.BaseStreamer`], *optional*):
            Receives the tokens as they come. One prompt at a time then.
        batch_size (`int`, *optional*, defaults to `16`):
            Prompts at a time.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        pad_token_id: int,
        streamer: BaseStreamer | None = None,
        batch_size: int = 16,
    ):
        self._model, self._config, self._pad_token_id = model, generation_config, pad_token_id
        self._streamer, self._batch_size = streamer, 1 if streamer else batch_size

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        config = GenerationConfig.from_dict(
            {
                **self._config.to_dict(),
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
                generation_config=config,
                streamer=self._streamer,
            )
            sampled += [_up_to_stop(ids, stop_token_ids) for ids in output[:, width:].tolist()]
        return sampled, None


def _up_to_stop(token_ids: list[int], stop_token_ids: list[int]) -> list[int]:
    """Without the padding behind the first stop."""
    ends = (i for i, token in enumerate(token_ids) if token in stop_token_ids)
    return token_ids[: next(ends, len(token_ids) - 1) + 1]


# One prompt, as the tokens come


class _EscapedStreamer(TextStreamer):
    """Prints what a model writes, without letting it move the terminal."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(for_terminal(text), stream_end)


def streaming_sampler(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, seed: int | None = None
) -> Sampler:
    """
    A sampler for one prompt at a time that prints the text as it comes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`CompletionClient`]):
            The model, or a server.
        tokenizer, sampling, seed:
            See [`anytime_generate`].
    """
    streamer = _EscapedStreamer(cast(Any, tokenizer), skip_prompt=True, skip_special_tokens=True)
    if isinstance(model, CompletionClient):

        def sample(prompt_ids, max_new_tokens, stop_token_ids, num_generations):
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
    return GenerateSampler(model.eval(), sampling.generation_config(), _padding(tokenizer), streamer)


def stream_answers(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    contract: AnytimeContract,
    prompt: Any,
    context: int | None,
) -> Rollout:
    """
    Think, then answer at each budget of the contract, printing everything as it comes.

    Args:
        sample ([`~trl_anytime.generation.Sampler`]):
            Samples and prints.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        contract ([`AnytimeContract`]):
            How the model was trained; budgets, summary length and sampling to use.
        prompt (`str` or `list[dict]`):
            The prompt.
        context (`int`, *optional*):
            Tokens that the model can hold.

    Raises:
        `ValueError`: If a budget is beyond the context.
    """
    settings = rollout_settings(contract, num_summaries=1)
    (prompt_ids,) = contract.prompt_ids(tokenizer, [prompt])
    check_context(len(prompt_ids), contract.budgets[-1], contract, context, "the model's")
    sampled, _ = sample([prompt_ids], contract.budgets[-1], settings.stop_token_ids, 1)
    thinking = Thinking.of(sampled[0], contract.markers, contract.eos_token_ids)
    summaries: dict[int, list] = {}
    for cut, bridge, indices in settings.contexts(thinking):
        at = ", ".join(str(contract.budgets[j]) for j in indices)
        print(f"\n--- answer after {cut} thinking tokens (budget {at})", flush=True)
        context_ids = [*prompt_ids, *thinking.token_ids[:cut], *bridge]
        sampled, _ = sample([context_ids], contract.max_summary_length, contract.eos_token_ids, 1)
        summaries |= settings.of_budgets(indices, sampled)
    in_order = [summaries[j] for j in range(len(contract.budgets))]
    return Rollout.of(prompt_ids, thinking, contract.budgets, contract.markers, in_order)


# Inside generate()


class ThinkingBudgetLogitsProcessor(LogitsProcessor):
    """
    Holds plain `generate()` to a thinking budget, with the tokens that training splices.

    A thinking that reaches the budget is closed by truncation bridge and answer bridge; one that ends before is
    followed by the answer bridge; an answer that reaches its limit is ended by EOS. What to do at a step is read off
    the tokens so far: rows may be at different points, and sampling, streaming and beams need nothing more.

    Args:
        contract ([`AnytimeContract`]):
            Markers and bridges, and the length of an answer.
        budgets (`int` or `Sequence[int]`):
            Budget in thinking tokens, one for all rows or one for each.
        prompt_length (`int`):
            Columns of `input_ids`, padding on the left included.

    Attributes:
        max_new_tokens (`int`):
            What to pass to `generate()`, so that it does not stop earlier than this processor.

    Raises:
        `ValueError`: For a budget that is no positive int.

    Example:

    ```python
    >>> inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    >>> processor = ThinkingBudgetLogitsProcessor(contract, budgets=1000, prompt_length=inputs.input_ids.size(1))
    >>> model.generate(**inputs, logits_processor=[processor], max_new_tokens=processor.max_new_tokens)
    ```
    """

    def __init__(self, contract: AnytimeContract, budgets: int | Sequence[int], prompt_length: int):
        self.budgets = [budgets] if isinstance(budgets, int) else list(budgets)
        for budget in self.budgets:
            check_budgets([budget])
        markers = contract.markers
        self.prompt_length = prompt_length
        self._contract = contract
        self._after_end = torch.tensor(markers.answer_bridge_ids)
        self._after_cut = torch.tensor(markers.truncation_bridge_ids + markers.answer_bridge_ids)
        self.max_new_tokens = max(self.budgets) + markers.max_bridge_length + contract.max_summary_length + 1  # EOS

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores, (B, V), of which only the forced token is left in rows where there is one."""
        forced_B = self.forced(input_ids[:, self.prompt_length :])
        rows = (forced_B >= 0).nonzero()[:, 0]
        forced_scores = torch.full_like(scores[rows], -torch.inf).scatter_(1, forced_B[rows, None], 0.0)
        return cast(torch.FloatTensor, scores.index_copy(0, rows, forced_scores))

    def forced(self, generated: torch.Tensor) -> torch.Tensor:
        """
        The tokens that must come next.

        Args:
            generated (`torch.Tensor`):
                int64 of shape (B, T), the tokens after the prompt.

        Returns:
            `torch.Tensor`: int64 of shape (B,), -1 where the model is free.
        """
        device, (num_rows, length) = generated.device, generated.shape
        # The same number of rows for each prompt, with several sequences or beams
        budget_B = torch.tensor(self.budgets, device=device).repeat_interleave(num_rows // len(self.budgets))
        end_B = self._ends(generated)
        finished_B = end_B <= budget_B
        cut_B = torch.where(finished_B, end_B, budget_B)
        step_B = length - cut_B  # tokens since the thinking
        forced_B = torch.full_like(step_B, -1)
        for rows_B, bridge in ((finished_B, self._after_end), (~finished_B, self._after_cut)):
            in_bridge_B = rows_B & (step_B >= 0) & (step_B < len(bridge))
            forced_B[in_bridge_B] = bridge.to(device)[step_B[in_bridge_B]]
            over_B = rows_B & (step_B >= len(bridge) + self._contract.max_summary_length)
            forced_B[over_B] = self._contract.eos_token_ids[0]
        return forced_B

    def _ends(self, generated: torch.Tensor) -> torch.Tensor:
        """Tokens up to and including the first end of thinking, shape (B,); a very large number without one."""
        marker = torch.tensor(self._contract.markers.think_end_ids, device=generated.device)
        never = torch.full((len(generated),), torch.iinfo(torch.long).max, device=generated.device)
        if generated.size(1) < len(marker):
            return never
        found = (generated.unfold(1, len(marker), 1) == marker).all(dim=2)
        return torch.where(found.any(dim=1), found.int().argmax(dim=1) + len(marker), never)
