"""Thinking and answers of a session by requests: to a vLLM engine, or to a server."""

import hashlib
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..outside.files import weight_files
from ..rollout.http_backend import CompletionClient
from .anytime_config import AnytimeConfig
from .session_backends import SessionBackend, Show, Trace, derived_seed

logger = logging.get_logger(__name__)

# Tokens of one request. At most so many, less one, are drawn beyond the place where thinking pauses.
CHUNK = 32
# Pieces of a file of weights that go into a fingerprint, and their size in bytes
_PIECES, _PIECE = 64, 4096
# A prefix must have this many tokens before a server can be said to forget it. Caches hold whole blocks, of up to 128
# tokens.
_NOTICEABLE = 256


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

        num_tokens = 0
        with EngineLoop(self._engine) as loop:
            continuation = loop.add(ids, self._parameters(tokens, stop_token_ids, seed))
            while loop.has_unfinished:
                loop.step()
                if new := continuation.token_ids[num_tokens:]:
                    num_tokens += len(new)
                    yield new
        self._watch.saw(len(ids), continuation.num_cached_tokens or 0)

    def answer(self, trace: Trace, bridge: Sequence[int], num: int, seed: int) -> list[list[int]]:
        from ..rollout.vllm_backend import EngineLoop  # needs vLLM

        config, ids = self._config, [*trace.all_ids, *bridge]
        with EngineLoop(self._engine) as loop:
            summaries = [
                loop.add(
                    ids,
                    self._parameters(config.max_summary_length, config.eos_token_ids, derived_seed(seed, a) % 2**31),
                )
                for a in range(num)
            ]
            while loop.has_unfinished:
                loop.step()
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
    for path in weight_files(folder):
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
