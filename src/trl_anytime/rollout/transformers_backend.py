"""Rollouts with transformers: traces are decoded, and summaries are branches on top of their cache."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode, logits_process

from ..modeling.branch_decoding import BranchContext, Trunk, decode_branches
from ..modeling.trace_decoding import decode_traces
from ..outside.host_warnings import without_host_warnings
from .backend import Generation, RolloutSettings
from .markers import EndScan
from .settling import Watch
from .types import Context, Rollout, Thinking

# Settings that a branch can be sampled with, besides repetition_penalty: rules that look at the scores of one token
# alone
_WARPERS = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)
_SEEDS = 2**63 - 1  # number of seeds to draw from


class TransformersGeneration(Generation):
    """
    Both phases with transformers, sampled as `generate()` does. Finished traces leave the batch on the way. Summaries
    are branches on top of the traces' cache.

    Args:
        hold_model (`Callable`):
            Context manager that yields the model, ready to generate. The model has tree attention.
        generation_config ([`~transformers.GenerationConfig`]):
            Settings of sampling.
        pad_token_id (`int`):
            Token that fills up shorter prompts on the left.
        max_cached_tokens (`int`, *optional*):
            Most tokens whose keys and values are held at a time. Prompts and branches are split into as many parts as
            needed. A single rollout may exceed the limit. There is no limit if not set.
    """

    def __init__(
        self,
        hold_model: Callable[[], AbstractContextManager[PreTrainedModel]],
        generation_config: GenerationConfig,
        pad_token_id: int,
        max_cached_tokens: int | None = None,
    ):
        super().__init__()
        self._hold_model = hold_model
        self._generation_config = generation_config
        self._pad_token_id = pad_token_id
        self._max_cached_tokens = max_cached_tokens

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        self.times.seconds.clear()
        prompts = [list(ids) for ids in prompt_ids]
        # A trace, and room for the summaries of one budget
        per_branch = settings.markers.max_bridge_length + settings.max_summary_length
        per_rollout = max(map(len, prompts)) + settings.budgets[-1] + settings.num_summaries * per_branch
        at_once = len(prompts) if self._max_cached_tokens is None else max(1, self._max_cached_tokens // per_rollout)
        rollouts: list[Rollout] = []
        with self._hold_model() as model, torch.no_grad(), _kept_casts(), without_host_warnings():
            _check_tokens(model, prompts, settings)
            parts = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
            if len(parts) == 1:
                return self._roll_out_part(model, prompts, settings)
            # Draws of their own, so that a part that stops early does not change those of the next
            for part, seed in zip(parts, torch.randint(_SEEDS, (len(parts),)).tolist(), strict=True):
                with own_draws(model.device, seed):
                    rollouts += self._roll_out_part(model, part, settings)
        return rollouts

    def _roll_out_part(
        self, model: PreTrainedModel, prompts: list[list[int]], settings: RolloutSettings
    ) -> list[Rollout]:
        watches = [] if settings.stop is None else [settings.stop.watch() for _ in prompts]
        with self.times("thinking"):
            traces, trunk = self._think(model, prompts, settings, watches)
        with self.times("summarising"):
            return self._summarise(model, prompts, traces, trunk, settings, watches)

    def _think(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        settings: RolloutSettings,
        watches: Sequence[Watch] = (),
    ) -> tuple[list[Thinking], Trunk]:
        """
        Sample one trace for each prompt, and return them with the trunk of their keys and values.

        With `watches`, one for each prompt, a trace ends when its answers have settled. If tokens are drawn, its row
        stays in the batch as long as it would without. The draws of the other rows depend on it.
        """
        choose, needs_history = self._choice(model)
        scans = [EndScan(settings.markers) for _ in prompts]
        stop_ids = set(settings.stop_token_ids)

        def find_end(row: int, token_ids: list[int], seen: int) -> int | None:
            return _length(token_ids, seen, stop_ids, scans[row])

        def settle(trunk: Trunk, sampled: list[list[int]], rows: list[int], cut: int) -> list[int]:
            answers = self._check(model, trunk, prompts, sampled, rows, cut, settings)
            return [row for row, own in zip(rows, answers, strict=True) if watches[row].add(cut, own)]

        sampled, trunk = decode_traces(
            model,
            prompts,
            choose,
            find_end,
            needs_history=needs_history,
            stop_token_ids=stop_ids,
            max_new_tokens=settings.budgets[-1],
            pad_token_id=self._pad_token_id,
            settle=settle if watches else None,
            settle_every=1 if settings.stop is None else settings.stop.every,
            settled_leave=bool(watches) and not prepared_sampling(model, self._generation_config)[1],
        )
        traces = [Thinking.from_tokens(ids, settings.markers, settings.eos_token_ids) for ids in sampled]
        for row, watch in enumerate(watches):
            if watch.settled_at is not None:
                traces[row] = traces[row].stopped(watch.settled_at)
        return traces, trunk

    def _check(
        self,
        model: PreTrainedModel,
        trunk: Trunk,
        prompts: list[list[int]],
        sampled: list[list[int]],
        rows: list[int],
        cut: int,
        settings: RolloutSettings,
    ) -> list[list[list[int]]]:
        """Sample the summaries of a check for some rows. The draws of the thinking are not touched."""
        context = settings.check_context(cut)
        traces = [Thinking(ids, finished=False, ended_with_eos=False) for ids in sampled]
        with own_draws(model.device):
            return self._decode(model, trunk, [(row, context) for row in rows], prompts, traces, settings)

    def _summarise(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        traces: list[Thinking],
        trunk: Trunk,
        settings: RolloutSettings,
        watches: Sequence[Watch] = (),
    ) -> list[Rollout]:
        contexts = [settings.contexts(thinking) for thinking in traces]
        if not settings.num_summaries:
            return [
                Rollout.assemble(prompts[i], traces[i], contexts[i], [[] for _ in contexts[i]])
                for i in range(len(prompts))
            ]
        checks = [watch.checks for watch in watches] or [[] for _ in prompts]
        slots = [(i, context) for i, trace_contexts in enumerate(contexts) for context in trace_contexts]
        known = [settings.known_summaries(context, checks[i]) for i, context in slots]
        missing = [slot for slot, summaries in zip(slots, known, strict=True) if summaries is None]
        decoded = iter(self._decode(model, trunk, missing, prompts, traces, settings))
        in_order = iter([next(decoded) if summaries is None else summaries for summaries in known])
        return [
            replace(
                Rollout.assemble(prompts[i], traces[i], contexts[i], list(islice(in_order, len(contexts[i])))),
                checks=checks[i],
            )
            for i in range(len(prompts))
        ]

    def _decode(
        self,
        model: PreTrainedModel,
        trunk: Trunk,
        slots: list[tuple[int, Context]],
        prompts: list[list[int]],
        traces: list[Thinking],
        settings: RolloutSettings,
    ) -> list[list[list[int]]]:
        """Sample the summaries of contexts, each given with the index of its rollout."""
        if not slots:
            return []
        branch_contexts = []
        for i, context in slots:
            history = context.token_ids(prompts[i], traces[i])
            seen = min(trunk.lengths[i], len(prompts[i]) + context.cut)
            branch_contexts.append(BranchContext(i, seen, history[seen:], context.num_summaries, history))

        choose, needs_history = self._choice(model)
        decoded: list[list[list[int]]] = [[] for _ in slots]
        for part in self._parts(branch_contexts, settings, trunk.num_tokens):
            branches = decode_branches(
                model,
                trunk,
                [context for _, context in part],
                choose,
                needs_history=needs_history,
                eos_token_ids=settings.eos_token_ids,
                max_new_tokens=settings.max_summary_length,
            )
            for (c, _), context_samples in zip(part, branches, strict=True):
                decoded[c] += context_samples
        return decoded

    def _parts(
        self, contexts: list[BranchContext], settings: RolloutSettings, held: int
    ) -> Iterator[list[tuple[int, BranchContext]]]:
        """Yield contexts with their index, in parts whose branches fit beside the `held` tokens of the trunk."""
        if self._max_cached_tokens is None:
            yield list(enumerate(contexts))
            return
        part: list[tuple[int, BranchContext]] = []
        room = self._max_cached_tokens - held
        for c, context in enumerate(contexts):
            per_branch = len(context.token_ids) + settings.max_summary_length
            remaining = context.num_branches
            while remaining:
                fitting = room // per_branch
                if fitting < 1 and part:
                    yield part
                    part, room = [], self._max_cached_tokens - held
                    continue
                taken = min(max(fitting, 1), remaining)
                part.append((c, replace(context, num_branches=taken)))
                room -= taken * per_branch
                remaining -= taken
        yield part

    def _choice(self, model: PreTrainedModel) -> tuple[Callable[..., torch.Tensor], bool]:
        """Return the function that chooses next tokens, and whether it looks at the tokens so far."""
        processors, do_sample = prepared_sampling(model, self._generation_config)
        # It takes several passes over the vocabulary to find what `next_tokens` finds anyway
        removes = logits_process.InfNanRemoveLogitsProcessor
        kept = LogitsProcessorList(processor for processor in processors if not isinstance(processor, removes))
        return partial(_choose, kept, do_sample, len(kept) < len(processors)), needs_history(kept)


def _check_tokens(model: PreTrainedModel, prompts: list[list[int]], settings: RolloutSettings) -> None:
    """Refuse tokens without an embedding on the host: a GPU would end the process without a cause."""
    size = model.config.get_text_config().vocab_size
    markers = settings.markers
    bridges = [*markers.truncation_bridge_ids, *markers.answer_bridge_ids]
    for name, ids in (("A prompt", [token for prompt in prompts for token in prompt]), ("A bridge", bridges)):
        wrong = next((token for token in ids if not 0 <= token < size), None)
        if wrong is not None:
            raise ValueError(
                f"{name} has token {wrong}, but the model has only {size} tokens. Use the model's own tokenizer, "
                "or add embeddings with `model.resize_token_embeddings(len(tokenizer))`."
            )


@contextmanager
def _kept_casts() -> Iterator[None]:
    """
    Keep the weights that autocast has cast, up to the end of the context.

    Accelerate turns autocast on and off around each call of the model, which would cast all weights for each token.
    """
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


@contextmanager
def own_draws(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """
    Seed the generators of PyTorch inside, and leave them as they were.

    Without a seed, it is drawn from their state, so that the same run draws the same. With that state itself, a check
    would draw by the numbers that the thinking draws by next.
    """
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(int(torch.randint(_SEEDS, ())) if seed is None else seed)
        yield


def _length(token_ids: list[int], start: int, stop_ids: set[int], scan: EndScan) -> int | None:
    """Return the number of tokens up to the end of thinking or the first stop after `start`, or `None`."""
    stop = next((i + 1 for i in range(start, len(token_ids)) if token_ids[i] in stop_ids), None)
    ends = (stop, scan.end_of_thinking(token_ids))
    return min((end for end in ends if end is not None), default=None)


def _choose(
    logits_processor: LogitsProcessorList,
    do_sample: bool,
    remove_invalid: bool,
    token_ids: torch.Tensor | None,
    logits: torch.Tensor,
) -> torch.Tensor:
    """
    Choose the next tokens as `generate()` does; broken logits give -1.

    See [`~trl_anytime.modeling.branch_decoding.decode_branches`] and
    [`~trl_anytime.modeling.trace_decoding.decode_traces`].
    """
    tokens = next_tokens(logits_processor(cast(torch.LongTensor, token_ids), logits.float()), do_sample)
    return tokens.clamp(min=0) if remove_invalid else tokens


def next_tokens(scores: torch.Tensor, do_sample: bool, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Draw tokens, or take the likeliest.

    Args:
        scores (`torch.Tensor`):
            Logits, shape (B, V).
        do_sample (`bool`):
            Whether to draw.
        generator (`torch.Generator`, *optional*):
            Draws in place of the device's own.

    Returns:
        `torch.Tensor`: shape (B,), -1 where the logits are no distribution.
    """
    if not do_sample:
        largest, tokens = scores.max(dim=-1)
        return tokens.masked_fill(~largest.isfinite(), -1)
    weights = scores.softmax(dim=-1)
    # What `torch.multinomial` computes for one draw, without its passes over all weights for its own assertions. One
    # number that is not finite makes all weights of its row NaN.
    noise = torch.empty_like(weights).exponential_(generator=generator)
    tokens = torch.div(weights, noise, out=noise).argmax(dim=-1)
    return tokens.masked_fill(weights[:, 0].isnan(), -1)


def needs_history(logits_processor: LogitsProcessorList) -> bool:
    """Return whether any of the processors looks at the tokens so far."""
    return any(not isinstance(processor, _WARPERS) for processor in logits_processor)


def prepared_sampling(model: PreTrainedModel, generation_config: GenerationConfig) -> tuple[LogitsProcessorList, bool]:
    """
    Return the logits processors of `generate()`, and whether it samples.

    `generate()` makes them from `generation_config` and the model's own configuration.
    """

    def take(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **kwargs: Any,
    ) -> Any:
        return logits_processor, generation_config.do_sample

    some_token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    config = copy.deepcopy(generation_config)
    config.max_new_tokens, config.cache_implementation = 1, None
    return cast(Any, model).generate(
        some_token, attention_mask=some_token, generation_config=config, custom_generate=take
    )


def unsupported_sampling(model: PreTrainedModel, generation_config: GenerationConfig) -> str | None:
    """Return why branches cannot be sampled as `generation_config` asks, or `None`."""
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        return f"it does not support {mode.value.replace('_', ' ')}"
    allowed = (*_WARPERS, logits_process.RepetitionPenaltyLogitsProcessor)
    others = sorted(
        type(processor).__name__
        for processor in prepared_sampling(model, generation_config)[0]
        if not isinstance(processor, allowed)
    )
    return f"it does not support {', '.join(others)}" if others else None
