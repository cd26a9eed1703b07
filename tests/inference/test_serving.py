"""The printed deployments say what the config says. vLLM's is run in `make test-vllm`."""

import json
import os
import shlex
import subprocess
from dataclasses import replace

import pytest

from tests.support.anytime import make_anytime_config
from trl_anytime.inference.serving import deployment

HOSTILE = [
    "$(touch ran)",
    "`touch ran`",
    "'; touch ran; '",
    '"; touch ran; "',
    "\ntouch ran\n",
    "\\\ntouch ran\n",
    "'\ntouch ran #",
    "\x1b[201~\rtouch ran\r",
    "$'\ntouch ran\n'",
    "\u2028touch ran\u2028",
    "EOF\ntouch ran\nEOF",
]


def test_requests_carry_the_config():
    config = replace(make_anytime_config(), max_summary_length=7)
    found = deployment("some/model", config, budget=100)
    assert found.command[:3] == ["vllm", "serve", "some/model"]
    assert found.command[-2:] == ["--logits-processors", "trl_anytime.vllm_budget:VLLMThinkingBudget"]
    chat, think, answer = (request.body for request in found.requests)
    assert (think["max_tokens"], think["stop_token_ids"]) == (100, [2, 5])
    assert (answer["max_tokens"], answer["stop_token_ids"]) == (7, [2])
    assert chat["vllm_xargs"] == {"thinking_budget": 100} and chat["temperature"] == 0
    assert chat["max_tokens"] == 100 + 3 + 7 + 1
    text = found.text()
    assert "[9, 5, 8]" in text and "[8]" in text  # both bridges, as ids


@pytest.mark.parametrize("hostile", HOSTILE, ids=repr)
def test_what_is_pasted_runs_nothing_but_the_commands(hostile, tmp_path):
    """All that is printed goes through a real shell, in which the commands only say what they were given."""
    config = make_anytime_config()
    end = config.markers.think_end
    markers = replace(config.markers, truncation_bridge=f"{hostile}{end}{hostile}", answer_bridge=hostile)
    config = replace(config, markers=markers, chat_template_kwargs={hostile: hostile})
    found = deployment(f"model{hostile}", config, budget=7)
    (tmp_path / "bin").mkdir()
    for name in ("vllm", "curl"):
        command = tmp_path / "bin" / name
        command.write_text('#!/bin/sh\nprintf "%s\\0" "$0" "$@" >> "$CALLS"\nprintf "\\1" >> "$CALLS"\n')
        command.chmod(0o755)
    (tmp_path / "here").mkdir()
    text = found.text()
    assert not set("\x1b\r\u2028") & set(text)
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    for interactive in ([], ["-i"]):  # which expands `!`
        (tmp_path / "calls").unlink(missing_ok=True)
        shell = ["bash", "--norc", *interactive]
        subprocess.run(shell, input=text.encode(), env=environment, cwd=tmp_path / "here", capture_output=True)
        assert not list((tmp_path / "here").iterdir())
        calls = [call.split("\0")[1:-1] for call in (tmp_path / "calls").read_bytes().decode().split("\1")[:-1]]
        assert calls[0] == found.command[1:]
        assert [call[0] for call in calls[1:]] == [found.base_url + request.path for request in found.requests]
        assert [json.loads(call[-1]) for call in calls[1:]] == [request.body for request in found.requests]
    assert subprocess.run(["bash", "-n"], input=text.encode()).returncode == 0


def test_a_usual_command_line_is_plain():
    found = deployment("some/model", make_anytime_config(), budget=100)
    assert shlex.split(found.command_line()) == found.command


@pytest.mark.parametrize("budget", [0, -1, True, 2.5])
def test_a_budget_that_is_none(budget):
    with pytest.raises(ValueError, match="`budget`"):
        deployment("some/model", make_anytime_config(), budget=budget)
