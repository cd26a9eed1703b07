"""
Requests to OpenAI-compatible servers through the `openai` client, which comes with the extra `client`.

This adds a deadline for a whole answer, a bound on its size, and a check of its content. Requests that fail for now
are sent again. Redirects are not followed.
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
from queue import SimpleQueue
from ssl import SSLContext
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
from anyio.from_thread import start_blocking_portal
from openai import APIError, APIStatusError, AsyncOpenAI, AsyncStream, DefaultAsyncHttpxClient

from .display import for_terminal
from .validation import MEBIBYTE, Check, Unfit, parse_json

# All summaries of a trace at 32 budgets, with the ids of their prompts, take a few MiB
MOST_BYTES = 256 * MEBIBYTE
# Status codes after which the same request may succeed later: timeout, conflict, too early, too many requests, and
# failures of the server or of a proxy before it
_TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
_BETWEEN_WARNINGS = 60.0  # seconds

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Server:
    """
    An OpenAI-compatible server.

    Args:
        url (`str`):
            Address of the server, with or without `/v1`.
        api_key (`str`, *optional*):
            Key that the server asks for.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which a whole answer must arrive. In a stream, each part has this much time.
        patience (`float`, *optional*, defaults to `0.0`):
            Seconds for which a failed request is sent again.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt. Each later wait is twice as long.
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
            raise ValueError(
                "The API key has characters that a header cannot hold, such as a line break. Check where the key was "
                "copied from."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._api_key = api_key or "EMPTY"  # the client insists on a key; this one is from vLLM's documentation
        self._timeout, self._patience = timeout, patience
        self._first_wait, self._longest_wait = first_wait, longest_wait
        self._next_warning = 0.0

    def request(self, path: str, body: dict[str, Any] | None = None, *, check: Check) -> Any:
        """
        Send a request until it succeeds, and return the JSON of the answer.

        Args:
            path (`str`):
                Path of the endpoint.
            body (`dict[str, Any]`, *optional*):
                Content to post. Without it, this is a GET request.
            check (`Check`):
                Check of the answer, see [`~trl_anytime.outside.validation`]. If it fails, the request is sent again.

        Raises:
            `ConnectionError`: If no complete answer arrives while the patience lasts.
            `ValueError`: If the server refuses the request for good.
        """
        deadline = time.monotonic() + self._patience
        wait = self._first_wait
        while True:
            asked_wait = 0.0
            try:
                # Use an event loop in a thread of its own, because a notebook has one running
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
                    f"{self.url}{path} gave no complete answer within {self._patience:g} seconds. Check that the "
                    f"server is running and reachable. The last failure: {failure}"
                )
            if time.monotonic() >= self._next_warning:  # during an outage all requests fail alike
                self._next_warning = time.monotonic() + _BETWEEN_WARNINGS
                logger.warning(f"{self.url}{path} failed, next attempt in {pause:.1f} seconds: {failure}")
            time.sleep(pause)
            wait *= 2

    def stream(self, path: str, body: dict[str, Any], parse: Callable[[Any], T]) -> Iterator[T]:
        """
        Send a request, and yield what `parse` makes of each event of the answer.

        Empty results are left out.

        Args:
            path, body:
                See [`request`].
            parse (`Callable`):
                Function of an event's JSON. It raises `Unfit` if the event is malformed.

        Raises:
            `ConnectionError`: If the server fails or breaks off. The request is not sent again, because parts of the
            answer may have been shown.
            `ValueError`: If the server refuses the request.
        """
        parts: SimpleQueue[T | None] = SimpleQueue()  # `None` ends it
        try:
            with start_blocking_portal() as portal:
                reading = portal.start_task_soon(self._read, path, body, parse, parts.put)
                reading.add_done_callback(lambda _: parts.put(None))
                try:
                    while (part := parts.get()) is not None:
                        yield part
                    reading.result()
                finally:
                    # Of a stream that is left early. Cancelled inside, every generator below ends in its turn.
                    reading.cancel()
        except APIStatusError as error:
            raise self._refusal(path, error) from error
        except (APIError, httpx2.HTTPError, OSError, ValueError, RecursionError) as error:
            raise ConnectionError(f"{self.url} broke off: {_in_one_line(error)}") from error

    async def _ask(self, path: str, body: dict[str, Any] | None) -> bytes:
        async with self._client() as client, self._deadline():
            if body is None:
                return (await client.get(path, cast_to=httpx2.Response)).content
            return (await client.post(path, cast_to=httpx2.Response, body=body)).content

    async def _read(
        self, path: str, body: dict[str, Any], parse: Callable[[Any], T], put: Callable[[T], object]
    ) -> None:
        now = asyncio.get_running_loop().time
        async with self._client() as client, self._deadline() as deadline:
            events = await client.post(path, cast_to=object, body=body, stream=True, stream_cls=AsyncStream[object])
            deadline.reschedule(now() + self._timeout)
            async for event in events:
                if part := parse(event):  # events without content do not extend the time
                    put(part)
                    deadline.reschedule(now() + self._timeout)

    def _client(self) -> AsyncOpenAI:
        http = DefaultAsyncHttpxClient(
            follow_redirects=False,  # another address must not get the key, nor answer in place of this one
            timeout=None,  # httpx counts from one byte to the next; `_deadline` counts for the whole answer
            verify=_tls(),
            event_hooks={"response": [_bound]},
        )
        headers = {"Accept-Encoding": "identity"}
        return AsyncOpenAI(
            base_url=self.url, api_key=self._api_key, max_retries=0, default_headers=headers, http_client=http
        )

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[asyncio.Timeout]:
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                yield deadline
        except TimeoutError:
            raise TimeoutError(f"no complete answer within {self._timeout:g} seconds") from None

    def _refusal(self, path: str, error: APIStatusError) -> ValueError:
        if 300 <= error.status_code < 400:
            location = error.response.headers.get("Location", "")[:200]
            return ValueError(
                f"{self.url}{path} redirects to {location!r} ({error.status_code}). Redirects are not followed. Set "
                "the address of the server itself."
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
    response.headers.pop("Content-Encoding", None)  # none was asked for, and unpacking could exceed the bound


@cache
def _tls() -> SSLContext:
    return httpx2.create_ssl_context()  # cached, because it reads all certificates of the system


def _check_address(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The server's address is {url!r}. Give one that begins with http:// or https://.")
    try:
        parts = urlsplit(url)
        usable = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not (parts.query or parts.fragment)
    except ValueError:  # from the port
        usable = False
    if not usable or not url.isprintable() or " " in url:
        raise ValueError(f"The server's address is {url!r}. Give one such as http://localhost:8000.")


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, APIError):  # it only says "Connection error."; the reasons are in the httpx errors behind it
        while cause := error.__cause__ or error.__context__:
            error = cause
    return for_terminal(f"{type(error).__name__}: {error}", one_line=True)


def _said(error: APIStatusError) -> str:
    """Return the server's reason for a refusal, in one line that a terminal can show."""
    message = error.body.get("message") if isinstance(error.body, dict) else None
    said = message if isinstance(message, str) else error.response.text or error.response.reason_phrase
    return for_terminal(said[:500], one_line=True)


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds that a server asks to wait, from a number or a date. 0 if it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))  # in this order, NaN becomes 0
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError, OverflowError):
        return 0.0
