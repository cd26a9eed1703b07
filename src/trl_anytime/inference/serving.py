"""How to serve a model with vLLM as its anytime config says: the command, and requests to the server."""

from dataclasses import dataclass
from typing import Any

from ..method.budgets import check_budgets
from ..outside.display import for_json, for_shell, for_terminal
from ..rollout.http_backend import completion_body
from .anytime_config import AnytimeConfig

_PROMPT = "<ids of the rendered prompt>"
_CONTEXT = f"{_PROMPT} + <ids of the trace> + <bridge>"


@dataclass(frozen=True)
class Request:
    """
    Holds a request to a server.

    Args:
        purpose (`str`):
            What it does.
        path (`str`):
            Path of the endpoint.
        body (`dict[str, Any]`):
            Its body.
    """

    purpose: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Deployment:
    """
    Says how to serve a model as its anytime config says.

    Args:
        command (`list[str]`):
            What starts it.
        requests (`list[Request]`):
            Requests to it.
        base_url (`str`):
            Where it listens.
        notes (`list[str]`):
            What to know.
    """

    command: list[str]
    requests: list[Request]
    base_url: str
    notes: list[str]

    def command_line(self) -> str:
        """Return the command as a line for a shell."""
        return " ".join(map(for_shell, self.command))

    def text(self) -> str:
        """Return all of it for a shell. Every word is quoted, and what is not a command is a comment."""
        parts = [self.command_line()]
        parts += [f"{_comment(request.purpose)}\n{self._curl(request)}" for request in self.requests]
        parts += map(_comment, self.notes)
        return "\n\n".join(parts)

    def _curl(self, request: Request) -> str:
        words = ["curl", self.base_url + request.path, "-H", "Content-Type: application/json", "-d"]
        words.append(for_json(request.body, indent=2))
        return " ".join(map(for_shell, words))


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in for_terminal(text).split("\n"))


def deployment(model: str, config: AnytimeConfig, budget: int) -> Deployment:
    """
    Return how to serve a model with vLLM.

    Args:
        model (`str`):
            Folder or Hub id of the model.
        config ([`AnytimeConfig`]):
            How it was trained.
        budget (`int`):
            Budget in thinking tokens of the requests.

    Raises:
        `ValueError`: If the budget is not a positive int.
    """
    check_budgets([budget], "budget")
    command = ["vllm", "serve", model, "--generation-config", "vllm", "--enable-prefix-caching"]
    command += ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat = {
        "model": model,
        "messages": [{"role": "user", "content": "<question>"}],
        "vllm_xargs": {"thinking_budget": budget},
        # One more, for the EOS that ends an answer at its limit
        "max_tokens": budget + config.markers.max_bridge_length + config.max_summary_length + 1,
        "chat_template_kwargs": config.chat_template_kwargs,
        **config.sampling.vllm(),
    }
    notes = [
        "The server needs this package for its logits processor (pip install trl-anytime), and enforces the budget by "
        "itself. Without it, leave out --logits-processors and send the two requests by token ids, as "
        "`CompletionClient` and `trl-anytime eval --base-url` do on any vLLM server.",
        "vLLM's own thinking_token_budget is not the same: no answer bridge follows a trace that ended by itself, "
        "and the end of such a trace is overlooked if --reasoning-config forces more than the end marker.",
        f"Check it: trl-anytime probe {for_shell(model)} --base-url http://localhost:8000 "
        "--budget-field vllm_xargs.thinking_budget",
    ]
    one = Request("In one request, with a budget that the server enforces", "/v1/chat/completions", chat)
    return Deployment(command, [one, *_by_token_ids(model, config, budget)], "http://localhost:8000", notes)


def _by_token_ids(model: str, config: AnytimeConfig, budget: int) -> list[Request]:
    stop, eos = config.rollout_settings(1).stop_token_ids, config.eos_token_ids
    think = completion_body(model, [], budget, stop, config.sampling)
    answer = completion_body(model, [], config.max_summary_length, eos, config.sampling)
    return [
        Request("By token ids: 1. Think, up to the budget", "/v1/completions", {**think, "prompt": _PROMPT}),
        Request(_answer_behind(config), "/v1/completions", {**answer, "prompt": _CONTEXT}),
    ]


def _answer_behind(config: AnytimeConfig) -> str:
    markers = config.markers
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    return f"2. Answer. The bridge is {closed} behind a trace that was cut, {ended} behind one that ended by itself"
