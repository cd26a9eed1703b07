"""Requests to servers that drip, flood, redirect or lie, over real sockets."""

import asyncio
import gc
import gzip
import json
import sys
import time

import pytest

from tests.support.anytime import GREEDY, make_anytime_config
from tests.support.servers import listening
from trl_anytime import CompletionClient
from trl_anytime.outside import transport
from trl_anytime.outside.transport import Server
from trl_anytime.outside.validation import MEBIBYTE, fields, integer

ANSWER = json.dumps({"a": 1}).encode()
CHECK = fields(a=integer(0))
MODELS = {"data": [{"id": "tiny", "max_model_len": 64}]}


def drip(handler, head, byte):
    """A byte now and then, for longer than any test lasts."""
    handler.wfile.write(head)
    while not handler.server.over.wait(0.05):
        handler.wfile.write(byte)


OK = b"HTTP/1.1 200 OK\r\n"
DRIPS = {
    "a body": lambda handler: drip(handler, OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "a body without a length": lambda handler: drip(handler, OK + b"\r\n", b" "),
    "chunks": lambda handler: drip(handler, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "a header": lambda handler: drip(handler, OK + b"X: ", b"x"),
    "a status": lambda handler: drip(handler, b"HTTP/1.1 2", b"0"),
    "continue": lambda handler: drip(handler, b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a refusal": lambda handler: drip(handler, b"HTTP/1.1 400 No\r\nContent-Length: 100000\r\n\r\n", b" "),
    "nothing": lambda handler: handler.server.over.wait(20),
}


@pytest.mark.parametrize("answer", DRIPS.values(), ids=DRIPS)
def test_a_whole_answer_has_a_deadline(answer):
    with listening(answer) as (url, _):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="TimeoutError.*0.5 seconds"):
            Server(url, timeout=0.5).request("/v1", check=CHECK)
        assert 0.4 < time.monotonic() - start < 5  # of 0.5, with room for a busy machine


def test_a_client_gives_up_on_a_server_that_drips():
    """Within its patience and the time of one answer, on the command's first question."""
    with listening(DRIPS["a body"]) as (url, seen):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="TimeoutError"):
            CompletionClient(url, timeout=0.3, patience=0.5, first_wait=0.01)
        assert time.monotonic() - start < 5 and len(seen) >= 2


@pytest.mark.parametrize("said", [True, False], ids=["with its length", "without an end"])
def test_a_body_is_bounded(monkeypatch, said):
    monkeypatch.setattr(transport, "MOST_BYTES", MEBIBYTE)
    sent = []

    def flood(handler):
        handler.wfile.write(OK + (b"Content-Length: 4294967296\r\n\r\n" if said else b"\r\n"))
        while not handler.server.over.is_set():
            handler.wfile.write(b" " * MEBIBYTE)
            sent.append(MEBIBYTE)

    with listening(flood) as (url, _):
        with pytest.raises(ConnectionError, match=str(MEBIBYTE)):
            Server(url).request("/v1", check=CHECK)
        assert sum(sent) < 64 * MEBIBYTE  # what sockets hold; not 4 GiB


def test_nothing_is_unpacked():
    """A packed body, which nobody asked for, would grow beyond the bound."""

    def packed(handler):
        handler.send(gzip.compress(ANSWER), headers=[("Content-Encoding", "gzip")])

    with listening(packed) as (url, seen), pytest.raises(ConnectionError, match="Unfit"):
        Server(url).request("/v1", check=CHECK)
    assert seen[0]["accept-encoding"] == "identity"


def test_within_a_running_event_loop():
    """As in a notebook."""

    async def cell(url):
        return Server(url).request("/v1", check=CHECK)

    with listening(lambda handler: handler.send(ANSWER)) as (url, _):
        assert asyncio.run(cell(url)) == {"a": 1}


def test_one_warning_per_outage(caplog):
    with listening(lambda handler: handler.send(b"", 503)) as (url, seen):
        server = Server(url, patience=0.2, first_wait=0.01)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                server.request("/v1", check=CHECK)
    assert len(seen) > 4 and len(caplog.records) == 1


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    monkeypatch.delitem(sys.modules, "trl_anytime.outside.transport")
    with pytest.raises(ValueError, match=r"openai.*trl-anytime\[client\]"):
        CompletionClient("http://127.0.0.1:1")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_stays_where_it_was_sent(status):
    with listening(lambda handler: handler.send(json.dumps(MODELS).encode())) as (other, seen_there):

        def redirect(handler):
            handler.send(b"", status, [("Location", f"{other}/v1/models\x1b[31m")])

        with listening(redirect) as (url, seen), pytest.raises(ValueError, match=str(status)) as raised:
            CompletionClient(url, api_key="secret", patience=1.0)
        assert "\x1b" not in str(raised.value) and other in str(raised.value)
    assert [headers["authorization"] for headers in seen] == ["Bearer secret"] and not seen_there


def test_an_answer_and_its_check():
    with listening(lambda handler: handler.send(ANSWER)) as (url, _):
        assert Server(url).request("/v1", check=CHECK) == {"a": 1}
        with pytest.raises(ConnectionError, match="Unfit.*`a`"):
            Server(url).request("/v1", check=fields(a=integer(2)))


# What a server of models says


def models(**fields):
    return {"data": [{"id": "tiny", "max_model_len": 64, **fields}]}


@pytest.mark.parametrize(
    "answer",
    [
        b"[" * 100_000,
        b"\xff\xfe{}",
        b"[]",
        b"null",
        {},
        {"data": []},
        {"data": {"id": "tiny"}},
        {"data": ["tiny"]},
        models(id=3),
        models(id=""),
        models(id="\ud800"),
        models(max_model_len="64"),
        models(max_model_len=-1),
        models(max_model_len=True),
        models(max_model_len=float("inf")),
        models(max_model_len=1e300),
    ],
    ids=repr,
)
def test_what_a_server_says_of_its_models_is_checked(answer):
    content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    listener = listening(lambda handler: handler.send(content))
    with listener as (url, _), pytest.raises(ConnectionError, match="Unfit") as raised:
        CompletionClient(url, patience=0.0)
    assert len(str(raised.value).splitlines()) == 1


def choice(**fields):
    return {"choices": [{"index": 0, "token_ids": [1, 2], "finish_reason": "stop", **fields}]}


UNFIT = [
    {},
    {"choices": None},
    {"choices": ["x"]},
    choice(token_ids="12"),
    choice(token_ids=[1, "2"]),
    choice(token_ids=[-1]),
    choice(token_ids=[2**31]),
    choice(token_ids=[True]),
    choice(token_ids=[1.0]),
    choice(token_ids=[1] * 9),
    choice(finish_reason=["stop"]),
    choice(finish_reason="x" * 1000),
]
UNNUMBERED = [{"choices": choice()["choices"] * 2}, choice(index=7), choice(index="0")]


@pytest.mark.parametrize(
    ("streamed", "answer"),
    [*((False, answer) for answer in UNFIT + UNNUMBERED), *((True, answer) for answer in UNFIT)],
    ids=lambda value: str(value)[:60],
)
def test_continuations_are_checked(streamed, answer):
    def reply(handler):
        if handler.command == "GET":
            handler.send(json.dumps(MODELS).encode())
        else:
            content = json.dumps(answer).encode()
            handler.send(b"data: " + content + b"\n\n" if streamed else content)

    with listening(reply) as (url, _):
        client = CompletionClient(url, patience=0.0)
        with pytest.raises(ConnectionError):
            list(client.stream([1], 8, [2], GREEDY)) if streamed else client.complete([[1]], 8, [2], GREEDY)


def test_a_stream_needs_tokens_to_go_on():
    """A comment now and then holds a connection open; only tokens, which are bounded, give it more time."""
    event = json.dumps({"choices": [{"token_ids": [1], "finish_reason": None}]}).encode()

    def comments(handler):
        if handler.command == "GET":
            handler.send(json.dumps(MODELS).encode())
        else:
            drip(handler, OK + b"\r\ndata: " + event + b"\n\n", b": still there\n\n")

    def tokens(handler):
        if handler.command == "GET":
            handler.send(json.dumps(MODELS).encode())
        else:
            drip(handler, OK + b"\r\n", b"data: " + event + b"\n\n")

    for answer, expected in ((comments, "TimeoutError"), (tokens, "more than 30 tokens")):
        with listening(answer) as (url, _):
            client = CompletionClient(url, timeout=0.5)
            received = []
            with pytest.raises(ConnectionError, match=expected):
                received.extend(client.stream([1], 30, [2], GREEDY))
    # 30 tokens at one in 0.05 s take longer than the 0.5 s that each of them has


@pytest.mark.parametrize("read", [1, 3])
def test_a_stream_that_is_left_early(caplog, recwarn, read):
    """As by a rule that ends the thinking. asyncio would complain of generators that are not closed in their turn."""
    event = json.dumps({"choices": [{"token_ids": [1], "finish_reason": None}]}).encode()

    def tokens(handler):
        if handler.command == "GET":
            handler.send(json.dumps(MODELS).encode())
        else:
            drip(handler, OK + b"\r\n", b"data: " + event + b"\n\n")

    with listening(tokens) as (url, _):
        for _ in range(5):
            stream = CompletionClient(url).stream([1], 30, [2], GREEDY)
            assert [next(stream) for _ in range(read)] == [[1]] * read
            stream.close()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert not recwarn.list


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://localhost:x",
        "http://me:secret@localhost",
        "http://a b",
        "http://a\r\nX: y",
        "http://a/?q",
        "",
    ],
)
def test_addresses_and_keys_that_cannot_be_used(url):
    with pytest.raises(ValueError):
        CompletionClient(url, patience=60.0)
    with pytest.raises(ValueError) as raised:
        CompletionClient("http://127.0.0.1:1", api_key="secret\r\nX: y", patience=60.0)
    assert "secret" not in str(raised.value)


def test_what_a_server_says_cannot_move_the_terminal(caplog):
    said = "no\x1b]0;title\x07\x9b31m\u202e\nsecond line"

    def refuse(handler):
        handler.send(json.dumps({"error": {"message": said}}).encode(), 400 if "later" not in handler.path else 503)

    with listening(refuse) as (url, _):
        with pytest.raises(ValueError) as raised:
            CompletionClient(url)
        with pytest.raises(ConnectionError) as later:
            CompletionClient(f"{url}/later", patience=0.05, first_wait=0.01)
    for shown in (str(raised.value), str(later.value), caplog.text):
        assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "\n" not in str(raised.value) + str(later.value)


@pytest.mark.parametrize(
    "message",
    [None, "text", {"content": 3}, {"content": ["x"]}, {"reasoning": {}}, {"content": "\ud800"}],
    ids=repr,
)
def test_a_probe_checks_what_it_is_told(message, tokenizer):
    from trl_anytime.inference.probe import probe

    def reply(handler):
        content = MODELS if handler.command == "GET" else {"choices": [{"message": message}]}
        handler.send(json.dumps(content).encode())

    with listening(reply) as (url, _), pytest.raises(ConnectionError, match="choices"):
        probe(CompletionClient(url, patience=0.0), make_anytime_config(), tokenizer, [4], question="1")
