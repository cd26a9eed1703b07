"""TRL's vLLM server in training: a check before TRL's own, and failures that are reported on every rank."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl import GRPOConfig
from trl.generation.vllm_generation import VLLMGeneration

from ..outside.validation import boolean, fields, integer, list_of, or_null, string
from .backend import Sampler

_MODELS = fields(data=list_of(fields(id=string(1000), root=string(10_000), max_model_len=integer(1)), least=1))
_SERVER_INFO = fields(
    vllm_config=fields(
        weight_transfer_config=lambda value, name: value,  # only whether there is one matters
        cache_config=fields(enable_prefix_caching=or_null(boolean)),
    )
)


def server_url(args: GRPOConfig) -> str:
    """Return the address of the vLLM server that a configuration names."""
    return args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"


def check_server(url: str, timeout: float, model_name: str) -> int:
    """
    Wait until the vLLM server answers, and check that BRPO can train with it.

    TRL looks for the server on the main process only, where an error leaves the other ranks waiting. This check comes
    before TRL's. It is a collective call.

    Args:
        url (`str`):
            Address of the server.
        timeout (`float`):
            Seconds to wait for it.
        model_name (`str`):
            Repository or folder of the model to be trained. Empty if it has none.

    Returns:
        `int`: Most tokens of a prompt and its continuation together in the server.

    Raises:
        `ConnectionError`: On every rank, if the server does not answer in time.
        `ValueError`: On every rank, if the server serves another model or lacks what TRL and BRPO need.
    """
    outcome: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            outcome = [_check_server(url, timeout, model_name)]
        except (ConnectionError, ValueError) as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def _check_server(url: str, timeout: float, model_name: str) -> int:
    from ..outside.transport import Server  # needs the `openai` client, which vLLM brings

    server = Server(url, patience=timeout, first_wait=min(1.0, timeout / 10), longest_wait=2.0)
    try:
        served = server.request("/v1/models", check=_MODELS)["data"][0]
    except ConnectionError as error:
        raise ConnectionError(
            f"The vLLM server at {url} did not answer within `vllm_server_timeout`: {error}. Start it with "
            "`vllm serve`, or set `vllm_server_base_url`."
        ) from error

    names = {served["id"], served["root"]}
    if model_name and model_name not in names and Path(model_name).resolve() != Path(served["root"]).resolve():
        raise ValueError(
            f"The vLLM server at {url} serves {served['root']!r}, but the model to be trained is {model_name!r}. "
            "Serve that model. If both have the same architecture, you can also restart the server with "
            f"`--served-model-name {model_name}`."
        )
    try:
        config = server.request("/server_info?config_format=json", check=_SERVER_INFO)["vllm_config"]
    except ValueError as error:
        raise ValueError(
            f"The vLLM server at {url} does not offer its development endpoints, by which TRL sends it the weights. "
            f"Restart it with `VLLM_SERVER_DEV_MODE=1` in its environment. {error}"
        ) from error
    if config["weight_transfer_config"] is None:
        raise ValueError(
            f"The vLLM server at {url} cannot receive weights. Restart it with "
            """`--weight-transfer-config '{"backend": "nccl"}'`."""
        )
    if not config["cache_config"]["enable_prefix_caching"]:
        raise ValueError(
            f"The vLLM server at {url} runs without a prefix cache, so every summary would compute its thinking "
            "again. Restart it with `--enable-prefix-caching`."
        )
    return served["max_model_len"]


class _PatientClient:
    """
    TRL's client. It holds its failures back until every rank can be told.

    TRL calls the client on the main process, between collective calls. An error there would leave the other ranks
    waiting. After a failure, the client does nothing and returns empty continuations.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            TRL's client.

    Attributes:
        error (`Exception`, *optional*):
            The first failure.
    """

    def __init__(self, client: Any):
        self._client = client
        self.error: Exception | None = None

    @contextmanager
    def _patiently(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, every rank must hear of it
            self.error = error

    def generate(self, *, prompts: list, n: int, **kwargs: Any) -> dict[str, Any]:
        if self.error is None:
            with self._patiently():
                return self._client.generate(prompts=prompts, n=n, **kwargs)
        nothing: list[list] = [[] for _ in range(n * len(prompts))]
        return {"prompt_ids": prompts, "completion_ids": nothing, "logprobs": nothing, "logprob_token_ids": None}

    def update_named_params(self, metadata: list, named_params: Iterator) -> None:
        if self.error is None:
            with self._patiently():
                self._client.update_named_params(metadata, named_params)
        for _ in named_params:  # the other ranks take part in gathering what is left
            pass

    def reset_prefix_cache(self) -> None:
        if self.error is None:
            with self._patiently():
                self._client.reset_prefix_cache()


class ServerSampler:
    """
    [`~trl_anytime.rollout.backend.Sampler`] over TRL's server mode. It raises failures on every rank.

    Args:
        sample ([`~trl_anytime.rollout.backend.Sampler`]):
            Function that samples with `vllm_generation`.
        vllm_generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's backend, in server mode. Its client is replaced by one that reports failures here.
    """

    def __init__(self, sample: Sampler, vllm_generation: VLLMGeneration):
        self._sample = sample
        self._client: _PatientClient | None = None
        if vllm_generation.accelerator.is_main_process:
            self._client = _PatientClient(vllm_generation.vllm_client)
            vllm_generation.vllm_client = self._client  # type: ignore[assignment]

    def __call__(
        self, prompt_ids: list[list[int]], max_new_tokens: int, stop_token_ids: list[int], num_generations: int
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """
        Sample continuations, see [`~trl_anytime.rollout.backend.Sampler`]. This is a collective call.

        Raises:
            `RuntimeError`: On every rank, if the server failed since the last call.
        """
        sampled = self._sample(prompt_ids, max_new_tokens, stop_token_ids, num_generations)
        error = None
        if self._client is not None:
            error, self._client.error = self._client.error, None
        message = [None if error is None else f"The vLLM server failed: {type(error).__name__}: {error}"]
        broadcast_object_list(message)
        if message[0] is not None:
            raise RuntimeError(message[0]) from error
        return sampled
