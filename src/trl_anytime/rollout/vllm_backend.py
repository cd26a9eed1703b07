"""
Both phases of a rollout in a vLLM engine, in a loop of this package over the engine's steps.

In training, the engine is that of [`~trl.generation.vllm_generation.VLLMGeneration`] in colocate mode, with its
sampling settings. For its server mode see [`~trl_anytime.rollout.vllm_server`].
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Self

import torch
from accelerate.utils import is_peft_model
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from .backend import Generation, RolloutSettings
from .markers import EndScan
from .sampling import BUDGET_FIELD, NO_BUDGET
from .settling import Watch
from .types import Rollout, Thinking

if is_vllm_available():
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

# Most steps in a row without a token while requests are unfinished. After them the engine counts as stuck. A long
# prompt is computed in parts, in several such steps (TRL sets 4096 tokens for one). An engine that cannot place its
# requests in its cache makes only such steps.
_MOST_EMPTY_STEPS = 1000


@dataclass(eq=False)
class Continuation:
    """
    Tokens that an engine has sampled so far for one request.

    Args:
        request_id (`str`):
            Name of the request.
        token_ids (`list[int]`):
            The tokens.
        logprobs (`list[float]`):
            Their log-probabilities in the sampling distribution.
        finished (`bool`):
            Whether the continuation is complete, or was aborted.
        num_cached_tokens (`int`):
            Tokens of its prompt whose keys and values the engine still had.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    num_cached_tokens: int = 0


class EngineLoop:
    """
    Requests to an engine, and the tokens that have come for them step by step.

    As a context manager it leaves no request in the engine, whatever ends it.

    This is the only place that uses vLLM's engine. The members used are the same in vLLM 0.22 and 0.31.

    Args:
        engine (`vllm.v1.engine.llm_engine.LLMEngine`):
            The engine.
    """

    def __init__(self, engine: Any):
        self._engine = engine
        self._unfinished: dict[str, Continuation] = {}
        self._num_requests = 0
        self._num_empty_steps = 0
        self.num_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        if self.has_unfinished:
            with suppress(Exception):  # a dead engine cannot abort either; the first error is the one to report
                self.abort(list(self._unfinished.values()))

    @property
    def has_unfinished(self) -> bool:
        """Return whether any continuation is unfinished."""
        return bool(self._unfinished)

    def add(self, prompt_ids: list[int], sampling: dict[str, Any]) -> Continuation:
        """
        Request one continuation of `prompt_ids`.

        Raises:
            `ValueError`: If the continuation might not fit into the engine's context. The engine would cut it short.
        """
        context = self._engine.model_config.max_model_len
        if len(prompt_ids) + sampling["max_tokens"] > context:
            raise ValueError(
                f"A prompt of {len(prompt_ids)} tokens and {sampling['max_tokens']} new ones need more than vLLM's "
                f"context of {context}. Raise `vllm_max_model_length`, lower `budgets` or `max_summary_length`, or "
                "drop the longest prompts."
            )
        # Get only new tokens. Otherwise the whole trace would be copied for each of its tokens.
        sampling = {"extra_args": {BUDGET_FIELD: NO_BUDGET}, **sampling}
        params = SamplingParams(**sampling, n=1, output_kind=RequestOutputKind.DELTA)
        continuation = Continuation(f"rollout-{self._num_requests}")
        self._num_requests += 1
        self._engine.add_request(continuation.request_id, {"prompt_token_ids": prompt_ids}, params)
        self._unfinished[continuation.request_id] = continuation
        return continuation

    def step(self) -> list[Continuation]:
        """
        Let the engine make one step.

        Returns:
            `list[Continuation]`: Those that grew or are complete.

        Raises:
            `RuntimeError`: If the engine fails or makes no progress.
        """
        waiting = f"{len(self._unfinished)} of {self._num_requests} continuations unfinished"
        try:
            outputs = self._engine.step()
        except Exception as error:  # whatever it is, say what it interrupted
            raise RuntimeError(
                f"The vLLM engine failed in step {self.num_steps + 1} of a generation batch, with {waiting}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self.num_steps += 1
        self._num_empty_steps = 0 if outputs else self._num_empty_steps + 1
        if self._num_empty_steps > _MOST_EMPTY_STEPS:
            raise RuntimeError(
                f"The vLLM engine has sampled nothing in {_MOST_EMPTY_STEPS} steps, with {waiting}. Its KV cache has "
                "no room for them. Raise `vllm_gpu_memory_utilization`, or lower `budgets`."
            )

        grown = []
        for output in outputs:
            continuation = self._unfinished[output.request_id]
            (delta,) = output.outputs
            continuation.token_ids += delta.token_ids
            continuation.logprobs += [
                candidates[token].logprob for token, candidates in zip(delta.token_ids, delta.logprobs, strict=True)
            ]
            continuation.num_cached_tokens = output.num_cached_tokens
            if output.finished:
                del self._unfinished[continuation.request_id]
                continuation.finished = True
            grown.append(continuation)
        return grown

    def abort(self, continuations: Sequence[Continuation]) -> None:
        """End unfinished continuations where they are."""
        self._engine.abort_request([continuation.request_id for continuation in continuations])
        for continuation in continuations:
            del self._unfinished[continuation.request_id]
            continuation.finished = True


@dataclass
class _OpenRollout:
    """
    Rollout that is being sampled.

    Args:
        prompt_ids (`list[int]`):
            The rendered prompt.
        number (`int`):
            Number of its thinking among all continuations. The numbers of its summaries follow.
        sampled (`Continuation`):
            Its thinking.
        summaries (`list[list[Continuation]]`):
            A summaries for each budget, as far as they have been requested.
        num_context_tokens (`int`):
            Tokens of the summaries' contexts.
        scan ([`EndScan`]):
            Search for the end of its thinking.
        watch ([`Watch`], *optional*):
            State of the rule that ends its thinking when it has settled.
        checks (`list[list[Continuation]]`):
            Summaries of its checks, as far as they have been requested.
    """

    prompt_ids: list[int]
    number: int
    sampled: Continuation
    scan: EndScan
    watch: Watch | None = None
    checks: list[list[Continuation]] = field(default_factory=list)
    summaries: list[list[Continuation]] = field(default_factory=list)
    num_context_tokens: int = 0

    def has_ended(self) -> bool:
        """Return whether the end of thinking is among the tokens so far."""
        return self.scan.end_of_thinking(self.sampled.token_ids) is not None

    def thinking(self, settings: RolloutSettings) -> Thinking:
        """Return the thinking so far, or up to where it had settled."""
        thinking = Thinking.from_tokens(
            self.sampled.token_ids, settings.markers, settings.eos_token_ids, logprobs=self.sampled.logprobs
        )
        settled_at = None if self.watch is None else self.watch.settled_at
        return thinking if settled_at is None else thinking.stopped(settled_at)

    def num_passed(self, budgets: list[int]) -> int:
        """Return how many of the budgets cut the thinking at a place that is already certain."""
        return len(budgets) if self.sampled.finished else bisect_right(budgets, len(self.sampled.token_ids))

    def has_open_checks(self) -> bool:
        """
        Judge the complete checks in order, and return whether others may still end the thinking.

        The thinking goes on while a check is answered, so the answers may come after its end.
        """
        if self.watch is None:
            return False
        for summaries in self.checks[len(self.watch.checks) :]:
            if self.watch.settled_at is not None:
                break
            if not all(summary.finished for summary in summaries):
                return True
            self.watch.add(self.watch.next_cut, [summary.token_ids for summary in summaries])
        return False

    def close(self, settings: RolloutSettings) -> Rollout:
        """Make the complete rollout."""
        rollout = Rollout.from_budgets(
            self.prompt_ids,
            self.thinking(settings),
            settings.budgets,
            settings.markers,
            [[summary.token_ids for summary in at_budget] for at_budget in self.summaries],
            [[summary.logprobs for summary in at_budget] for at_budget in self.summaries],
        )
        return rollout if self.watch is None else replace(rollout, checks=self.watch.checks)


class EngineGeneration(Generation):
    """
    The two phases in a vLLM engine.

    The context of a summary is a prefix that the engine has just computed, so its keys and values are in the prefix
    cache. With `overlap`, the summaries at a budget are requested as soon as the thinking has passed it. They take the
    places of traces that have ended while others still run.

    Args:
        engine (`vllm.v1.engine.llm_engine.LLMEngine`):
            The engine, `llm.llm_engine` of a `vllm.LLM`.
        sampling (`dict[str, Any]`, *optional*):
            Parameters of vLLM's `SamplingParams` for both phases. A `seed` gives every continuation a seed of its own,
            counted from there.
        overlap (`bool`, *optional*, defaults to `True`):
            Whether the phases overlap.

    Attributes:
        num_steps (`int`):
            Steps of the engine in the last call.
        num_context_tokens (`int`):
            Tokens of all summaries' contexts in the last call.
        num_cached_tokens (`int`):
            Number of these tokens that the prefix cache had.

    Raises:
        `ValueError`: If the engine has no prefix cache.
    """

    def __init__(self, engine: Any, sampling: dict[str, Any] | None = None, overlap: bool = True):
        super().__init__()
        self._engine = engine
        self._parameters = {"logprobs": 0, **(sampling or {})}
        self._overlap = overlap
        self.num_steps = self.num_context_tokens = self.num_cached_tokens = self._next_number = 0
        if not engine.vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                "The vLLM engine runs without a prefix cache, so every summary would compute its thinking again. vLLM "
                "switches the cache off for models that it cannot cache, such as many recurrent and hybrid ones. Set "
                "`use_vllm=False` for them."
            )

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        self.times.seconds.clear()
        with EngineLoop(self._engine) as loop:
            rollouts = self._run(loop, [list(ids) for ids in prompt_ids], settings)
        self.num_steps = loop.num_steps
        self.num_context_tokens = sum(rollout.num_context_tokens for rollout in rollouts)
        self.num_cached_tokens = sum(
            summary.num_cached_tokens
            for rollout in rollouts
            for summary in dict.fromkeys(
                chain.from_iterable(rollout.checks + rollout.summaries)
            )  # once each, as budgets may share them
        )
        return [rollout.close(settings) for rollout in rollouts]

    def _run(self, loop: EngineLoop, prompts: list[list[int]], settings: RolloutSettings) -> list[_OpenRollout]:
        with self.times("thinking"):
            sampling = self._sampling(settings.budgets[-1], settings.stop_token_ids)
            per_rollout = 1 + len(settings.budgets) * settings.num_summaries
            numbers = range(0, len(prompts) * per_rollout, per_rollout)
            stop = settings.stop
            rollouts = [
                _OpenRollout(
                    prompt,
                    number,
                    loop.add(prompt, _with_seed(sampling, number)),
                    EndScan(settings.markers),
                    None if stop is None else stop.watch(),
                )
                for prompt, number in zip(prompts, numbers, strict=True)
            ]
            thinking = {rollout.sampled: rollout for rollout in rollouts}
            self._next_number = len(prompts) * per_rollout  # of the checks, so that the others keep their seeds
            while thinking or any(rollout.has_open_checks() for rollout in rollouts):
                grown = loop.step()
                for continuation in grown:
                    rollout = thinking.get(continuation)
                    if rollout is None:
                        continue  # a summary
                    # A marker that is found in the text does not stop the engine
                    if rollout.has_ended() and not continuation.finished:
                        loop.abort([continuation])
                    if stop is not None:
                        self._request_checks(loop, rollout, settings)
                    if continuation.finished:
                        del thinking[continuation]
                    if self._overlap and stop is None:  # where a trace will be cut is not known before
                        self._summarise(loop, rollout, settings)
                if stop is not None:
                    self._end_settled(loop, rollouts, thinking)
        with self.times("summarising"):
            for rollout in rollouts:
                self._summarise(loop, rollout, settings)
            while loop.has_unfinished:
                loop.step()
        return rollouts

    def _request_checks(self, loop: EngineLoop, rollout: _OpenRollout, settings: RolloutSettings) -> None:
        """Request the summaries of all checks that the thinking has passed since the last call."""
        stop = settings.stop
        assert stop is not None
        end = rollout.scan.end_of_thinking(rollout.sampled.token_ids)
        length = len(rollout.sampled.token_ids) if end is None else end
        if rollout.sampled.finished:  # nothing is left to end where the thinking ended
            length -= 1
        sampling = self._sampling(settings.max_summary_length, settings.eos_token_ids)
        for check in range(len(rollout.checks), length // stop.every):
            context = settings.check_context((check + 1) * stop.every)
            token_ids = context.token_ids(rollout.prompt_ids, rollout.thinking(settings))
            first = self._next_number
            rollout.checks.append(
                [loop.add(token_ids, _with_seed(sampling, first + a)) for a in range(context.num_summaries)]
            )
            self._next_number += context.num_summaries
            rollout.num_context_tokens += context.num_summaries * len(token_ids)

    def _end_settled(
        self, loop: EngineLoop, rollouts: list[_OpenRollout], thinking: dict[Continuation, _OpenRollout]
    ) -> None:
        """End the thinking that has settled, and the checks behind that place."""
        for rollout in rollouts:
            rollout.has_open_checks()
            if rollout.watch is None or rollout.watch.settled_at is None:
                continue
            behind = [summary for check in rollout.checks[len(rollout.watch.checks) :] for summary in check]
            loop.abort([c for c in (rollout.sampled, *behind) if not c.finished])
            thinking.pop(rollout.sampled, None)

    def _summarise(self, loop: EngineLoop, rollout: _OpenRollout, settings: RolloutSettings) -> None:
        """Request the summaries at all budgets that the thinking has passed since the last call."""
        passed = range(len(rollout.summaries), rollout.num_passed(settings.budgets))
        if not passed:
            return
        thinking, num_summaries = rollout.thinking(settings), settings.num_summaries
        sampling = self._sampling(settings.max_summary_length, settings.eos_token_ids)
        for j in passed:
            cut, bridge = thinking.cut(settings.budgets[j], settings.markers)
            if (
                settings.share_summaries
                and j
                and (cut, bridge) == thinking.cut(settings.budgets[j - 1], settings.markers)
            ):
                rollout.summaries.append(rollout.summaries[-1])
                continue
            at_check = self._summaries_of_check(rollout, cut, bridge, settings)
            if at_check is not None:
                rollout.summaries.append(at_check)
                continue
            context = [*rollout.prompt_ids, *thinking.token_ids[:cut], *bridge]
            first = rollout.number + 1 + j * num_summaries
            rollout.summaries.append(
                [loop.add(context, _with_seed(sampling, first + a)) for a in range(num_summaries)]
            )
            rollout.num_context_tokens += num_summaries * len(context)

    def _summaries_of_check(
        self, rollout: _OpenRollout, cut: int, bridge: tuple[int, ...], settings: RolloutSettings
    ) -> list[Continuation] | None:
        """Return the summaries at a cut that a check has sampled there, or `None` if there are not enough."""
        if rollout.watch is None or not settings.markers.is_forced(bridge):
            return None
        for check, summaries in zip(rollout.watch.checks, rollout.checks, strict=False):
            if check.cut == cut and len(summaries) >= settings.num_summaries:
                return summaries[: settings.num_summaries]
        return None

    def _sampling(self, max_tokens: int, stop_token_ids: list[int]) -> dict[str, Any]:
        """Return the sampling parameters of one phase."""
        return {**self._parameters, "max_tokens": max_tokens, "stop_token_ids": stop_token_ids}


class ColocateGeneration(EngineGeneration):
    """
    The two phases in the engine that TRL's colocate mode has in this process, between one wake and one sleep.

    A `seed` in `generation_kwargs` gives every continuation a seed of its own, counted from there.

    Args:
        vllm_generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's backend, in colocate mode. TRL synchronises its weights before each rollout.
        overlap (`bool`, *optional*, defaults to `True`):
            Whether the phases overlap.
    """

    def __init__(self, vllm_generation: VLLMGeneration, overlap: bool = True):
        super().__init__(vllm_generation.llm.llm_engine, overlap=overlap)
        self._vllm = vllm_generation

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        with self._awake():
            prompts, own = self._prompts_of_group([list(ids) for ids in prompt_ids])
            return super().roll_out(prompts, settings)[own]

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Wake the engine if it sleeps between generations, and let it sleep again."""
        if not self._vllm.enable_sleep_mode:
            yield
            return
        if self._vllm._llm_weights_sleeping:  # sleep has discarded them, and TRL had no reason to send new ones
            self._vllm.sync_weights()
        try:
            self._vllm.llm.wake_up(tags=["kv_cache"])
            yield
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self._sleep()
            raise
        self._sleep()

    def _sleep(self) -> None:
        self._vllm._llm_weights_sleeping = True
        self._vllm.llm.sleep(level=2)

    def _prompts_of_group(self, prompts: list[list[int]]) -> tuple[list[list[int]], slice]:
        """
        Return the prompts of all ranks that share this engine by tensor parallelism, and this rank's slice.

        Each of these ranks has a scheduler of its own, and all schedulers must make the same decisions. So requests
        and their times may depend only on these prompts and on the tokens that come. Both are the same on all these
        ranks.
        """
        size = self._vllm.tensor_parallel_size
        if size == 1:
            return prompts, slice(None)
        gathered: list[Any] = [None] * size
        torch.distributed.all_gather_object(gathered, prompts, group=self._vllm.tp_group)
        if is_peft_model(self._vllm.model):  # as TRL does, against https://github.com/huggingface/trl/issues/3671
            torch.distributed.barrier(device_ids=[self._vllm.accelerator.local_process_index])
        first = torch.distributed.get_rank(group=self._vllm.tp_group) * len(prompts)
        return [ids for part in gathered for ids in part], slice(first, first + len(prompts))

    def _sampling(self, max_tokens: int, stop_token_ids: list[int]) -> dict[str, Any]:
        """Return the sampling parameters of one phase. All others are those of `VLLMGeneration.generate`."""
        vllm = self._vllm
        return {
            "repetition_penalty": vllm.repetition_penalty,
            "temperature": vllm.temperature,
            "top_p": vllm.top_p,
            "top_k": vllm.top_k,
            "min_p": 0.0 if vllm.min_p is None else vllm.min_p,
            "logprobs": vllm.logprobs,
            **vllm.generation_kwargs,
            "max_tokens": max_tokens,
            "stop_token_ids": stop_token_ids,
        }


def _with_seed(sampling: dict[str, Any], number: int) -> dict[str, Any]:
    """
    Return the parameters of one continuation.

    With one seed for all, the summaries of a cut would be the same.
    """
    seed = sampling.get("seed")
    return sampling if seed is None else {**sampling, "seed": seed + number}
