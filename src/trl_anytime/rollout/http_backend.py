"""
Both phases of a rollout on an OpenAI-compatible server, by token ids.

A request that is refused for now, stalls or breaks off is sent again until it succeeds or the patience ends. Answers
are checked. One that is shorter than it should be is an error, never a result.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from ..outside.display import for_terminal
from ..outside.validation import TOKEN_ID, Check, Unfit, fields, integer, list_of, or_null, string
from .backend import Generation, RolloutSettings
from .sampling import BUDGET_FIELD, NO_BUDGET, Sampling
from .settling import Watch
from .types import Rollout, Thinking

_NAME = string(10_000)
MODELS = fields(
    data=list_of(
        fields(
            {"max_model_len": or_null(integer(1)), "root": or_null(_NAME), "parent": or_null(_NAME)},
            id=string(10_000, least=1),
        ),
        least=1,
    )
)

_USAGE = or_null(fields({"prompt_tokens_details": or_null(fields({"cached_tokens": or_null(integer(0))}))}))


class CompletionClient:
    """
    Client of an OpenAI-compatible server.

    Args:
        base_url (`str`):
            Address of the server, with or without `/v1`.
        model (`str`, *optional*):
            Name of the model. Defaults to the one that is served from `folder`, else to the first one.
        api_key (`str`, *optional*):
            Key that the server asks for.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds in which a whole answer must arrive. In a stream, each token has this much time.
        patience (`float`, *optional*, defaults to `900.0`):
            Seconds for which a failed request is sent again.
        first_wait (`float`, *optional*, defaults to `1.0`):
            Seconds before the second attempt. Each later wait is twice as long, up to a minute.
        concurrency (`int`, *optional*, defaults to `32`):
            Most requests at a time.
        folder (`str`, *optional*):
            Folder or Hub id of the model. A server of an adapter serves its base model, too, and names that first.

    Attributes:
        models (`dict[str, dict]`):
            What the server says of each model that it serves, by name.
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
        folder: str | None = None,
    ):
        try:
            from ..outside.transport import Server
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{error.name}, which the client of servers needs, is missing. Run "
                "`pip install 'trl-anytime[client]'`."
            ) from error
        self._server = Server(base_url, api_key, timeout, patience, first_wait)
        self.base_url, self.concurrency = self._server.url, concurrency
        self.models = cards = {card["id"]: card for card in self.request("/v1/models", check=MODELS)["data"]}
        self.model = model or served_from(folder, cards) or next(iter(cards))
        if self.model not in cards:
            served = ", ".join(map(for_terminal, sorted(cards)))
            raise ValueError(
                f"{self.base_url} does not serve {model!r}. Choose one of the models that it serves: {served}."
            )
        # vLLM says of an adapter only what its base model is
        parent = cards.get(cards[self.model].get("parent"), {})
        self.max_model_len: int | None = cards[self.model].get("max_model_len") or parent.get("max_model_len")

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        num_continuations: int = 1,
        seed: int | None = None,
        on_cached: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """
        Continue prompts.

        Args:
            prompt_ids (`Sequence[Sequence[int]]`):
                N prompts.
            max_tokens (`int`):
                Most tokens of a continuation.
            stop_token_ids (`list[int]`):
                Tokens that end a continuation. They are part of it.
            sampling ([`Sampling`]):
                Settings of sampling.
            num_continuations (`int`, *optional*, defaults to `1`):
                Number of continuations n of each prompt.
            seed (`int`, *optional*):
                Seed of sampling.
            on_cached (`Callable`, *optional*):
                Called with the number of prompt tokens whose keys and values the server still had, if the server says
                so. A vLLM server says so if it was started with `--enable-prompt-tokens-details`.

        Returns:
            `list[list[int]]`: N · n continuations. Those of one prompt are adjacent.

        Raises:
            `ConnectionError`: If the server gives no complete answer while the patience lasts.
            `ValueError`: If the server refuses the request for good, or cannot return token ids.
        """
        if sampling.temperature == 0 and num_continuations > 1:  # vLLM refuses to make the same one several times
            once = self.complete(prompt_ids, max_tokens, stop_token_ids, sampling, 1, seed, on_cached)
            return [list(ids) for ids in once for _ in range(num_continuations)]
        body = completion_body(self.model, prompt_ids, max_tokens, stop_token_ids, sampling, num_continuations, seed)

        complete = fields({"usage": _USAGE}, choices=list_of(_choice(max_tokens)))

        def check(answer: Any, name: str) -> Any:
            choices = complete(answer, name)["choices"]
            if len(choices) != len(prompt_ids) * num_continuations:
                raise Unfit(f"{len(choices)} of {len(prompt_ids) * num_continuations} continuations came")
            if sorted(choice["index"] for choice in choices) != list(range(len(choices))):
                raise Unfit("`choices` are not numbered from 0 on")
            if any(choice.get("token_ids") is None for choice in choices):
                raise ValueError(
                    f"{self.base_url} does not return token ids, so traces cannot be cut exactly. Serve the model "
                    "with vLLM (`trl-anytime serve-command`), which supports `return_token_ids`."
                )
            for choice in choices:
                reason, length = choice["finish_reason"], len(choice["token_ids"])
                if reason not in ("stop", "length") or (reason == "length" and length < max_tokens):
                    raise Unfit(f"a continuation ended after {length} of {max_tokens} tokens ({reason!r})")
            return answer

        answer = self.request("/v1/completions", body, check=check)
        _tell_cached(answer, on_cached)
        choices = answer["choices"]
        return [choice["token_ids"] for choice in sorted(choices, key=lambda choice: choice["index"])]

    def stream(
        self,
        prompt_ids: Sequence[int],
        max_tokens: int,
        stop_token_ids: list[int],
        sampling: Sampling,
        seed: int | None = None,
        on_cached: Callable[[int], None] | None = None,
    ) -> Generator[list[int], None, None]:
        """
        Continue one prompt, and yield the tokens as they come.

        A failed request is not sent again, because its tokens may have been shown.

        Args:
            prompt_ids (`Sequence[int]`):
                The prompt.
            max_tokens, stop_token_ids, sampling, seed, on_cached:
                See [`complete`].

        Raises:
            `ConnectionError`: If the server fails or breaks off.
            `ValueError`: If the server refuses the request.
        """
        body = completion_body(self.model, [prompt_ids], max_tokens, stop_token_ids, sampling, seed=seed)
        body["stream"] = True
        if on_cached is not None:
            body["stream_options"] = {"include_usage": True}
        event = fields({"usage": _USAGE}, choices=list_of(_choice(max_tokens, streamed=True), most=1))

        def parse(value: Any) -> Any:
            found = event(value, "an event")
            _tell_cached(found, on_cached)
            choices = found["choices"]
            return choices and (choices[0].get("token_ids") or choices[0]["finish_reason"]) and choices[0]

        num_tokens, reason = 0, None
        for choice in self._server.stream("/v1/completions", body, parse):
            tokens, reason = choice.get("token_ids") or [], choice["finish_reason"]
            num_tokens += len(tokens)
            if num_tokens > max_tokens:
                raise ConnectionError(f"{self.base_url} broke off: more than {max_tokens} tokens came")
            if tokens:
                yield tokens
        if reason not in ("stop", "length"):
            raise ConnectionError(f"{self.base_url} broke off ({reason!r}).")

    def request(self, path: str, body: dict[str, Any] | None = None, *, check: Check) -> Any:
        """Return an answer of the server, see [`~trl_anytime.outside.transport.Server.request`]."""
        return self._server.request(path, body, check=check)


def served_from(folder: str | None, cards: dict[str, dict[str, Any]]) -> str | None:
    """
    Return the name of the model that a server has from a folder, or `None`.

    Args:
        folder (`str`, *optional*):
            Folder or Hub id of the model.
        cards (`dict[str, dict]`):
            What the server says of each model, by name.
    """
    if folder is None:
        return None
    wanted = Path(folder).resolve()
    names = [name for name in cards if Path(name).resolve() == wanted]
    names += [name for name, card in cards.items() if Path(card.get("root") or name).resolve() == wanted]
    return names[0] if names else None


def _tell_cached(answer: dict[str, Any], on_cached: Callable[[int], None] | None) -> None:
    """Call `on_cached` with the cached tokens of the prompt, if an answer says how many they are."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    if on_cached is not None and details.get("cached_tokens") is not None:
        on_cached(details["cached_tokens"])


def _choice(max_tokens: int, streamed: bool = False) -> Check:
    """Return the check of a continuation, or of a part of one in a stream."""
    token_ids = or_null(list_of(TOKEN_ID, most=max_tokens))
    optional = {"token_ids": token_ids}
    if streamed:
        return fields(optional, finish_reason=or_null(string(100)))
    return fields(optional, index=integer(0), finish_reason=or_null(string(100)))


def completion_body(
    model: str,
    prompt_ids: Sequence[Sequence[int]],
    max_tokens: int,
    stop_token_ids: list[int],
    sampling: Sampling,
    num_continuations: int = 1,
    seed: int | None = None,
) -> dict[str, Any]:
    """Return the body of a request to `/v1/completions`, see [`CompletionClient.complete`]."""
    body = {
        "model": model,
        "prompt": [list(ids) for ids in prompt_ids],
        "max_tokens": max_tokens,
        "stop_token_ids": stop_token_ids,
        "n": num_continuations,
        "return_token_ids": True,
        "vllm_xargs": {BUDGET_FIELD: NO_BUDGET},  # a client that continues token ids cuts by itself
        **sampling.vllm(),
    }
    return body if seed is None else {**body, "seed": seed}


class ServerGeneration(Generation):
    """
    The two phases on an OpenAI-compatible server, with one request for a trace and one for all its summaries.

    A trace that may stop when it has settled has a request for the tokens up to each check. The server goes on from
    its prefix cache. A seeded draw cannot be continued in this way.

    Args:
        client ([`CompletionClient`]):
            The server.
        sampling ([`Sampling`]):
            Settings of sampling.
        seed (`int`, *optional*):
            Seed of the first rollout. Each further rollout has the next number.
    """

    def __init__(self, client: CompletionClient, sampling: Sampling, seed: int | None = None):
        super().__init__()
        self._client, self._sampling, self._seed = client, sampling, seed

    def roll_out(self, prompt_ids: Sequence[Sequence[int]], settings: RolloutSettings) -> list[Rollout]:
        if settings.stop is not None and self._seed is not None and self._sampling.temperature > 0:
            raise ValueError(
                "A server cannot continue a seeded draw after a check, so the thinking would not be that of the seed. "
                "Leave out `seed` or `stop_when`, or set `temperature` to 0."
            )
        with ThreadPoolExecutor(min(self._client.concurrency, len(prompt_ids))) as pool:
            return list(pool.map(lambda i: self._roll_out(i, prompt_ids[i], settings), range(len(prompt_ids))))

    def _roll_out(self, index: int, prompt: Sequence[int], settings: RolloutSettings) -> Rollout:
        seed = None if self._seed is None else self._seed + index
        watch = None if settings.stop is None else settings.stop.watch()
        thinking = self._think(prompt, settings, watch, seed)
        contexts = settings.contexts(thinking)
        checks = [] if watch is None else watch.checks
        known = [settings.known_summaries(context, checks) for context in contexts]
        # One request gets A summaries of each prompt
        prompts = [
            context_ids
            for context, summaries in zip(contexts, known, strict=True)
            if summaries is None
            for context_ids in [context.token_ids(prompt, thinking)]
            * (context.num_summaries // settings.num_summaries)
        ]
        sampled = iter(self._summarise(prompts, settings, settings.num_summaries, seed) if prompts else [])
        by_context = [
            list(islice(sampled, context.num_summaries)) if summaries is None else summaries
            for context, summaries in zip(contexts, known, strict=True)
        ]
        return replace(Rollout.assemble(prompt, thinking, contexts, by_context), checks=checks)

    def _think(
        self, prompt: Sequence[int], settings: RolloutSettings, watch: Watch | None, seed: int | None
    ) -> Thinking:
        """Sample a trace, in parts between the checks if there is a rule that may stop it."""
        most, sampled = settings.budgets[-1], list[int]()
        while True:
            until = most if watch is None else min(most, watch.next_cut)
            (new,) = self._client.complete(
                [[*prompt, *sampled]], until - len(sampled), settings.stop_token_ids, self._sampling, seed=seed
            )
            sampled += new
            thinking = Thinking.from_tokens(sampled, settings.markers, settings.eos_token_ids)
            is_over = thinking.finished or thinking.ended_with_eos or len(sampled) == most
            if watch is None or is_over:
                return thinking
            context = settings.check_context(until)
            asked = [context.token_ids(prompt, thinking)]
            if watch.add(until, self._summarise(asked, settings, context.num_summaries, seed)):
                return thinking.stopped(until)

    def _summarise(
        self, prompts: Sequence[Sequence[int]], settings: RolloutSettings, num_summaries: int, seed: int | None
    ) -> list[list[int]]:
        return self._client.complete(
            prompts, settings.max_summary_length, settings.eos_token_ids, self._sampling, num_summaries, seed
        )
