"""Rollouts with transformers: `generate()` thinks, and summaries are branches on top of its cache."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import GenerationMode, logits_process

from ..modeling.branch_decoding import BranchContext, Trunk, decode_branches
from ..modeling.growing_cache import growing_cache
from ..outside.host_warnings import without_host_warnings
from .backend import Generation, RolloutSettings
from .markers import EndScan
from .types import Rollout, Thinking

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
# Once this share of the rows has finished, thinking continues without them, which copies the cache of the others
_FINISHED_SHARE = 0.25


class TransformersGeneration(Generation):
    """
    Both phases with transformers. `generate()` samples the thinking and drops finished rows on the way. Summaries are
    branches on top of its cache.

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
        with self._hold_model() as model, torch.no_grad(), without_host_warnings():
            for start in range(0, len(prompts), at_once):
                part = prompts[start : start + at_once]
                with self.times("thinking"):
                    traces, trunks = self._think(model, part, settings)
                with self.times("summarising"):
                    rollouts += self._summarise(model, part, traces, trunks, settings)
        return rollouts

    def _think(
        self, model: PreTrainedModel, prompts: list[list[int]], settings: RolloutSettings
    ) -> tuple[list[Thinking], list[Trunk]]:
        """Sample one trace for each prompt, and return them with the trunks of their keys and values."""
        width, most = max(map(len, prompts)), settings.budgets[-1]
        padded = [[self._pad_token_id] * (width - len(ids)) + ids for ids in prompts]
        token_ids = torch.tensor(padded, device=model.device)
        starts = torch.tensor([width - len(ids) for ids in prompts], device=model.device)
        rows = list(range(len(prompts)))  # the index of the prompt that each row thinks about
        cache = growing_cache(max_length=width + most)
        sampled: list[list[int]] = [[] for _ in prompts]
        scans = [EndScan(settings.markers) for _ in prompts]
        running, trunks = set(rows), []
        # `generate()` runs until the last row has finished. So it is called for some tokens at a time, and finished
        # rows are removed in between.
        config = self._config(max(8, most // 64), settings.stop_token_ids)
        stop_ids = set(settings.stop_token_ids)
        while running:
            before = token_ids.size(1) - width
            attention_mask = (torch.arange(token_ids.size(1), device=model.device) >= starts[:, None]).long()
            config.max_new_tokens = min(config.max_new_tokens, most - before)
            token_ids = cast(Any, model).generate(
                token_ids, attention_mask=attention_mask, past_key_values=cache, generation_config=config
            )
            for row, new in zip(rows, token_ids[:, width + before :].tolist(), strict=True):
                if row in running:
                    sampled[row] += new
                    length = _length(sampled[row], before, stop_ids, scans[row])
                    if length is not None or before + len(new) == most:
                        sampled[row] = sampled[row][:length]
                        running.remove(row)

            finished = [r for r, row in enumerate(rows) if row not in running]
            if running and len(finished) <= _FINISHED_SHARE * len(rows):
                continue
            trunk = Trunk.from_cache(cache, starts, rows)
            if not running:
                trunks.append(trunk)
                break
            trunks.append(trunk.select(finished))
            live = torch.tensor([r for r, row in enumerate(rows) if row in running], device=model.device)
            cache.batch_select_indices(live)
            token_ids, starts = token_ids[live], starts[live]
            rows = [row for row in rows if row in running]
        return [Thinking.from_tokens(ids, settings.markers, settings.eos_token_ids) for ids in sampled], trunks

    def _summarise(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        traces: list[Thinking],
        trunks: list[Trunk],
        settings: RolloutSettings,
    ) -> list[Rollout]:
        cached = {
            rollout: trunk.layers[0][0].size(2) - start
            for trunk in trunks
            for rollout, start in zip(trunk.rollouts, trunk.starts.tolist(), strict=True)
        }
        contexts = [settings.contexts(thinking) for thinking in traces]
        if not settings.num_summaries:
            return [
                Rollout.assemble(prompts[i], traces[i], contexts[i], [[] for _ in contexts[i]])
                for i in range(len(prompts))
            ]
        slots = [(i, context) for i, trace_contexts in enumerate(contexts) for context in trace_contexts]
        branch_contexts = []
        for i, context in slots:
            history = context.token_ids(prompts[i], traces[i])
            seen = min(cached[i], len(prompts[i]) + context.cut)
            branch_contexts.append(BranchContext(i, seen, history[seen:], context.num_summaries, history))

        logits_processor, do_sample = prepared_sampling(model, self._generation_config)
        held = sum(trunk.layers[0][0].size(2) * len(trunk.rollouts) for trunk in trunks)
        decoded: list[list[list[int]]] = [[] for _ in slots]
        for part in self._parts(branch_contexts, settings, held):
            branches = decode_branches(
                model,
                trunks,
                [context for _, context in part],
                partial(_choose, logits_processor, do_sample),
                needs_history=needs_history(logits_processor),
                eos_token_ids=settings.eos_token_ids,
                max_new_tokens=settings.max_summary_length,
            )
            for (c, _), context_samples in zip(part, branches, strict=True):
                decoded[c] += context_samples
        rest = iter(decoded)
        return [
            Rollout.assemble(prompts[i], traces[i], contexts[i], list(islice(rest, len(contexts[i]))))
            for i in range(len(prompts))
        ]

    def _parts(
        self, contexts: list[BranchContext], settings: RolloutSettings, held: int
    ) -> Iterator[list[tuple[int, BranchContext]]]:
        """Yield contexts with their index, in parts whose branches fit beside the `held` tokens of the trunks."""
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

    def _config(self, max_new_tokens: int, eos_token_ids: list[int]) -> GenerationConfig:
        config = copy.deepcopy(self._generation_config)
        config.max_new_tokens, config.eos_token_id, config.pad_token_id = (
            max_new_tokens,
            eos_token_ids,
            self._pad_token_id,
        )
        config.cache_implementation = None  # `generate()` refuses it beside a cache
        return config


def _length(token_ids: list[int], start: int, stop_ids: set[int], scan: EndScan) -> int | None:
    """Return the number of tokens up to the end of thinking or the first stop after `start`, or `None`."""
    stop = next((i + 1 for i in range(start, len(token_ids)) if token_ids[i] in stop_ids), None)
    ends = (stop, scan.end_of_thinking(token_ids))
    return min((end for end in ends if end is not None), default=None)


def _choose(
    logits_processor: LogitsProcessorList, do_sample: bool, token_ids: torch.Tensor | None, logits: torch.Tensor
) -> torch.Tensor:
    """
    Choose the next tokens as `generate()` does.

    See [`~trl_anytime.modeling.branch_decoding.decode_branches`].
    """
    scores = logits_processor(cast(torch.LongTensor, token_ids), logits.float())
    return torch.multinomial(scores.softmax(dim=-1), 1)[:, 0] if do_sample else scores.argmax(dim=-1)


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
