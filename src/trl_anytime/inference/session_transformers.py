"""Thinking and answers of a session by a model of transformers, on keys and values that are kept."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from inspect import signature
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, StoppingCriteria

from ..modeling.branch_decoding import BranchContext, Trunk, decode_branches, refuse_broken_logits
from ..modeling.growing_cache import growing_cache, refill_cache
from ..modeling.support import admit, branching_mismatch
from ..modeling.tree_attention import enable_tree_attention, plain_attention
from ..outside.host_warnings import without_host_warnings
from ..outside.validation import MOST_TOKEN_ID
from ..rollout.transformers_backend import needs_history, next_tokens, prepared_sampling, unsupported_sampling
from .anytime_config import AnytimeConfig
from .session_backends import SessionBackend, Show, Trace, derived_seed

# Entries of each weight that go into a fingerprint
_ENTRIES = 1024
# In place of an EOS token, where `generate()` would otherwise take the model's own
_NO_TOKEN = MOST_TOKEN_ID


class _Draw:
    """Logits processor that leaves one token possible: one that is given, or one that is drawn by its own seed."""

    def __init__(
        self,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        before: list[int],
        given: dict[int, int],
    ):
        self._choose, self._before, self._given = choose, before, given

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        input_ids = torch.cat([input_ids.new_tensor([self._before]), input_ids], dim=1)
        given = self._given.get(input_ids.size(1))
        token = self._choose(input_ids, scores) if given is None else input_ids.new_tensor([given])
        refuse_broken_logits(int(token.item() < 0), 1, "traces")
        return torch.full_like(scores, -torch.inf).scatter_(1, token[:, None], 0.0)


class _Take(StoppingCriteria):
    """Stopping criterion that hands on each token as it comes."""

    def __init__(self, take: Callable[[int], bool]):
        self._take = take

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((1,), self._take(int(input_ids[0, -1])), device=input_ids.device)


class TransformersSession(SessionBackend):
    """
    Backend of a model of transformers. It keeps keys and values, and branches off for answers.

    The cache has all tokens but the last, as in `generate()`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model. It is left as it was after each call.
        config ([`AnytimeConfig`]):
            Settings of the session.
        seed (`int`):
            Seed of the session.
        context (`int`, *optional*):
            Tokens that the model can hold.
    """

    name = "transformers"

    def __init__(self, model: Any, config: AnytimeConfig, seed: int, context: int | None):
        # As recurrent models have it in transformers 5.10, where they go on with other tokens
        if "cache_params" in signature(model.forward).parameters:
            raise ValueError(
                f"{type(model).__name__} of transformers {version('transformers')} cannot go on from a state that is "
                "kept. Update transformers."
            )
        self._model, self._seed, self._context = model, seed, context
        self._generation_config = config.sampling.generation_config()
        with self._ready():
            checks = (partial(unsupported_sampling, generation_config=self._generation_config), branching_mismatch)
            self._branches = admit(model, checks) is None
            self._processors, self._samples = prepared_sampling(model, self._generation_config)
        self._cache: Cache | None = None

    def think(self, trace: Trace, tokens: int, room: int | None, show: Show | None) -> None:
        target = len(trace.token_ids) + tokens

        def take(token: int) -> bool:
            trace.add(token)
            paused = show is not None and show([token])
            return paused or trace.ended or len(trace.token_ids) == target

        self._compute_again(trace)
        self._extend(trace, trace.all_ids, tokens, take)

    def _compute_again(self, trace: Trace) -> None:
        """
        Make the cache of a trace if there is none.

        It is computed token by token, as it was at first. One forward pass over all would differ in its last bits.
        """
        if self._cache is None and trace.token_ids:
            self._extend(trace, trace.prompt_ids, len(trace.token_ids), lambda token: False, trace.token_ids)

    def _extend(
        self, trace: Trace, ids: list[int], tokens: int, take: Callable[[int], bool], given: Sequence[int] = ()
    ) -> None:
        """Generate on the kept cache. The first tokens may be `given`."""
        if self._cache is None:
            self._cache = self._empty_cache()
        try:
            with self._ready():
                choose = self._choose_at(len(trace.prompt_ids))
                self._generate(ids, self._cache, tokens, choose, take, given, goes_on=len(ids) > len(trace.prompt_ids))
        except BaseException:
            self._mend_cache(trace)
            raise

    def _choose_at(self, prompt_length: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def choose(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seed = derived_seed(self._seed, "thinking", input_ids.size(1) - prompt_length)
            return self._choose(torch.Generator(scores.device).manual_seed(seed), input_ids, scores)

        return choose

    def _choose(
        self, generator: torch.Generator, input_ids: torch.Tensor | None, logits: torch.Tensor
    ) -> torch.Tensor:
        """Choose the next tokens, shape (B,), as `generate()` does, with a generator of ours."""
        scores = self._processors(cast(torch.LongTensor, input_ids), logits.float())
        return next_tokens(scores, self._samples, generator)

    def _generate(
        self,
        ids: list[int],
        cache: Cache,
        tokens: int,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        take: Callable[[int], bool],
        given: Sequence[int] = (),
        goes_on: bool = True,
    ) -> None:
        # `generate()` feeds all tokens on top of a recurrent state, which has no length that it could ask for
        fed = ids[-1:] if goes_on and not self._branches else ids
        input_ids, mask = (torch.tensor([row], device=self._model.device) for row in (fed, [1] * len(ids)))
        config = copy.deepcopy(self._generation_config)
        config.do_sample, config.repetition_penalty = False, 1.0  # `choose` applies all of it
        config.temperature = config.top_p = config.top_k = config.min_p = None
        config.max_new_tokens, config.eos_token_id, config.pad_token_id = tokens, _NO_TOKEN, 0
        config.cache_implementation = None  # `generate()` refuses it beside a cache
        draw = _Draw(choose, ids[: len(ids) - len(fed)], {len(ids) + i: token for i, token in enumerate(given)})
        self._model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([cast(Any, draw)]),
            stopping_criteria=[_Take(take)],
            past_key_values=cache,
        )

    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        self._compute_again(trace)
        with self._ready():
            # Before the first token there is no cache. Thinking begins with the last token of the prompt, so it could
            # not go on from one that has the whole prompt.
            cache = self._cache or self._empty_cache()
            if self._branches and not trace.token_ids:
                self._generate(trace.prompt_ids, cache, 1, lambda ids, _: ids[:, -1], lambda token: True)
            choose = partial(self._choose, torch.Generator(self._model.device).manual_seed(seed))
            return (self._branch if self._branches else self._copy)(cache, trace, bridge, num, choose)

    def _branch(self, cache: Cache, trace: Trace, bridge: Sequence[int], num: int, choose: Any) -> list[list[int]]:
        """Return summaries that are branches on top of the cache."""
        history = [*trace.all_ids, *bridge]
        trunk = Trunk.from_cache(cache, torch.zeros(1, dtype=torch.long, device=self._model.device), [0])
        seen = min(trunk.lengths[0], len(trace.all_ids))
        enable_tree_attention(self._model)  # until `_ready` ends
        (summaries,) = decode_branches(
            self._model,
            trunk,
            [BranchContext(0, seen, history[seen:], num, history)],
            choose,
            needs_history=needs_history(self._processors),
            eos_token_ids=trace.config.eos_token_ids,
            max_new_tokens=trace.config.max_summary_length,
        )
        return summaries

    def _copy(self, cache: Cache, trace: Trace, bridge: Sequence[int], num: int, choose: Any) -> list[list[int]]:
        """
        Return summaries that continue a copy of the cache.

        A recurrent state cannot be shared by branches. The bridge is given token by token, because many such models
        cannot take several tokens on top of a state.
        """
        config, summaries = trace.config, []
        for _ in range(num):
            summary: list[int] = []
            left = len(bridge)

            def take(token: int, summary: list[int] = summary) -> bool:
                nonlocal left
                left -= 1
                if left < 0:
                    summary.append(token)
                return bool(summary) and token in config.eos_token_ids

            most = len(bridge) + config.max_summary_length
            goes_on = bool(trace.token_ids)
            self._generate(trace.all_ids, copy.deepcopy(cache), most, choose, take, bridge, goes_on)
            summaries.append(summary)
        return summaries

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Turn off dropout and gradients inside, and restore the model's mode and attention afterwards."""
        training = self._model.training
        self._model.eval()
        try:
            with plain_attention(self._model), torch.no_grad(), without_host_warnings():
                yield
        finally:
            self._model.train(training)

    def _empty_cache(self) -> Cache:
        if self._branches:
            return growing_cache(max_length=self._context)
        return DynamicCache(config=self._model.config.get_text_config())

    def _mend_cache(self, trace: Trace) -> None:
        """Bring the cache back to the trace after an interruption inside a step, or give it up."""
        length = len(trace.all_ids) - 1
        if self._branches and trace.token_ids:
            cache = cast(Cache, self._cache)
            with suppress(Exception):
                cache.crop(length)
                layers = cast(list[Any], cache.layers)
                if layers and all(layer.get_seq_length() == length for layer in layers):
                    return
        self._cache = None

    def tensors(self) -> dict[str, torch.Tensor]:
        if self._cache is None or not self._branches:
            return {}
        layers = cast(list[Any], self._cache.layers)
        pairs = [(layer.keys, layer.values) for layer in layers]
        return {
            f"layers.{i}.{name}": tensor
            for i, pair in enumerate(pairs)
            for name, tensor in zip(("keys", "values"), pair, strict=True)
        }

    def restore(self, trace: Trace, tensors: dict[str, torch.Tensor]) -> None:
        if tensors and self._branches:
            layers = [
                tuple(tensors[f"layers.{i}.{name}"].to(self._model.device) for name in ("keys", "values"))
                for i in range(len(tensors) // 2)
            ]
            self._cache = self._empty_cache()
            refill_cache(self._cache, cast(Any, layers), len(trace.prompt_ids))
        else:
            self._compute_again(trace)

    def identity(self) -> dict[str, Any]:
        digest, count = hashlib.sha256(), 0
        for name, parameter in self._model.named_parameters():
            flat = parameter.detach().flatten()
            count += flat.numel()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            if flat.device.type != "meta" and flat.numel():  # accelerate keeps weights that are offloaded elsewhere
                sample = flat[:: -(-flat.numel() // _ENTRIES)].contiguous().cpu()
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return {"class": type(self._model).__name__, "parameters": count, "weights": digest.hexdigest()}

    def numerics(self) -> dict[str, Any]:
        device = self._model.device
        if device.type == "cuda":
            place = torch.cuda.get_device_name(device)
        else:
            place = f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
        config = {
            name: value
            for name, value in self._model.config.to_dict().items()
            if not name.startswith("_") and name != "transformers_version"
        }
        return {
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": place,
            "configuration": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
