"""
How to serve a model so that its contract holds: commands and request bodies for vLLM, SGLang and llama.cpp.

Only vLLM's are tested here, against the real server; those of the others are written by their documentation.
"""

import json
from dataclasses import dataclass
from typing import Any

from .budgets import check_budgets
from .contract import AnytimeContract
from .display import for_shell, for_terminal
from .inference import rollout_settings
from .server import completion_body

SERVERS = ("vllm", "sglang", "llama.cpp")
_PROMPT = "<ids of the rendered prompt>"
_CONTEXT = f"{_PROMPT} + <ids of the thinking> + <bridge>"


@dataclass(frozen=True)
class Request:
    """
    A request to a server.

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
    A server that holds a model to its contract.

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
        """The command as a line for a shell."""
        return " ".join(map(for_shell, self.command))

    def text(self) -> str:
        """All of it for a shell: every word is quoted, and what is not a command is a comment."""
        parts = [self.command_line()]
        parts += [f"{_comment(request.purpose)}\n{self._curl(request)}" for request in self.requests]
        parts += map(_comment, self.notes)
        return "\n\n".join(parts)

    def _curl(self, request: Request) -> str:
        body = json.dumps(request.body, indent=2, ensure_ascii=False)
        if for_terminal(body) != body:  # JSON can write those characters out, too
            body = for_terminal(json.dumps(request.body, indent=2))
        words = ["curl", self.base_url + request.path, "-H", "Content-Type: application/json", "-d", body]
        return " ".join(map(for_shell, words))


def _comment(text: str) -> str:
    return "\n".join(f"# {line}" for line in for_terminal(text).split("\n"))


def deployment(server: str, model: str, contract: AnytimeContract, budget: int) -> Deployment:
    """
    How to serve a model.

    Args:
        server (`str`):
            `"vllm"`, `"sglang"` or `"llama.cpp"`.
        model (`str`):
            Folder or Hub id of the model.
        contract ([`AnytimeContract`]):
            How it was trained.
        budget (`int`):
            Budget in thinking tokens of the requests.

    Raises:
        `ValueError`: For another server, or a budget that is not a positive int.
    """
    check_budgets([budget], "budget")
    make = {"vllm": _vllm, "sglang": _sglang, "llama.cpp": _llama_cpp}.get(server)
    if make is None:
        raise ValueError(f"The server must be one of {', '.join(SERVERS)}, got {server!r}.")
    return make(model, contract, budget)


def _vllm(model: str, contract: AnytimeContract, budget: int) -> Deployment:
    command = ["vllm", "serve", model, "--generation-config", "vllm", "--enable-prefix-caching"]
    command += ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat = {
        "model": model,
        "messages": [{"role": "user", "content": "<question>"}],
        "vllm_xargs": {"thinking_budget": budget},
        # One more, for the EOS that ends an answer at its limit
        "max_tokens": budget + contract.markers.max_bridge_length + contract.max_summary_length + 1,
        "chat_template_kwargs": contract.chat_template_kwargs,
        **contract.sampling.vllm(),
    }
    notes = [
        "The server needs this package for its logits processor (pip install trl-anytime), and enforces the budget by "
        "itself. Without it, leave out --logits-processors and send the two requests by token ids, as "
        "`CompletionClient` and `trl-anytime eval --base-url` do on any vLLM server.",
        "vLLM's own thinking_token_budget is not the same: no answer bridge follows a thinking that ended by itself, "
        "and the end of such a thinking is overlooked if --reasoning-config forces more than the end marker.",
        f"Check it: trl-anytime probe {for_shell(model)} --base-url http://localhost:8000 "
        "--budget-field vllm_xargs.thinking_budget",
    ]
    one = Request("In one request, with a budget that the server enforces", "/v1/chat/completions", chat)
    return Deployment(command, [one, *_by_token_ids(model, contract, budget)], "http://localhost:8000", notes)


def _by_token_ids(model: str, contract: AnytimeContract, budget: int) -> list[Request]:
    stop, eos = rollout_settings(contract, num_summaries=1).stop_token_ids, contract.eos_token_ids
    think = completion_body(model, [], budget, stop, contract.sampling)
    answer = completion_body(model, [], contract.max_summary_length, eos, contract.sampling)
    return [
        Request("By token ids: 1. Think, up to the budget", "/v1/completions", {**think, "prompt": _PROMPT}),
        Request(_answer_behind(contract), "/v1/completions", {**answer, "prompt": _CONTEXT}),
    ]


def _answer_behind(contract: AnytimeContract) -> str:
    markers = contract.markers
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    return f"2. Answer. The bridge is {closed} behind a thinking that was cut, {ended} behind one that ended by itself"


def _sglang(model: str, contract: AnytimeContract, budget: int) -> Deployment:
    stop, eos = rollout_settings(contract, num_summaries=1).stop_token_ids, contract.eos_token_ids
    sampling = contract.sampling.vllm() | {"top_k": contract.sampling.top_k if contract.sampling.top_k > 0 else -1}
    think = {**sampling, "max_new_tokens": budget, "stop_token_ids": stop}
    answer = {**sampling, "max_new_tokens": contract.max_summary_length, "stop_token_ids": eos}
    requests = [
        Request(
            "1. Think, up to the budget; the tokens are in `output_ids`",
            "/generate",
            {"input_ids": _PROMPT, "sampling_params": think},
        ),
        Request(_answer_behind(contract), "/generate", {"input_ids": _CONTEXT, "sampling_params": answer}),
    ]
    notes = [
        "Not run here: written by SGLang's documentation.",
        "Its own budgets (--enable-strict-thinking with custom_params.thinking_budget) close a thinking with its end "
        "marker alone, without the trained bridges; `thinking_budget` in chat_template_kwargs is ignored by templates "
        "that do not know it.",
    ]
    command = ["python", "-m", "sglang.launch_server", "--model-path", model]
    return Deployment(command, requests, "http://localhost:30000", notes)


def _llama_cpp(model: str, contract: AnytimeContract, budget: int) -> Deployment:
    markers, sampling = contract.markers, contract.sampling
    before = markers.truncation_bridge.partition(markers.think_end)[0]
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "cache_prompt": True,
        "return_tokens": True,
    }
    think = {"prompt": _PROMPT, "n_predict": budget, "stop": [markers.think_end], **common}
    answer = {"prompt": _CONTEXT, "n_predict": contract.max_summary_length, **common}
    notes = [
        "Not run here: written by llama.cpp's documentation. The model has to be converted to GGUF first.",
        f"The end of thinking, {list(markers.think_end_ids)}, is not among the tokens of a thinking that ended by "
        "itself: put it before the bridge.",
        "--reasoning-budget holds for the whole server. It inserts its message and the end of thinking, but not the "
        "answer bridge: only the two requests by token ids are what training spliced.",
    ]
    return Deployment(
        [
            *("llama-server", "--model", f"{model}.gguf", "--jinja"),
            *("--reasoning-budget", str(budget), "--reasoning-budget-message", before),
        ],
        [
            Request("1. Think, up to the budget; the tokens are in `tokens`", "/completion", think),
            Request(_answer_behind(contract), "/completion", answer),
        ],
        "http://localhost:8080",
        notes,
    )
