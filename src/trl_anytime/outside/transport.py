"""
Requests to OpenAI-compatible servers by the `openai` client, which comes with the extra `client`.

Around it stand a deadline for a whole answer, a bound on its size, a check of what it says, and patience: a request
that fails for now is sent again. No redirect is followed.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from ssl import SSLContext
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from anyio.from_thread import start_blocking_portal
from openai import APIError, APIStatusError, AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from .display import for_terminal
from .validation import MEBIBYTE, Check, Unfit, parse_json

# All summaries of a trace at 32 budgets, with the ids of their prompts, come to a few MiB
MOST_BYTES = 256 * MEBIBYTE
# What a server says when the same request may succeed later: a timeout, a conflict, too early, too many requests, and
# failures of its own or of a proxy before it
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_BETWEEN_WARNINGS = 60.0  # seconds

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Server:
    """
    An OpenAI-compatible server.

    Args:
        url (`str`):
            Where it is, with or without `/v1`.
        api_key (`str`, *optional*):
            Key that it asks for.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which a whole answer must have come. A stream has as many for each of its parts.
        patience (`float`, *optional*, defaults to `0.0`):
            Seconds for which one request is sent again when it fails.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt; each later wait is twice as long.
        longest_wait (`float`, *optional*, defaults to `60.0`):
            Most seconds between two attempts, unless the server asks for more.

    Raises:
        `ValueError`: If the address or the key cannot be used.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float = 10.0,
        patience: float = 0.0,
        first_wait: float = 1.0,
        longest_wait: float = 60.0,
    ):
        _check_address(url)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("The API key has characters that a header cannot hold, such as a line break.")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key or "EMPTY"  # as vLLM's documentation has it: the client insists on a key
        self._timeout, self._patience = timeout, patience
        self._first_wait, self._longest_wait = first_wait, longest_wait
        self._next_warning = 0.0

    def request(self, path: str, body: dict[str, Any] | None = None, *, check: Check) -> Any:
        """
        Return the JSON that answers a request, asked for as often as it takes.

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
                # An event loop in a thread of its own, as a notebook has one running
                with start_blocking_portal() as portal:
                    content = portal.call(self._ask, path, body)
                return parse_json(content, self.url + path, check)
            except APIStatusError as error:
                if error.status_code not in _TRY_AGAIN:
                    raise self._refusal(path, error) from error
                failure, asked_wait = f"{error.status_code} {_said(error)}", _retry_after(error.response)
            except (APIError, OSError, Unfit) as error:
                failure = _in_one_line(error)
            pause = max(min(wait, self._longest_wait) * random.uniform(0.8, 1.2), asked_wait)
            if time.monotonic() + pause > deadline:
                raise ConnectionError(
                    f"{self.url}{path} gave no complete answer within {self._patience:g} seconds; the last failure: "
                    f"{failure}"
                )
            if time.monotonic() >= self._next_warning:  # all requests of an outage fail alike
                self._next_warning = time.monotonic() + _BETWEEN_WARNINGS
                logger.warning(f"{self.url}{path} failed, next attempt in {pause:.1f} seconds: {failure}")
            time.sleep(pause)
            wait *= 2

    def stream(self, path: str, body: dict[str, Any], parse: Callable[[Any], T]) -> Iterator[T]:
        """
        Return what `parse` makes of the events that answer a request, without what is empty.

        Args:
            path, body:
                See [`request`].
            parse (`Callable`):
                Takes the JSON of an event. It raises `Unfit` for one that is not what it should be.

        Raises:
            `ConnectionError`: If the server fails or breaks off. What has been shown cannot be tried again.
            `ValueError`: If it refuses the request.
        """
        try:
            with start_blocking_portal() as portal:
                parts = self._parts(path, body, parse)
                while (part := portal.call(anext, parts, None)) is not None:
                    yield part
        except APIStatusError as error:
            raise self._refusal(path, error) from error
        except (APIError, httpx2.HTTPError, OSError, ValueError, RecursionError) as error:
            raise ConnectionError(f"{self.url} broke off: {_in_one_line(error)}") from error

    async def _ask(self, path: str, body: dict[str, Any] | None) -> bytes:
        async with self._client() as client, self._deadline():
            if body is None:
                return (await client.get(path, cast_to=httpx2.Response)).content
            return (await client.post(path, cast_to=httpx2.Response, body=body)).content

    async def _parts(self, path: str, body: dict[str, Any], parse: Callable[[Any], T]) -> AsyncIterator[T]:
        async with self._client() as client:
            async with self._deadline():
                events = await client.post(
                    path, cast_to=object, body=body, stream=True, stream_cls=AsyncStream[object]
                )
            part: T | None = None
            while True:
                async with self._deadline():  # which an event that says nothing does not put off
                    async for event in events:
                        if part := parse(event):
                            break
                    else:
                        return
                yield part

    def _client(self) -> AsyncOpenAI:
        http = DefaultAsyncHttpxClient(
            follow_redirects=False,  # no other address must be told the key, nor answer for this one
            timeout=None,  # which would be between two bytes
            verify=_tls(),
            event_hooks={"response": [_bound]},
        )
        headers = {"Accept-Encoding": "identity"}
        return AsyncOpenAI(
            base_url=self.url, api_key=self._api_key, max_retries=0, default_headers=headers, http_client=http
        )

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except TimeoutError:
            raise TimeoutError(f"no complete answer within {self._timeout:g} seconds") from None

    def _refusal(self, path: str, error: APIStatusError) -> ValueError:
        if 300 <= error.status_code < 400:
            location = error.response.headers.get("Location", "")[:200]
            return ValueError(
                f"{self.url}{path} redirects to {location!r} ({error.status_code}). That is not followed: set the "
                "address of the server itself."
            )
        return ValueError(f"{self.url}{path} refused the request ({error.status_code}): {_said(error)}")


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: Any):
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = MOST_BYTES
        async for chunk in self._stream:
            left -= len(chunk)
            if left < 0:
                raise OSError(f"the answer is larger than {MOST_BYTES} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    response.stream = _Bounded(response.stream)
    response.headers.pop("Content-Encoding", None)  # nothing was asked for that grows when it is unpacked


@cache
def _tls() -> SSLContext:
    return httpx2.create_ssl_context()  # which reads all certificates of the system


def _check_address(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The address of a server begins with http:// or https://, got {url!r}.")
    try:
        parts = urlsplit(url)
        usable = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not (parts.query or parts.fragment)
    except ValueError:  # of a port
        usable = False
    if not usable or not url.isprintable() or " " in url:
        raise ValueError(f"The address of a server is like http://localhost:8000, got {url!r}.")


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, APIError):  # "Connection error.", because of an error of httpx, which has a reason, too
        while cause := error.__cause__ or error.__context__:
            error = cause
    return for_terminal(f"{type(error).__name__}: {error}", one_line=True)


def _said(error: APIStatusError) -> str:
    """What a server says about its refusal, in one line that a terminal can show."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    said = message if isinstance(message, str) else error.response.text or error.response.reason_phrase
    return for_terminal(said[:500], one_line=True)


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a server asks to wait, by a number or by a date; 0 if it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))  # in this order 0 for NaN
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
