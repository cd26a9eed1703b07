"""
How to serve a model so that its contract holds: commands and request bodies for vLLM, SGLang and llama.cpp.

Only vLLM's are tested here, against the real server; those of the others are written by their documentation.
"""

import json
import shlex
from dataclasses import dataclass
from typing import Any

from .contract import AnytimeContract
from .server import completion_body

SERVERS = ("vllm", "sglang", "llama.cpp")
_PROMPT = "<ids of the rendered prompt>"
_THINKING = "<ids of the thinking, at most the budget>"


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
        notes (`list[str]`):
            What to know.
    """

    command: list[str]
    requests: list[Request]
    notes: list[str]

    def text(self) -> str:
        """All of it for a terminal: notes are comments, the rest can be pasted."""
        parts = [" ".join(map(shlex.quote, self.command))]
        parts += [
            f"# {request.purpose}\n# POST {request.path}\n{json.dumps(request.body, indent=2, ensure_ascii=False)}"
            for request in self.requests
        ]
        parts += [f"# {note}" for note in self.notes]
        return "\n\n".join(parts)


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
        `ValueError`: For another server.
    """
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
        f"Check it: trl-anytime probe {shlex.quote(model)} --base-url http://localhost:8000 "
        "--budget-field vllm_xargs.thinking_budget",
    ]
    one = Request("In one request, with a budget that the server enforces", "/v1/chat/completions", chat)
    return Deployment(command, [one, *_by_token_ids(model, contract, budget)], notes)


def _by_token_ids(model: str, contract: AnytimeContract, budget: int) -> list[Request]:
    markers, eos = contract.markers, contract.eos_token_ids
    stop = [*eos, *(markers.think_end_ids if len(markers.think_end_ids) == 1 else ())]
    think = completion_body(model, [], budget, stop, contract.sampling)
    answer = completion_body(model, [], contract.max_summary_length, eos, contract.sampling)
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    return [
        Request("By token ids: 1. Think, up to the budget", "/v1/completions", {**think, "prompt": _PROMPT}),
        Request(
            f"2. Answer. The bridge is {closed} behind a thinking that was cut, and {ended} behind one that ended by "
            "itself",
            "/v1/completions",
            {**answer, "prompt": f"{_PROMPT} + {_THINKING} + <bridge>"},
        ),
    ]


def _sglang(model: str, contract: AnytimeContract, budget: int) -> Deployment:
    markers, eos = contract.markers, contract.eos_token_ids
    stop = [*eos, *(markers.think_end_ids if len(markers.think_end_ids) == 1 else ())]
    sampling = contract.sampling.vllm() | {"top_k": contract.sampling.top_k if contract.sampling.top_k > 0 else -1}
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    requests = [
        Request(
            "1. Think, up to the budget; the tokens are in `output_ids`",
            "/generate",
            {"input_ids": _PROMPT, "sampling_params": {**sampling, "max_new_tokens": budget, "stop_token_ids": stop}},
        ),
        Request(
            f"2. Answer. The bridge is {closed} behind a thinking that was cut, and {ended} behind one that ended by "
            "itself",
            "/generate",
            {
                "input_ids": f"{_PROMPT} + {_THINKING} + <bridge>",
                "sampling_params": {**sampling, "max_new_tokens": contract.max_summary_length, "stop_token_ids": eos},
            },
        ),
    ]
    notes = [
        "Not run here: written by SGLang's documentation.",
        "Its own budgets (--enable-strict-thinking with custom_params.thinking_budget) close a thinking with its end "
        "marker alone, without the trained bridges; `thinking_budget` in chat_template_kwargs is ignored by templates "
        "that do not know it.",
    ]
    return Deployment(["python", "-m", "sglang.launch_server", "--model-path", model], requests, notes)


def _llama_cpp(model: str, contract: AnytimeContract, budget: int) -> Deployment:
    markers = contract.markers
    before, after = markers.truncation_bridge.split(markers.think_end)
    sampling = contract.sampling
    common = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": max(sampling.top_k, 0),
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repetition_penalty,
        "cache_prompt": True,
        "return_tokens": True,
    }
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    command = ["llama-server", "--model", f"{model}.gguf", "--jinja", "--reasoning-budget", str(budget)]
    command += ["--reasoning-budget-message", before]
    requests = [
        Request(
            "1. Think, up to the budget; the tokens are in `tokens`",
            "/completion",
            {"prompt": _PROMPT, "n_predict": budget, "stop": [markers.think_end], **common},
        ),
        Request(
            f"2. Answer. The bridge is {closed} behind a thinking that was cut, and {ended} behind one that ended by "
            f"itself, which includes {list(markers.think_end_ids)}",
            "/completion",
            {
                "prompt": f"{_PROMPT} + {_THINKING} + <bridge>",
                "n_predict": contract.max_summary_length,
                **common,
            },
        ),
    ]
    notes = [
        "Not run here: written by llama.cpp's documentation. The model has to be converted to GGUF first.",
        f"--reasoning-budget holds for the whole server. It inserts its message and {markers.think_end!r}, but "
        f"neither {after!r} nor the answer bridge {markers.answer_bridge!r}: only the two requests by token ids are "
        "what training spliced.",
    ]
    return Deployment(command, requests, notes)
