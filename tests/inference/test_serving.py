"""The printed deployments say what the config says. vLLM's is run in `make test-vllm`."""

import json
import os
import shlex
import subprocess
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model

from tests.support.anytime import make_anytime_config
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import CompletionClient
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.inference.serving import Adapter, check_served, deployment, find_adapter, reasoning_parser

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


def options_of(command):
    """The options of a command with their values, and what stands before them."""
    first = next(i for i, word in enumerate(command) if word.startswith("--"))
    flags = [word for word in command[first:] if word.startswith("--")]
    values = {
        a: b for a, b in zip(command, [*command[1:], "--"], strict=True) if a in flags and not b.startswith("--")
    }
    return command[:first], values


def test_a_request_without_a_budget_gets_that_of_the_command():
    config = make_anytime_config()
    for budget, expected in ((config.budgets[-1], None), (5, '{"thinking_budget": 5}')):
        _, options = options_of(deployment("some/model", config, budget).command)
        assert options.get("--additional-config") == expected


def test_arguments_of_the_template_are_those_of_the_config():
    config = replace(make_anytime_config(), chat_template_kwargs={"enable_thinking": True})
    _, options = options_of(deployment("some/model", config, 5).command)
    assert json.loads(options["--default-chat-template-kwargs"]) == {"enable_thinking": True}


def test_a_reasoning_parser():
    config, tokenizer = make_anytime_config(), make_tokenizer()
    assert reasoning_parser(config, tokenizer) == "deepseek_r1"
    _, options = options_of(deployment("some/model", config, 5, parser="deepseek_r1").command)
    assert options["--reasoning-parser"] == "deepseek_r1"
    assert reasoning_parser(make_anytime_config((19, 19)), tokenizer) is None


def save_adapter(folder, **settings):
    get_peft_model(make_model(), LoraConfig(target_modules="all-linear", **settings)).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/base"}))


@pytest.mark.parametrize(
    ("settings", "rank", "served"),
    [({"r": 4}, 4, "8"), ({"r": 17}, 17, "32"), ({"r": 4, "rank_pattern": {"q_proj": 9}}, 9, "16")],
)
def test_an_adapter_is_served_on_top_of_its_base_model(settings, rank, served, tmp_path):
    save_adapter(tmp_path, **settings)
    adapter = find_adapter(str(tmp_path))
    assert adapter == Adapter("some/base", rank)
    found = deployment(str(tmp_path), make_anytime_config(), 5, adapter)
    words, options = options_of(found.command)
    assert words == ["vllm", "serve", "some/base"] and "--enable-lora" in found.command
    assert options["--max-lora-rank"] == served and options["--tokenizer"] == str(tmp_path)
    assert json.loads(options["--lora-modules"]) == {"name": str(tmp_path), "path": str(tmp_path)}
    assert {request.body["model"] for request in found.requests} == {str(tmp_path)}
    assert "--served-name" not in found.text()  # the client finds it by its folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"r": 513}, "513"),
    ],
)
def test_adapters_that_vllm_does_not_serve(settings, named, tmp_path):
    save_adapter(tmp_path, **settings)
    with pytest.raises(ValueError, match=f"{named}.*merge_and_unload"):
        find_adapter(str(tmp_path))


def cards(adapter):
    """As vLLM 0.31 lists an adapter of a folder."""
    return [
        {"id": "some/base", "root": "some/base", "parent": None, "max_model_len": 200},
        {"id": "name", "root": adapter, "parent": "some/base"},
    ]


def test_an_adapter_is_found_on_its_server(tmp_path):
    save_adapter(tmp_path / "adapter", r=4)
    save_adapter(tmp_path / "other", r=4)
    folder = str(tmp_path / "adapter")
    with serving(TinyServer(cards=cards(f"{folder}/"))) as server:
        client = CompletionClient(server.url, folder=folder)
        assert (client.model, client.max_model_len) == ("name", 200)
        check_served(client, folder)
        for whole in ("some/base", "of/no/server", None):
            assert CompletionClient(server.url, folder=whole).model == "some/base"
        client = CompletionClient(server.url, folder=str(tmp_path / "other"))
        with pytest.raises(ValueError, match="does not serve .*some/base, name.*--served-name"):
            check_served(client, str(tmp_path / "other"))
        for command in (["probe"], ["generate", "1 2"]):
            words = [command[0], str(tmp_path / "other"), *command[1:], "--base-url", server.url]
            make_tokenizer().save_pretrained(tmp_path / "other")
            make_anytime_config().save_pretrained(tmp_path / "other")
            assert main(words) == BAD_INPUT
        assert not server.bodies


def test_a_whole_model_is_not_an_adapter(tmp_path):
    assert find_adapter(str(tmp_path)) is None
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="adapter_config.json.*base_model_name_or_path"):
        find_adapter(str(tmp_path))


@pytest.mark.parametrize("hostile", HOSTILE, ids=repr)
def test_what_is_pasted_runs_nothing_but_the_commands(hostile, tmp_path):
    """All that is printed goes through a real shell, in which the commands only say what they were given."""
    config = make_anytime_config()
    end = config.markers.think_end
    markers = replace(config.markers, truncation_bridge=f"{hostile}{end}{hostile}", answer_bridge=hostile)
    config = replace(config, markers=markers, chat_template_kwargs={hostile: hostile})
    found = deployment(f"model{hostile}", config, budget=7, adapter=Adapter(f"base{hostile}", 4))
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
