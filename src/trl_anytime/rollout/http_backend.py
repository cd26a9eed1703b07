"""
The two phases through an OpenAI-compatible server, by token ids.

A request that is refused for now, stalls or breaks off is sent again until it succeeds or the patience ends. What
comes back is checked: an answer that is shorter than it should be is an error, never a result.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from transformers.utils import logging

from .backend import Generation, RolloutSettings
from .sampling import Sampling
from .types import Rollout, Thinking

# What a server says when the same request may succeed later: a timeout, a conflict, too early, too many requests, and
# failures of its own or of a proxy before it
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more

logger = logging.get_logger(__name__)


class _IncompleteAnswer(Exception):
    """The server answered, but not with all that was asked for."""


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
            Seconds without a byte after which a request counts as stalled.
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
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"The address of a server begins with http:// or https://, got {base_url!r}.")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self.concurrency = concurrency
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout, self._patience, self._first_wait = timeout, patience, first_wait
        served = self.request("/v1/models", check=lambda answer: [card["id"] for card in answer["data"]])
        cards = {card["id"]: card for card in served["data"]}
        self.model = model or next(iter(cards))
        if self.model not in cards:
            raise ValueError(f"{self.base_url} does not serve {model!r}, but {', '.join(sorted(cards))}.")
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

        def read(answer: dict[str, Any]) -> list[list[int]]:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if len(choices) != len(prompt_ids) * num_continuations:
                raise _IncompleteAnswer(f"{len(choices)} of {len(prompt_ids) * num_continuations} continuations came")
            if any(choice.get("token_ids") is None for choice in choices):
                raise ValueError(
                    f"{self.base_url} returns no token ids, without which thinkings cannot be cut exactly: serve the "
                    "model with vLLM (`trl-anytime serve-command`), which knows `return_token_ids`."
                )
            for choice in choices:
                reason, length = choice["finish_reason"], len(choice["token_ids"])
                if reason not in ("stop", "length") or (reason == "length" and length < max_tokens):
                    raise _IncompleteAnswer(f"a continuation ended after {length} of {max_tokens} tokens ({reason})")
            return [choice["token_ids"] for choice in choices]

        return read(self.request("/v1/completions", body, check=read))

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
        reason = None
        try:
            with self._open("/v1/completions", {**body, "stream": True}) as response:
                for line in response:
                    if line.startswith(b"data:") and line.strip() != b"data: [DONE]":
                        for choice in json.loads(line.removeprefix(b"data:"))["choices"]:
                            reason = choice["finish_reason"] or reason
                            yield choice["token_ids"] or []
        except HTTPError as error:
            raise ValueError(f"{self.base_url} refused the request ({error.code}): {_said(error)}") from error
        except (OSError, HTTPException, json.JSONDecodeError, KeyError) as error:
            raise ConnectionError(f"{self.base_url} broke off: {error!r}") from error
        if reason not in ("stop", "length"):
            raise ConnectionError(f"{self.base_url} broke off ({reason}).")

    def request(
        self, path: str, body: dict[str, Any] | None = None, *, check: Callable[[dict[str, Any]], Any]
    ) -> dict[str, Any]:
        """
        One answer of the server, asked for as often as it takes.

        Args:
            path (`str`):
                Path of the endpoint.
            body (`dict[str, Any]`, *optional*):
                What to post; a plain request if not set.
            check (`Callable`):
                Fails for an answer that is not complete.

        Raises:
            `ConnectionError`: If there is no complete answer while the patience lasts.
            `ValueError`: If the server refuses the request for good.
        """
        deadline = time.monotonic() + self._patience
        wait = self._first_wait
        while True:
            asked_wait = 0.0
            try:
                answer = self._request_once(path, body)
                check(answer)
                return answer
            except HTTPError as error:
                said = _said(error)
                if error.code not in _TRY_AGAIN:
                    raise ValueError(f"{self.base_url}{path} refused the request ({error.code}): {said}") from error
                failure, asked_wait = f"{error.code} {said}", _retry_after(error)
            except (OSError, HTTPException, json.JSONDecodeError, KeyError, TypeError, _IncompleteAnswer) as error:
                failure = f"{type(error).__name__}: {error}"
            pause = max(min(wait, _LONGEST_WAIT) * random.uniform(0.8, 1.2), asked_wait)
            if time.monotonic() + pause > deadline:
                raise ConnectionError(
                    f"{self.base_url}{path} gave no complete answer within {self._patience:g} seconds; the last "
                    f"failure: {failure}"
                )
            logger.warning(f"{self.base_url}{path} failed, next attempt in {pause:.1f} seconds: {failure}")
            time.sleep(pause)
            wait *= 2

    def _request_once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        with self._open(path, body) as response:
            return json.load(response)

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urlopen(Request(self.base_url + path, data=data, headers=self._headers), timeout=self._timeout)


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
    """What a server says about its refusal."""
    try:
        text = error.read().decode(errors="replace")
        answer = json.loads(text)
        return str((answer.get("error") or answer).get("message", text))[:500]
    except (OSError, HTTPException, ValueError, AttributeError):
        return str(error.reason)


def _retry_after(error: HTTPError) -> float:
    """Seconds that a server asks to wait, by a number or by a date; 0 if it does not."""
    value = error.headers.get("Retry-After", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return 0.0


class ServerGeneration(Generation):
    """
    The two phases by an OpenAI-compatible server: one request for a thinking, and one for all its summaries.

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
        thinking = Thinking.of(sampled, settings.markers, settings.eos_token_ids)
        # As many contexts as there are groups of A summaries
        contexts, budgets = [], []
        for cut, bridge, indices in settings.contexts(thinking):
            context = [*prompt, *thinking.token_ids[:cut], *bridge]
            contexts += [context] * (settings.num_summaries_at(indices) // settings.num_summaries)
            budgets.append(indices)
        summaries = iter(
            self._client.complete(
                contexts,
                settings.max_summary_length,
                settings.eos_token_ids,
                self._sampling,
                settings.num_summaries,
                seed,
            )
        )
        by_budget: dict[int, list] = {}
        for indices in budgets:
            of_cut = [next(summaries) for _ in range(settings.num_summaries_at(indices))]
            by_budget |= settings.of_budgets(indices, of_cut)
        in_order = [by_budget[j] for j in range(len(settings.budgets))]
        return Rollout.of(prompt, thinking, settings.budgets, settings.markers, in_order)
