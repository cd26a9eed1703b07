"""
Run by `test_server.py` under torchrun: trains through a vLLM server, which is then killed in mid-phase.

Weights are not transferred: that needs NCCL. The two methods of TRL's client that do so are replaced, nothing else.
"""

import json
import os
import signal
import sys
import time

from requests.adapters import HTTPAdapter
from trl.generation.vllm_client import VLLMClient

import tests.vllm_engine.conftest  # noqa: F401  environment variables and paths, before the libraries
from tests.support.tiny import make_dataset, tiny_trainer

RANK = int(os.environ["RANK"])
MODEL, URL, SERVER_PID, OUTPUT_DIR = sys.argv[1:]

VLLMClient.init_communicator = lambda self, device: None
VLLMClient.update_named_params = lambda self, metadata, params: [None for _ in params]


def server_trainer(url, **settings):
    # 4 rollouts per rank and groups of 8: each group is split across both ranks
    return tiny_trainer(
        OUTPUT_DIR,
        model=MODEL,
        num_generations=8,
        per_device_train_batch_size=4,
        ddp_backend="gloo",
        max_steps=1,
        model_init_kwargs={"dtype": "float32"},
        use_vllm=True,
        vllm_mode="server",
        vllm_server_base_url=url,
        vllm_server_timeout=5.0,
        **settings,
    )


def error_of(function):
    start = time.monotonic()
    try:
        function()
    except (ConnectionError, RuntimeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - start}
    return None


def spy_on_requests(trainer):
    """Prompts and continuations of each, for every call of the client, which only the first rank has."""
    requests = []
    if RANK == 0:
        client = trainer.vllm_generation.vllm_client
        generate = client.generate

        def spy(*, prompts, n, **kwargs):
            requests.append((len(prompts), n))
            return generate(prompts=prompts, n=n, **kwargs)

        client.generate = spy
    return requests


def kill_server_before_summaries(trainer):
    if RANK == 0:
        client = trainer.vllm_generation.vllm_client._client  # TRL's own
        # TRL tries for a minute
        client.session.mount("http://", HTTPAdapter(max_retries=0))
        generate = client.generate

        def kill_first(*, prompts, **kwargs):
            if kwargs["max_tokens"] == trainer.args.max_summary_length:
                os.kill(int(SERVER_PID), signal.SIGKILL)
            return generate(prompts=prompts, **kwargs)

        client.generate = kill_first


if __name__ == "__main__":
    results = {}
    results["unreachable"] = error_of(lambda: server_trainer("http://127.0.0.1:9"))  # where nothing listens
    results["too long"] = error_of(lambda: server_trainer(URL, budgets=[120]))
    trainer = server_trainer(URL)
    requests = spy_on_requests(trainer)
    trainer.train()
    results["log"] = [log for log in trainer.state.log_history if "loss" in log]
    trainer.evaluate(make_dataset())
    results["requests"] = list(requests)
    kill_server_before_summaries(trainer)
    results["killed"] = error_of(trainer.train)
    with open(os.path.join(OUTPUT_DIR, f"rank{RANK}.json"), "w") as file:
        json.dump(results, file)
