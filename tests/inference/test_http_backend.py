"""A server as a backend: the same answers as the model, whatever goes wrong on the way, or an error."""

import re

import pytest

from tests.support.anytime import GREEDY, PROMPTS
from tests.support.servers import TinyServer, serving
from trl_anytime import CompletionClient, anytime_generate
from trl_anytime.inference.streaming import StreamingSampler, stream_answers


def make_client(server, **settings):
    return CompletionClient(server.url, **({"timeout": 5.0, "patience": 5.0, "first_wait": 0.01} | settings))


@pytest.mark.parametrize("num_summaries", [1, 2])
def test_the_tokens_are_those_of_the_model(model, tokenizer, config, num_summaries):
    expected = anytime_generate(model, tokenizer, PROMPTS, None, num_summaries, config=config)
    with serving(TinyServer(model)) as server:
        found = anytime_generate(make_client(server), tokenizer, PROMPTS, None, num_summaries, config=config)
        assert found == expected
        assert {body["temperature"] for body in server.bodies} == {0}
        assert len(server.bodies) == 2 * len(PROMPTS)  # a trace, and all its summaries


RECOVERABLE = [
    "overloaded",
    "rate_limited",
    "rate_limited_until_a_date",
    "stalls",
    "drops",
    "breaks_off",
    "garbles",
    "forgets_one",
    "gives_up_early",
    "aborts",
]


@pytest.mark.parametrize("fault", RECOVERABLE)
def test_a_fault_is_never_a_shorter_result(model, tokenizer, config, fault):
    expected = anytime_generate(model, tokenizer, PROMPTS[:1], config=config)
    # Of the thinking once, of the summaries twice
    with serving(TinyServer(model, [fault, None, fault, fault])) as server:
        client = make_client(server, timeout=0.5 if fault == "stalls" else 5.0)
        assert anytime_generate(client, tokenizer, PROMPTS[:1], config=config) == expected
        assert len(server.bodies) == 5 and not server.faults


@pytest.mark.parametrize("fault", RECOVERABLE)
def test_patience_ends(model, tokenizer, config, fault):
    with serving(TinyServer(model, [fault] * 100)) as server:
        client = make_client(server, timeout=0.3, patience=0.4)
        with pytest.raises(ConnectionError, match=rf"{server.url}.*\b0\.4 s"):
            anytime_generate(client, tokenizer, PROMPTS[:1], config=config)


def test_retry_after_is_kept(model, tokenizer, config, caplog):
    with serving(TinyServer(model, ["rate_limited"])) as server:
        anytime_generate(make_client(server), tokenizer, PROMPTS[:1], config=config)
    assert re.search(r"\b0\.2 s.*429 too fast", caplog.text)


def test_what_cannot_succeed_is_not_tried_again(model, tokenizer, config):
    for fault, message in (
        ("refuses", r"\(400\).*thinking budgets are not configured"),
        ("keeps_its_ids", "serve-command"),
    ):
        with serving(TinyServer(model, [fault])) as server:
            with pytest.raises(ValueError, match=message):
                anytime_generate(make_client(server), tokenizer, PROMPTS[:1], config=config)
            assert len(server.bodies) == 1


def test_nobody_there(model):
    with serving(TinyServer(model)) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=rf"{url}.*\b0 s.*Refused"):
        CompletionClient(url, patience=0.0)
    with pytest.raises(ValueError, match="'localhost:8000'"):
        CompletionClient("localhost:8000")


def test_names_and_contexts(model, tokenizer, config):
    with serving(TinyServer(model, max_model_len=20)) as server:
        with pytest.raises(ValueError, match="'other'.*tiny"):
            CompletionClient(server.url, "other")
        with pytest.raises(ValueError, match=r"\b20 tokens"):
            anytime_generate(CompletionClient(f"{server.url}/v1/"), tokenizer, PROMPTS, config=config)


def test_streaming(model, tokenizer, config, capsys):
    (expected,) = anytime_generate(model, tokenizer, PROMPTS[:1], config=config)
    with serving(TinyServer(model)) as server:
        for streamed in (model, make_client(server)):
            sample = StreamingSampler(streamed, tokenizer, GREEDY)
            rollout = stream_answers(sample, tokenizer, config, PROMPTS[0], 256)
            assert rollout == expected.rollout
            printed = capsys.readouterr().out
            thinking, *answers = printed.split("\n--- answer after")
            assert thinking.split() == tokenizer.decode(rollout.thinking.token_ids, skip_special_tokens=True).split()
            assert len(answers) == len(set(rollout.cuts))


@pytest.mark.parametrize("fault", ["drops", "overloaded", "garbles"])
def test_a_stream_that_breaks_off_is_an_error(model, tokenizer, config, fault):
    with serving(TinyServer(model, [fault])) as server:
        sample = StreamingSampler(make_client(server), tokenizer, GREEDY)
        with pytest.raises((ConnectionError, ValueError), match=server.url):
            stream_answers(sample, tokenizer, config, PROMPTS[0], 256)
