"""
What thinks and answers for a session: a model of transformers, a vLLM engine, or a server.

Each gives the tokens of a trace that do not depend on where thinking paused. With transformers every token is computed
by a step of its own, on a cache that is kept, and drawn with a seed of its own. An engine and a server draw a whole
chunk of tokens by one request with one seed. Chunks begin at fixed positions, so the requests are the same wherever
thinking paused.
"""

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Cache, DynamicCache, LogitsProcessorList, StoppingCriteria
from transformers.utils import logging

from ..modeling.branch_decoding import BranchContext, Trunk, decode_branches
from ..modeling.growing_cache import growing_cache, refill_cache
from ..modeling.support import admit, branching_mismatch
from ..modeling.tree_attention import enable_tree_attention, plain_attention
from ..outside.host_warnings import without_host_warnings
from ..outside.validation import MOST_TOKEN_ID
from ..rollout.http_backend import CompletionClient
from ..rollout.markers import EndScan
from ..rollout.transformers_backend import needs_history, prepared_sampling, unsupported_sampling
from ..rollout.types import Thinking
from .anytime_config import AnytimeConfig

logger = logging.get_logger(__name__)

# Called with new tokens as they come. Returns whether thinking should pause.
Show = Callable[[list[int]], bool]

# Tokens of one request to an engine or a server. At most so many are drawn beyond the place where thinking pauses.
CHUNK = 32
# Entries of each weight that go into a fingerprint
_ENTRIES = 1024
# Pieces of a file of weights that go into a fingerprint, and their size in bytes
_PIECES, _PIECE = 64, 4096
# In place of an EOS token, where `generate()` would otherwise take the model's own
_NO_TOKEN = MOST_TOKEN_ID
# A prefix must have this many tokens before a server can be said to forget it. Caches hold whole blocks, of up to 128
# tokens.
_NOTICEABLE = 256


class Trace:
    """
    A trace that grows.

    Args:
        prompt_ids (`Sequence[int]`):
            The rendered prompt.
        config ([`AnytimeConfig`]):
            Settings of the session.
        token_ids (`Sequence[int]`, *optional*):
            Tokens so far.
        ahead (`Sequence[int]`, *optional*):
            Tokens that were drawn and do not belong to the trace yet.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        config: AnytimeConfig,
        token_ids: Sequence[int] = (),
        ahead: Sequence[int] = (),
    ):
        self.prompt_ids, self.config = list(prompt_ids), config
        self.token_ids: list[int] = []
        self.ahead = list(ahead)
        self.ended = False
        self._scan = EndScan(config.markers)
        for token in token_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token, and notice whether it ends the trace."""
        self.token_ids.append(token)
        self.ended = token in self.config.eos_token_ids or self._scan.end_of_thinking(self.token_ids) is not None
        if self.ended:
            self.ahead.clear()

    @property
    def all_ids(self) -> list[int]:
        """Return prompt and trace."""
        return self.prompt_ids + self.token_ids

    @property
    def stop_token_ids(self) -> list[int]:
        """Return the tokens at which the sampling of a trace may stop."""
        return self.config.rollout_settings(1).stop_token_ids

    def thinking(self) -> Thinking:
        """Return the trace so far."""
        return Thinking.from_tokens(self.token_ids, self.config.markers, self.config.eos_token_ids)


class SessionBackend(ABC):
    """
    What thinks and answers for one session.

    Attributes:
        name (`str`):
            Name of the kind of backend.
    """

    name: str

    @abstractmethod
    def think(self, trace: Trace, tokens: int, room: int | None, show: Show | None) -> None:
        """
        Append up to `tokens` tokens to a trace that has not ended.

        Args:
            trace ([`Trace`]):
                The trace.
            tokens (`int`):
                Most tokens to append.
            room (`int`, *optional*):
                Tokens that the context has room for, `None` if that is not known.
            show (`Callable`, *optional*):
                Function of the tokens as they come.
        """

    @abstractmethod
    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        """Return `num` summaries that follow prompt, trace and bridge. The trace is not touched."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what says which model this is."""

    def numerics(self) -> dict[str, Any]:
        """Return what the last bits of a result depend on, besides the model."""
        return {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the kept cache, as far as it can be saved."""
        return {}

    def restore(self, trace: Trace, tensors: dict[str, torch.Tensor]) -> None:  # noqa: B027  # others keep nothing
        """Take over the cache of [`tensors`], or compute it again if there is none."""


def derived_seed(*parts: Any) -> int:
    """Return a seed that depends on all parts, from 0 to 2⁶³ - 1."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# Models of transformers


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
        if not self._samples:
            return scores.argmax(dim=-1)
        # The largest of p / e with exponential e has the distribution p. `torch.multinomial` does the same.
        probs = scores.softmax(dim=-1)
        return (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1)

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
            past_key_values=cache,
            generation_config=config,
            logits_processor=LogitsProcessorList([cast(Any, draw)]),
            stopping_criteria=[_Take(take)],
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
        seen = min(trunk.layers[0][0].size(2), len(trace.all_ids))
        enable_tree_attention(self._model)  # until `_ready` ends
        (summaries,) = decode_branches(
            self._model,
            [trunk],
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


# Engines and servers


class PrefixWatch:
    """Watch over a prefix cache. It says once if a prefix that was just computed is computed again."""

    def __init__(self, whose: str, advice: str):
        self._whose, self._advice = whose, advice
        self._before, self._said = 0, False

    def saw(self, num_tokens: int, num_cached: int) -> None:
        """Take note of a request of `num_tokens` tokens, `num_cached` of which were in the cache."""
        if self._before >= _NOTICEABLE and num_cached < self._before // 2 and not self._said:
            self._said = True
            logger.warning(
                f"{self._whose} forgets what it has computed: of {self._before} tokens that it had a moment ago, "
                f"{num_cached} were left. The session goes on, but thinking and answers are slower. {self._advice}"
            )
        self._before = num_tokens


class _ChunkedSession(SessionBackend):
    """Backend that draws a chunk of tokens by one request. Chunks begin at fixed positions."""

    def __init__(self, config: AnytimeConfig, seed: int, watch: PrefixWatch):
        self._config, self._seed, self._watch = config, seed, watch

    @abstractmethod
    def _request(self, ids: list[int], tokens: int, stop_token_ids: list[int], seed: int) -> Iterator[list[int]]:
        """Yield the tokens of one continuation as they come."""

    def think(self, trace: Trace, tokens: int, room: int | None, show: Show | None) -> None:
        target = len(trace.token_ids) + tokens
        most = None if room is None else len(trace.token_ids) + room
        paused = False

        def take() -> bool:
            """Move tokens into the trace, and return whether thinking has to stop."""
            nonlocal paused
            while trace.ahead and not (paused or trace.ended or len(trace.token_ids) >= target):
                token = trace.ahead.pop(0)
                trace.add(token)
                paused = show is not None and show([token])
            return paused or trace.ended or len(trace.token_ids) >= target

        while not take():
            with closing(self._rest_of_chunk(trace, most)) as pieces:
                for piece in pieces:
                    if not trace.ended:
                        trace.ahead += piece
                        take()

    def _rest_of_chunk(self, trace: Trace, most: int | None) -> Generator[list[int]]:
        """
        Yield the tokens from the end of the trace to the end of its chunk.

        The chunk may have been interrupted. Then it is requested again from its beginning.
        """
        position = len(trace.token_ids)
        start = position - position % CHUNK
        end = start + CHUNK if most is None else min(start + CHUNK, most)
        known, read = trace.token_ids[start:], 0
        for piece in self._chunk(trace, start, start, end):
            expected = known[read : read + len(piece)]
            if piece[: len(expected)] != expected:
                logger.warning_once(
                    f"{self.name} gave other tokens when it was asked for the same ones again. The session goes on "
                    "from those that it had, but no longer as it would have without the interruption."
                )
                yield from self._chunk(trace, position, position, end)
                return
            read += len(piece)
            if piece[len(expected) :]:
                yield piece[len(expected) :]

    def _chunk(self, trace: Trace, start: int, seeded_by: int, end: int) -> Iterator[list[int]]:
        """Yield the tokens from one position to another."""
        stop, seed = trace.stop_token_ids, derived_seed(self._seed, "thinking", seeded_by)
        ids = [*trace.prompt_ids, *trace.token_ids[:start]]
        num_tokens, last = 0, -1
        for piece in self._request(ids, end - start, stop, seed % 2**31):
            num_tokens, last = num_tokens + len(piece), piece[-1]
            yield piece
        if num_tokens < end - start and last not in stop:
            raise ConnectionError(f"{self.name} ended after {num_tokens} of {end - start} tokens. Think again.")


class EngineSession(_ChunkedSession):
    """
    Backend of a vLLM engine in this process.

    Args:
        llm (`vllm.LLM`):
            The engine.
        config ([`AnytimeConfig`]):
            Settings of the session.
        seed (`int`):
            Seed of the session.
    """

    name = "vllm"

    def __init__(self, llm: Any, config: AnytimeConfig, seed: int):
        advice = "Start the engine with `enable_prefix_caching=True`, or with more memory."
        super().__init__(config, seed, PrefixWatch("The vLLM engine", advice))
        self._engine = llm.llm_engine

    def _request(self, ids: list[int], tokens: int, stop_token_ids: list[int], seed: int) -> Iterator[list[int]]:
        from ..rollout.vllm_backend import EngineLoop  # needs vLLM

        loop = EngineLoop(self._engine)
        continuation = loop.add(ids, self._parameters(tokens, stop_token_ids, seed))
        num_tokens = 0
        try:
            while loop.has_unfinished:
                loop.step()
                if new := continuation.token_ids[num_tokens:]:
                    num_tokens += len(new)
                    yield new
        finally:  # an interruption must leave no request in the engine
            if loop.has_unfinished:
                with suppress(Exception):  # a dead engine cannot abort either; the first error is the one to report
                    loop.abort_all()
        self._watch.saw(len(ids), continuation.num_cached_tokens or 0)

    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        from ..rollout.vllm_backend import EngineLoop  # needs vLLM

        loop = EngineLoop(self._engine)
        config, ids = self._config, [*trace.all_ids, *bridge]
        try:
            summaries = [
                loop.add(
                    ids,
                    self._parameters(config.max_summary_length, config.eos_token_ids, derived_seed(seed, a) % 2**31),
                )
                for a in range(num)
            ]
            while loop.has_unfinished:
                loop.step()
        finally:
            if loop.has_unfinished:
                with suppress(Exception):
                    loop.abort_all()
        return [summary.token_ids for summary in summaries]

    def _parameters(self, tokens: int, stop_token_ids: list[int], seed: int) -> dict[str, Any]:
        return {
            "logprobs": 0,  # the loop reads them
            **self._config.sampling.vllm(),
            "max_tokens": tokens,
            "stop_token_ids": stop_token_ids,
            "seed": seed,
        }

    def identity(self) -> dict[str, Any]:
        config = self._engine.model_config
        return {"model": config.model, "revision": config.revision, "weights": _weights_on_disk(Path(config.model))}

    def numerics(self) -> dict[str, Any]:
        config = self._engine.model_config
        return {"dtype": str(config.dtype).removeprefix("torch."), "vllm": _vllm_version(), "chunk": CHUNK}


class ServerSession(_ChunkedSession):
    """
    Backend of an OpenAI-compatible server.

    Args:
        client ([`CompletionClient`]):
            The server.
        config ([`AnytimeConfig`]):
            Settings of the session.
        seed (`int`):
            Seed of the session.
    """

    name = "server"

    def __init__(self, client: CompletionClient, config: AnytimeConfig, seed: int):
        advice = "Start the server with --enable-prefix-caching, or with more memory for its cache."
        super().__init__(config, seed, PrefixWatch(client.base_url, advice))
        self._client = client
        self._streams = False

    def think(self, trace: Trace, tokens: int, room: int | None, show: Show | None) -> None:
        # A request that failed is sent again, but not once its tokens have been shown
        self._streams = show is not None
        super().think(trace, tokens, room, show)

    def _request(self, ids: list[int], tokens: int, stop_token_ids: list[int], seed: int) -> Iterator[list[int]]:
        def on_cached(num_cached: int) -> None:
            self._watch.saw(len(ids), num_cached)

        sampling = self._config.sampling
        if self._streams:
            yield from self._client.stream(ids, tokens, stop_token_ids, sampling, seed, on_cached)
        else:
            (sampled,) = self._client.complete([ids], tokens, stop_token_ids, sampling, 1, seed, on_cached)
            yield sampled

    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        config = self._config
        return self._client.complete(
            [[*trace.all_ids, *bridge]],
            config.max_summary_length,
            config.eos_token_ids,
            config.sampling,
            num,
            seed % 2**31,
        )

    def identity(self) -> dict[str, Any]:
        card = self._client.models[self._client.model]
        return {"model": self._client.model, "root": card.get("root")}

    def numerics(self) -> dict[str, Any]:
        return {"chunk": CHUNK}


def _weights_on_disk(folder: Path) -> str | None:
    """Return a fingerprint of the files of weights in a folder, or `None` for a model of the Hub."""
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for i in range(_PIECES):
                file.seek(size * i // _PIECES)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _vllm_version() -> str:
    import vllm

    return vllm.__version__
