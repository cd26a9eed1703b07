"""One HTTP request with an end: a deadline for the whole answer, a bound on its size, no redirects."""

import io
import json
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.request import (
    AbstractHTTPHandler,
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from .validation import MEBIBYTE, Check, parse_json

# All summaries of a trace at 32 budgets, with the ids of their prompts, come to a few MiB
MOST_BYTES = 256 * MEBIBYTE


class Answer:
    """
    What a server sends, read within bounds.

    Args:
        response (`http.client.HTTPResponse`):
            The response behind its headers.
        deadline (`Deadline`):
            When reading ends.
    """

    def __init__(self, response: Any, deadline: "Deadline"):
        self._response, self._deadline = response, deadline
        self._left = MOST_BYTES

    def read(self) -> bytes:
        """
        Return what is left of the body.

        Raises:
            `OSError`: If it is larger than `MOST_BYTES`, or not complete at the deadline.
        """
        return self._counted(self._response.read(self._left + 1))

    def lines(self) -> Iterator[bytes]:
        """Return the body line by line; raises as [`~Answer.read`]."""
        while line := self._counted(self._response.readline(self._left + 1)):
            yield line

    def extend(self) -> None:
        """Let the deadline begin anew."""
        self._deadline.begin()

    def _counted(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise OSError(f"the answer is larger than {MOST_BYTES} bytes")
        return content


class Deadline:
    """
    A moment that is some seconds away.

    Args:
        seconds (`float`):
            How many.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self.begin()

    def begin(self) -> None:
        """Count from now."""
        self._end = time.monotonic() + self._seconds

    def left(self) -> float:
        """
        Return the seconds that are left.

        Raises:
            `TimeoutError`: If there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no complete answer within {self._seconds:g} seconds")
        return left


class _TimedReader(io.RawIOBase):
    """A socket whose every read ends at the deadline, those of headers included: urllib knows time between bytes."""

    def __init__(self, sock: Any, raw: Any, deadline: Deadline):
        self._sock, self._raw, self._deadline = sock, raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._deadline.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedResponse(HTTPResponse):
    def __init__(self, sock: Any, *args: Any, deadline: Deadline, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp: Any = io.BufferedReader(_TimedReader(sock, self.fp.detach(), deadline))


class _Timed(AbstractHTTPHandler):
    deadline: Deadline

    def do_open(self, http_class: Any, req: Any, **kwargs: Any) -> Any:
        def connect(*args: Any, **kwargs: Any) -> HTTPConnection:
            connection = http_class(*args, **kwargs)
            connection.response_class = partial(_TimedResponse, deadline=self.deadline)
            return connection

        return super().do_open(connect, req, **kwargs)


class _TimedHTTP(_Timed, HTTPHandler):
    pass


class _TimedHTTPS(_Timed, HTTPSHandler):
    pass


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # which reads all certificates of the system


def _opener(deadline: Deadline) -> OpenerDirector:
    """Without urllib's handler of redirects: another address must not be told the key, nor answer for this one."""
    http, https = _TimedHTTP(), _TimedHTTPS(context=_tls())
    http.deadline = https.deadline = deadline
    opener = OpenerDirector()
    for handler in (ProxyHandler(), http, https, HTTPErrorProcessor(), HTTPDefaultErrorHandler()):
        opener.add_handler(handler)
    return opener


@contextmanager
def ask(
    url: str, body: dict[str, Any] | None = None, headers: dict[str, str] | None = None, timeout: float = 10.0
) -> Iterator[Answer]:
    """
    Send one request.

    Args:
        url (`str`):
            Where to.
        body (`dict[str, Any]`, *optional*):
            What to post as JSON; a plain request if not set.
        headers (`dict[str, str]`, *optional*):
            Headers, which no other address gets.
        timeout (`float`, *optional*, defaults to `10.0`):
            Seconds in which the whole answer must have come.

    Raises:
        `urllib.error.HTTPError`: For a status that is not 2xx, redirects included.
        `OSError` or `http.client.HTTPException`: If the answer does not come, in time and within its bounds.
    """
    deadline = Deadline(timeout)
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data=data, headers=headers or {})
    with _opener(deadline).open(request, timeout=timeout) as response:
        yield Answer(response, deadline)


def get_json(url: str, check: Check, *args: Any, **kwargs: Any) -> Any:
    """
    Return the JSON that answers one request, see [`ask`].

    Raises:
        `Unfit`: If it is not JSON, or fails the check.
    """
    with ask(url, *args, **kwargs) as answer:
        return parse_json(answer.read(), url, check)
