"""
The two phases through an OpenAI-compatible server, by token ids.

A request that is refused for now, stalls or breaks off is sent again until it succeeds or the patience ends. What
comes back is checked: an answer that is shorter than it should be is an error, never a result.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from itertools import islice
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from transformers.utils import logging

from ..outside.display import for_terminal
from ..outside.transport import ask, get_json
from ..outside.validation import (
    MEBIBYTE,
    TOKEN_ID,
    Check,
    Unfit,
    fields,
    integer,
    list_of,
    or_null,
    parse_json,
    string,
)
from .backend import Generation, RolloutSettings
from .sampling import Sampling
from .types import Rollout, Thinking

# What a server says when the same request may succeed later: a timeout, a conflict, too early, too many requests, and
# failures of its own or of a proxy before it
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
_LONGEST_REFUSAL = MEBIBYTE // 16  # bytes that are read of what a server says about it

MODELS = fields(data=list_of(fields({"max_model_len": or_null(integer(1))}, id=string(1000, least=1)), least=1))

logger = logging.get_logger(__name__)


class CompletionClient:
    """
    A client of an OpenAI-compatible server.

    Args:
        base_url (`str`):
            Where the server is, with or without `/v1`.
        model (`str`, *optional*):
            Name of the model. Defaults to the first one served.
        api_key (`str`, *optional*):
            Key that the server asks for.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds in which a whole answer must have come. A stream has as many for each of its tokens.
        patience (`float`, *optional*, defaults to `900.0`):
            Seconds for which one request is sent again when it fails.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt; each later wait is twice as long, up to a minute.
        concurrency (`int`, *optional*, defaults to `32`):
            Most requests at a time.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        patience: float = 900.0,
        first_wait: float = 1.0,
        concurrency: int = 32,
    ):
        _check_address(base_url)
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.concurrency = concurrency
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            if not (api_key.isascii() and api_key.isprintable()):
                raise ValueError("The API key has characters that a header cannot hold, such as a line break.")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._patience, self._first_wait = timeout, patience, first_wait
        cards = {card["id"]: card for card in self.request("/v1/models", check=MODELS)["data"]}
        self.model = model or next(iter(cards))
        if self.model not in cards:
            served = ", ".join(map(for_terminal, sorted(cards)))
            raise ValueError(f"{self.base_url} does not serve {model!r}, but {served}.")
        self.max_model_len: int | None = cards[self.model].get("max_model_len")

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        num_continuations: int = 1,
        seed: int | None = None,
    ) -> list[list[int]]:
        """
        Continue prompts.

        Args:
            prompt_ids (`Sequence[Sequence[int]]`):
                N prompts.
            max_tokens (`int`):
                Most tokens of a continuation.
            stop_token_ids (`list[int]`):
                Tokens that end a continuation, and are part of it.
            sampling ([`Sampling`]):
                How tokens are drawn.
            num_continuations (`int`, *optional*, defaults to `1`):
                Continuations n of each prompt.
            seed (`int`, *optional*):
                Seed of the draws.

        Returns:
            `list[list[int]]`: N · n continuations, those of one prompt adjacent.

        Raises:
            `ConnectionError`: If the server does not give a complete answer while the patience lasts.
            `ValueError`: If it refuses the request for good, or cannot return token ids.
        """
        body = completion_body(self.model, prompt_ids, max_tokens, stop_token_ids, sampling, num_continuations, seed)

        complete = fields(choices=list_of(_choice(max_tokens)))

        def check(answer: Any, name: str) -> Any:
            choices = complete(answer, name)["choices"]
            if len(choices) != len(prompt_ids) * num_continuations:
                raise Unfit(f"{len(choices)} of {len(prompt_ids) * num_continuations} continuations came")
            if sorted(choice["index"] for choice in choices) != list(range(len(choices))):
                raise Unfit("`choices` are not numbered from 0 on")
            if any(choice.get("token_ids") is None for choice in choices):
                raise ValueError(
                    f"{self.base_url} returns no token ids, without which traces cannot be cut exactly: serve the "
                    "model with vLLM (`trl-anytime serve-command`), which knows `return_token_ids`."
                )
            for choice in choices:
                reason, length = choice["finish_reason"], len(choice["token_ids"])
                if reason not in ("stop", "length") or (reason == "length" and length < max_tokens):
                    raise Unfit(f"a continuation ended after {length} of {max_tokens} tokens ({reason!r})")
            return answer

        choices = self.request("/v1/completions", body, check=check)["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        seed: int | None = None,
    ) -> Iterator[list[int]]:
        """
        Continue one prompt, and hand out the tokens as they come: what has been shown cannot be tried again.

        Args:
            prompt_ids (`Sequence[int]`):
                The prompt.
            max_tokens, stop_token_ids, sampling, seed:
                See [`complete`].

        Raises:
            `ConnectionError`: If the server fails or breaks off.
            `ValueError`: If it refuses the request.
        """
        body = completion_body(self.model, [prompt_ids], max_tokens, stop_token_ids, sampling, seed=seed)
        reason, num_tokens = None, 0
        event = fields(choices=list_of(_choice(max_tokens, streamed=True)))
        try:
            address, streamed = f"{self.base_url}/v1/completions", {**body, "stream": True}
            with ask(address, streamed, self._headers, self._timeout) as answer:
                for line in answer.lines():
                    if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                        continue
                    for choice in parse_json(line.removeprefix(b"data:"), "an event", event)["choices"]:
                        reason = choice["finish_reason"] or reason
                        tokens = choice.get("token_ids") or []
                        if not tokens:
                            continue
                        answer.extend()  # which a server cannot do for ever
                        num_tokens += len(tokens)
                        if num_tokens > max_tokens:
                            raise Unfit(f"more than {max_tokens} tokens came")
                        yield tokens
        except HTTPError as error:
            raise self._refusal("/v1/completions", error) from error
        except (OSError, HTTPException, Unfit) as error:
            raise ConnectionError(f"{self.base_url} broke off: {_in_one_line(error)}") from error
        if reason not in ("stop", "length"):
            raise ConnectionError(f"{self.base_url} broke off ({reason!r}).")

    def request(self, path: str, body: dict[str, Any] | None = None, *, check: Check) -> Any:
        """
        One answer of the server, asked for as often as it takes.

        Args:
            path (`str`):
                Path of the endpoint.
            body (`dict[str, Any]`, *optional*):
                What to post; a plain request if not set.
            check (`Check`):
                What the answer must be, see [`~trl_anytime.outside.validation`]. One that fails it is asked for again.

        Raises:
            `ConnectionError`: If there is no complete answer while the patience lasts.
            `ValueError`: If the server refuses the request for good.
        """
        deadline = time.monotonic() + self._patience
        wait = self._first_wait
        while True:
            asked_wait = 0.0
            try:
                return get_json(self.base_url + path, check, body, self._headers, self._timeout)
            except HTTPError as error:
                if error.code not in _TRY_AGAIN:
                    raise self._refusal(path, error) from error
                failure, asked_wait = f"{error.code} {_said(error)}", _retry_after(error)
            except (OSError, HTTPException, Unfit) as error:
                failure = _in_one_line(error)
            pause = max(min(wait, _LONGEST_WAIT) * random.uniform(0.8, 1.2), asked_wait)
            if time.monotonic() + pause > deadline:
                raise ConnectionError(
                    f"{self.base_url}{path} gave no complete answer within {self._patience:g} seconds; the last "
                    f"failure: {failure}"
                )
            logger.warning(f"{self.base_url}{path} failed, next attempt in {pause:.1f} seconds: {failure}")
            time.sleep(pause)
            wait *= 2

    def _refusal(self, path: str, error: HTTPError) -> ValueError:
        if 300 <= error.code < 400:
            return ValueError(
                f"{self.base_url}{path} redirects to {error.headers.get('Location', '')[:200]!r} ({error.code}). That "
                "is not followed: set the address of the server itself."
            )
        return ValueError(f"{self.base_url}{path} refused the request ({error.code}): {_said(error)}")


def _check_address(base_url: str) -> None:
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"The address of a server begins with http:// or https://, got {base_url!r}.")
    try:
        parts = urlsplit(base_url)
        usable = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not (parts.query or parts.fragment)
    except ValueError:  # of a port
        usable = False
    if not usable or not base_url.isprintable() or " " in base_url:
        raise ValueError(f"The address of a server is like http://localhost:8000, got {base_url!r}.")


def _choice(max_tokens: int, streamed: bool = False) -> Check:
    """A continuation of a server; where it is streamed, a part of one."""
    token_ids = or_null(list_of(TOKEN_ID, most=max_tokens))
    optional = {"token_ids": token_ids}
    if streamed:
        return fields(optional, finish_reason=or_null(string(100)))
    return fields(optional, index=integer(0), finish_reason=or_null(string(100)))


def _in_one_line(error: Exception) -> str:
    return for_terminal(f"{type(error).__name__}: {error}", one_line=True)


def completion_body(
    model: str,
    prompt_ids: Sequence[Sequence[int]],
    max_tokens: int,
    stop_token_ids: list[int],
    sampling: Sampling,
    num_continuations: int = 1,
    seed: int | None = None,
) -> dict[str, Any]:
    """Body of a request to `/v1/completions`, see [`CompletionClient.complete`]."""
    body = {
        "model": model,
        "prompt": [list(ids) for ids in prompt_ids],
        "max_tokens": max_tokens,
        "stop_token_ids": stop_token_ids,
        "n": num_continuations,
        "return_token_ids": True,
        **sampling.vllm(),
    }
    return body if seed is None else {**body, "seed": seed}


def _said(error: HTTPError) -> str:
    """What a server says about its refusal, in one line that a terminal can show."""
    said = str(error.reason)
    try:
        said = error.read(_LONGEST_REFUSAL).decode(errors="replace")
        answer = json.loads(said)
        said = str((answer.get("error") or answer).get("message", said))
    except (OSError, HTTPException, ValueError, AttributeError, RecursionError):
        pass
    return for_terminal(said[:500], one_line=True)


def _retry_after(error: HTTPError) -> float:
    """Seconds that a server asks to wait, by a number or by a date; 0 if it does not."""
    value = error.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))  # in this order 0 for NaN
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0


class ServerGeneration(Generation):
    """
    The two phases by an OpenAI-compatible server: one request for a trace, and one for all its summaries.

    Args:
        client ([`CompletionClient`]):
            The server.
        sampling ([`Sampling`]):
            How tokens are drawn.
        seed (`int`, *optional*):
            Every rollout gets a seed of its own, counted from there.
    """

    def __init__(self, client: CompletionClient, sampling: Sampling, seed: int | None = None):
        super().__init__()
        self._client, self._sampling, self._seed = client, sampling, seed

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        with ThreadPoolExecutor(min(self._client.concurrency, len(prompt_ids))) as pool:
            return list(pool.map(lambda i: self._roll_out(i, prompt_ids[i], settings), range(len(prompt_ids))))

    def _roll_out(self, index: int, prompt: Sequence[int], settings: RolloutSettings) -> Rollout:
        seed = None if self._seed is None else self._seed + index
        (sampled,) = self._client.complete(
            [prompt], settings.budgets[-1], settings.stop_token_ids, self._sampling, seed=seed
        )
        thinking = Thinking.from_tokens(sampled, settings.markers, settings.eos_token_ids)
        contexts = settings.contexts(thinking)
        # A request gets A summaries of each prompt
        prompts = [
            context_ids
            for context in contexts
            for context_ids in [context.token_ids(prompt, thinking)]
            * (context.num_summaries // settings.num_summaries)
        ]
        summaries = iter(
            self._client.complete(
                prompts,
                settings.max_summary_length,
                settings.eos_token_ids,
                self._sampling,
                settings.num_summaries,
                seed,
            )
        )
        by_context = [list(islice(summaries, context.num_summaries)) for context in contexts]
        return Rollout.assemble(prompt, thinking, contexts, by_context)
