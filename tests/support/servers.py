"""Servers on loopback for as long as a test needs them, one of them OpenAI-compatible over a tiny model."""

import json
import threading
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import GenerationConfig

from trl_anytime.inference.generate import GenerateSampler


class LoopbackServer(ThreadingHTTPServer):
    """Answers at a free port of this machine. `over` is set when the test is."""

    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.over = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that has gone away is expected."""


class QuietHandler(BaseHTTPRequestHandler):
    """Keeps no log."""

    def log_message(self, *args):
        pass

    def send(self, content, status=200, headers=()):
        """Answer with bytes, or with what becomes JSON."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(server):
    """Run a server in a thread."""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@contextmanager
def listening(answer):
    """The address of a server that calls `answer(handler)` for each request, and the headers that it was sent."""
    seen = []

    class Handler(QuietHandler):
        def do_GET(self):
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_POST = do_GET

    with serving(LoopbackServer(Handler)) as server:
        yield server.url, seen


class TinyServer(LoopbackServer):
    """
    An OpenAI-compatible server that can be told to misbehave.

    Args:
        model: The model, which continues token ids greedily.
        faults: What to do wrong, one request after the other: the name of a method of `Handler`, `None` for nothing.
        chat: From the body of a chat request to the token ids of its answer.
        cards: What it says of its models, by default of a single one.
    """

    def __init__(self, model=None, faults=(), max_model_len=256, chat=None, tokenizer=None, cards=None):
        super().__init__(Handler)
        self.model, self.faults, self.max_model_len, self.chat = model, list(faults), max_model_len, chat
        self.tokenizer = tokenizer
        self.cards = cards or [{"id": "tiny", "max_model_len": max_model_len}]
        self.cached_tokens = None  # from the ids of a prompt to how many of them it says it had in its cache
        self.bodies, self.lock = [], threading.Lock()

    def usage(self, body):
        if self.cached_tokens is None:
            return None
        return {"prompt_tokens_details": {"cached_tokens": self.cached_tokens(body["prompt"][-1])}}

    def complete(self, body):
        sample = GenerateSampler(self.model, GenerationConfig(do_sample=False), 0)
        prompts = [ids for ids in body["prompt"] for _ in range(body["n"])]
        with self.lock:
            sampled, _ = sample(prompts, body["max_tokens"], body["stop_token_ids"], 1)
        return [
            {
                "index": i,
                "token_ids": ids,
                "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
            }
            for i, ids in enumerate(sampled)
        ]


class Handler(QuietHandler):
    protocol_version = "HTTP/1.1"
    server: TinyServer

    def do_GET(self):
        self.send({"data": self.server.cards})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        if fault is not None:
            getattr(self, fault)(body)
        elif body.get("temperature") == 0 and body.get("n", 1) > 1:  # as vLLM
            self.send({"error": {"message": "n must be 1 when using greedy sampling"}}, 400)
        elif self.path == "/v1/chat/completions":
            ids = self.server.chat(body)
            text = self.server.tokenizer.decode(ids)
            self.send({"choices": [{"index": 0, "message": {"content": text}, "token_ids": ids}]})
        elif body.get("stream"):
            (choice,) = self.server.complete(body)
            chunks = [{"token_ids": [token], "finish_reason": None} for token in choice["token_ids"]]
            chunks[-1]["finish_reason"] = choice["finish_reason"]
            events = [{"choices": [chunk]} for chunk in chunks]
            if body.get("stream_options", {}).get("include_usage"):
                events.append({"choices": [], "usage": self.server.usage(body)})
            lines = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"]
            self.send("".join(lines).encode())
        else:
            self.send({"choices": self.server.complete(body), "usage": self.server.usage(body)})

    # Faults

    def overloaded(self, body):
        self.send({"error": {"message": "try later"}}, 503)

    def rate_limited(self, body):
        self.send({"error": {"message": "too fast"}}, 429, [("Retry-After", "0.2")])

    def rate_limited_until_a_date(self, body):
        self.send({"error": {"message": "too fast"}}, 429, [("Retry-After", formatdate(usegmt=True))])

    def stalls(self, body):
        self.server.over.wait(20)

    def drops(self, body):
        self.close_connection = True

    def breaks_off(self, body):
        """In the middle of its answer."""
        data = json.dumps({"choices": self.server.complete(body)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def garbles(self, body):
        self.send(b"<html>an intermediate proxy</html>")

    def forgets_one(self, body):
        self.send({"choices": self.server.complete(body)[1:]})

    def gives_up_early(self, body):
        """As a server whose context is full."""
        choices = self.server.complete(body)
        choices[0] |= {"token_ids": choices[0]["token_ids"][:-1], "finish_reason": "length"}
        self.send({"choices": choices})

    def aborts(self, body):
        choices = self.server.complete(body)
        choices[0] |= {"finish_reason": "abort"}
        self.send({"choices": choices})

    def refuses(self, body):
        self.send({"error": {"message": "thinking budgets are not configured"}}, 400)

    def keeps_its_ids(self, body):
        choices = self.server.complete(body)
        self.send({"choices": [{**choice, "token_ids": None} for choice in choices]})
