"""Command and requests to serve a model with vLLM by its anytime config."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..method.budgets import check_budgets
from ..outside.display import for_json, for_shell, for_terminal
from ..outside.validation import MEBIBYTE, boolean, fields, free_form, integer, mapping_of, or_null, read_json, string
from ..rollout.http_backend import CompletionClient, completion_body, served_from
from ..rollout.sampling import BUDGET_FIELD
from .anytime_config import AnytimeConfig, find_file

_PROMPT = "<ids of the rendered prompt>"
_CONTEXT = f"{_PROMPT} + <ids of the trace> + <bridge>"
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
_ADAPTER = fields(
    {
        "rank_pattern": or_null(mapping_of(integer(1))),
        "use_dora": or_null(boolean),
        "modules_to_save": free_form,
        "trainable_token_indices": free_form,
    },
    base_model_name_or_path=string(10_000, least=1),
    r=integer(1),
)
_NOT_SERVED = ("use_dora", "modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class Adapter:
    """
    LoRA adapter that vLLM serves on top of its base model.

    Args:
        base_model (`str`):
            Folder or Hub id of the base model.
        rank (`int`):
            Largest rank of its matrices.
    """

    base_model: str
    rank: int


def find_adapter(model: str) -> Adapter | None:
    """
    Return the adapter in a model's folder, or `None` for a whole model.

    Raises:
        `ValueError`: If its configuration is damaged, or vLLM cannot serve it.
    """
    try:
        file = find_file(model, "adapter_config.json")
    except OSError:
        return None
    values = read_json(file, _ADAPTER, MEBIBYTE)
    adapter = Adapter(
        values["base_model_name_or_path"], max([values["r"], *(values.get("rank_pattern") or {}).values()])
    )
    reasons = [f"`{name}`" for name in _NOT_SERVED if values.get(name)]
    if adapter.rank > _LORA_RANKS[-1]:
        reasons.append(f"rank {adapter.rank}")
    if reasons:
        raise ValueError(
            f"vLLM does not serve adapters with {', '.join(reasons)}. Merge {model} into its base model with PEFT's "
            "`merge_and_unload`, save the result with the tokenizer and anytime_config.json, and serve that."
        )
    return adapter


def check_served(client: CompletionClient, model: str) -> None:
    """
    Refuse to ask a server for an adapter that it does not serve: its base model would answer.

    Args:
        client ([`CompletionClient`]):
            The server.
        model (`str`):
            Folder or Hub id of the model.

    Raises:
        `ValueError`: If the model is an adapter, and the server does not serve it.
    """
    if served_from(model, client.models) is None and find_adapter(model) is not None:
        served = ", ".join(map(for_terminal, client.models))
        raise ValueError(
            f"{model} is an adapter, which {client.base_url} does not serve (but {served}). Start the "
            "server as `trl-anytime serve-command` says, or give --served-name."
        )


def reasoning_parser(config: AnytimeConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return vLLM's parser that separates trace and answer, or `None` if none knows the markers."""
    markers, tokens = config.markers, tokenizer.get_vocab()
    is_known = markers.think_end == "</think>" and not markers.in_text
    return "deepseek_r1" if is_known and {"<think>", "</think>"} <= tokens.keys() else None


@dataclass(frozen=True)
class Request:
    """
    Request to a server.

    Args:
        purpose (`str`):
            Purpose of the request.
        path (`str`):
            Path of the endpoint.
        body (`dict[str, Any]`):
            Body of the request.
    """

    purpose: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Deployment:
    """
    Description of how to serve a model.

    Args:
        command (`list[str]`):
            Words of the command that starts the server.
        requests (`list[Request]`):
            Requests to the server.
        base_url (`str`):
            Address of the server.
        notes (`list[str]`):
            Remarks.
    """

    command: list[str]
    requests: list[Request]
    base_url: str
    notes: list[str]

    def command_line(self) -> str:
        """Return the command as a line for a shell."""
        return " ".join(map(for_shell, self.command))

    def text(self) -> str:
        """Return everything as text for a shell. Words are quoted, and other text is a comment."""
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


def deployment(
    model: str, config: AnytimeConfig, budget: int, adapter: Adapter | None = None, parser: str | None = None
) -> Deployment:
    """
    Return how to serve a model with vLLM.

    Args:
        model (`str`):
            Folder or Hub id of the model.
        config ([`AnytimeConfig`]):
            Anytime config of the model.
        budget (`int`):
            Budget in thinking tokens, in the requests and as the server's default.
        adapter ([`Adapter`], *optional*):
            Adapter that the model is, see [`find_adapter`].
        parser (`str`, *optional*):
            See [`reasoning_parser`].

    Raises:
        `ValueError`: If the budget is not a positive int.
    """
    check_budgets([budget], "budget")
    command = ["vllm", "serve", model if adapter is None else adapter.base_model]
    if adapter is not None:
        rank = min(rank for rank in _LORA_RANKS if rank >= adapter.rank)
        module = for_json({"name": model, "path": model})
        command += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", module, "--tokenizer", model]
    # The last tells a session whether the server still has what it computed
    command += ["--generation-config", "vllm", "--enable-prefix-caching", "--enable-prompt-tokens-details"]
    if config.chat_template_kwargs:
        command += ["--default-chat-template-kwargs", for_json(config.chat_template_kwargs)]
    if parser is not None:
        command += ["--reasoning-parser", parser]
    if budget != config.budgets[-1]:
        command += ["--additional-config", for_json({BUDGET_FIELD: budget})]
    command += ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat = {
        "model": model,
        "messages": config.conversation("<question>"),
        "vllm_xargs": {BUDGET_FIELD: budget},
        # One more for the EOS that ends an answer at its limit
        "max_tokens": budget + config.markers.max_bridge_length + config.max_summary_length + 1,
        "chat_template_kwargs": config.chat_template_kwargs,
        **config.sampling.vllm(),
    }
    notes = [
        f"A request without a budget gets {budget} tokens, or fewer if its max_tokens leaves no room for the answer. "
        "A budget of 0 means no thinking.",
        "The server enforces the budget by the logits processor of this package, which must be installed beside vLLM. "
        "Without it, leave out --logits-processors and send the two requests by token ids. `CompletionClient` and "
        "`trl-anytime eval --base-url` do so on any vLLM server.",
        "vLLM's own thinking_token_budget is not the same. It adds no answer bridge after a trace that ended by "
        "itself. It misses the end of such a trace if --reasoning-config forces more than the end marker.",
        f"To check the server: trl-anytime probe {for_shell(model)} --base-url http://localhost:8000",
    ]
    if config.system_prompt is not None:
        notes.insert(
            0,
            "The model was trained with a system prompt, which a server does not add. Clients send it as the first "
            "message, as above.",
        )
    one = Request("One request, with a budget that the server enforces", "/v1/chat/completions", chat)
    return Deployment(command, [one, *_by_token_ids(model, config, budget)], "http://localhost:8000", notes)


def _by_token_ids(model: str, config: AnytimeConfig, budget: int) -> list[Request]:
    stop, eos = config.rollout_settings(1).stop_token_ids, config.eos_token_ids
    think = completion_body(model, [], budget, stop, config.sampling)
    answer = completion_body(model, [], config.max_summary_length, eos, config.sampling)
    return [
        Request("By token ids: 1. Think up to the budget", "/v1/completions", {**think, "prompt": _PROMPT}),
        Request(_answer_behind(config), "/v1/completions", {**answer, "prompt": _CONTEXT}),
    ]


def _answer_behind(config: AnytimeConfig) -> str:
    markers = config.markers
    closed, ended = list(markers.truncation_bridge_ids + markers.answer_bridge_ids), list(markers.answer_bridge_ids)
    return f"2. Answer. The bridge is {closed} after a cut trace, and {ended} after one that ended by itself"
