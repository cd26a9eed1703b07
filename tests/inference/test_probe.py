"""The probe's verdicts on servers that keep to budgets, ignore them, or close traces in other ways."""

import json
from dataclasses import replace

import pytest

from tests.support.anytime import make_anytime_config
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_tokenizer
from trl_anytime import CompletionClient
from trl_anytime.inference.probe import OWN_FIELD, VLLM_FIELD, escapes, judge, probe, results_table, verdict

CONFIG = make_anytime_config()  # "so </think>" (9, 5) closes, "answer" (8) follows
ONE, THREE, SO, END, ANSWER, EOS = 11, 13, 9, 5, 8, 2


def enforced(budget):
    return [*[ONE] * budget, SO, END, ANSWER, THREE, EOS]


# What a server answers at a budget, and what is said about it
# By the answer at a budget: what the verdict names, and outcome and `answered` of the first result
SERVERS = {
    "enforces": (enforced, None, ("enforced", True)),
    "ignores": (lambda budget: [*[ONE] * 40, END, ANSWER, THREE, EOS], r"\(4, 8 tokens\)", ("ignored", True)),
    "never ends": (lambda budget: [ONE] * 40, r"\(4, 8 tokens\)", ("ignored", False)),
    "stops without an answer": (lambda budget: [ONE] * budget, r"\b4 tokens\b", ("not reached", False)),
    "bare marker": (
        lambda budget: [*[ONE] * budget, END, THREE, EOS],
        r"\b4 tokens\b.*'so </think>'",
        ("enforced", True),
    ),
    "no answer bridge": (
        lambda budget: [*[ONE] * budget, SO, END, THREE, EOS],
        r"\b4 tokens\b.*'answer'",
        ("enforced", True),
    ),
    "no answer": (lambda budget: [*[ONE] * budget, SO, END, ANSWER, EOS], r"\b4 tokens\b", ("enforced", False)),
    "ended twice": (lambda budget: [ONE, END, THREE, SO, END, ANSWER, EOS], r"\b4 tokens\b", ("not reached", True)),
    "too short a question": (
        lambda budget: [ONE, END, ANSWER, THREE, EOS],
        "--budgets.*--question",
        ("not reached", True),
    ),
    "one of two ignored": (
        lambda budget: enforced(4) if budget == 4 else [*[ONE] * 40, END, THREE, EOS],
        r"\(8 tokens\)",
        ("enforced", True),
    ),
}


@pytest.mark.parametrize(("answer", "expected", "first"), SERVERS.values(), ids=SERVERS)
@pytest.mark.parametrize("field", ["vllm_xargs.thinking_budget", "custom_params.thinking_budget"])
def test_verdicts(answer, expected, first, field):
    def chat(body):
        for part in field.split("."):
            body = body[part]
        return answer(body)

    tokenizer = make_tokenizer()
    with serving(TinyServer(chat=chat, tokenizer=tokenizer)) as server:
        client = CompletionClient(server.url, patience=1.0)
        results = probe(client, CONFIG, tokenizer, [4, 8], field)
    assert (results[0].outcome, results[0].answered) == first
    wrong = verdict(results)
    if expected is None:
        assert wrong is None
        assert [result.thinking_tokens for result in results] == [4, 8]
    else:
        with pytest.raises(ValueError, match=expected):
            raise ValueError(wrong)
    assert len(results_table(results).splitlines()) == 3


@pytest.mark.parametrize(("field", "other"), [(OWN_FIELD, VLLM_FIELD), (VLLM_FIELD, OWN_FIELD), ("mine", None)])
@pytest.mark.parametrize("faults", [["refuses", "refuses"], []], ids=["refuses", "ignores"])
def test_a_server_of_another_field(field, other, faults):
    tokenizer = make_tokenizer()
    with serving(TinyServer(tokenizer=tokenizer, faults=faults, chat=lambda body: [ONE] * 40)) as server:
        results = probe(CompletionClient(server.url, patience=1.0), CONFIG, tokenizer, [4, 8], field)
        assert [body[field.split(".")[0]] for body in server.bodies][-1] in ({"thinking_budget": 8}, 8)
    wrong = verdict(results, field)
    assert ("thinking budgets are not configured" in wrong) == bool(faults)
    assert [name for name in (OWN_FIELD, VLLM_FIELD) if f"--budget-field {name}" in wrong] == (
        [other] if other else []
    )


def test_a_thinking_that_ended_by_itself_is_fine():
    tokenizer = make_tokenizer()
    result = judge([ONE, ONE, END, THREE, EOS], 4, CONFIG, tokenizer)
    assert (result.outcome, result.thinking_tokens, result.passed) == ("not reached", 3, True)
    assert result.detail and result.detail in results_table([result])


def test_a_trace_without_an_end():
    tokenizer = make_tokenizer()
    by_eos, cut = (judge(ids, 4, CONFIG, tokenizer).markers for ids in ([ONE, EOS], [ONE] * 2))
    assert "EOS" in by_eos and "EOS" not in cut


def test_answers_that_resume_the_reasoning():
    """Behind a cut alone: with a second end, or without an answer in the 4 tokens that training allows."""
    tokenizer = make_tokenizer()
    cases = {
        (THREE, EOS): None,
        (THREE, END, EOS): "reopened",
        (tokenizer.convert_tokens_to_ids("<think>"), THREE, EOS): "reopened",
        (SO,) * 9: "unanswered",
        (SO, SO, SO, EOS): None,
    }
    results = [judge([*[ONE] * 4, SO, END, ANSWER, *answer], 4, CONFIG, tokenizer) for answer in cases]
    assert [result.escape for result in results] == list(cases.values())
    said = escapes(results)
    assert "3 of 5" in said and "4 (unanswered)" in said and escapes(results[:1]) is None
    assert results_table(results).count("unanswered") == 1
    assert judge([ONE, END, ANSWER, *[SO] * 9], 4, CONFIG, tokenizer).escape is None  # it ended by itself


def test_a_bridge_that_is_nothing_but_the_marker():
    """Where it stands tells a trace that was cut from one that ended by itself."""
    config = replace(CONFIG, markers=replace(CONFIG.markers, truncation_bridge_ids=(END,)))
    tokenizer = make_tokenizer()
    for length, outcome in ((2, "not reached"), (4, "enforced"), (6, "ignored")):
        result = judge([*[ONE] * length, END, ANSWER, THREE, EOS], 4, config, tokenizer)
        assert (result.outcome, result.markers) == (outcome, "trained")


def test_text_of_servers_that_return_no_ids():
    """The parts into which a reasoning parser has taken the answer are put together again."""
    tokenizer = make_tokenizer()
    messages = {
        4: {"reasoning_content": "1 1 1 1 so ", "content": " answer 3"},
        8: {"content": "1 1 1 1 1 1 1 1 so </think> answer 3"},
    }
    with serving(TinyServer(chat=None, tokenizer=tokenizer)) as server:
        handler = server.RequestHandlerClass

        class Parsed(handler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                message = messages[body["vllm_xargs"]["thinking_budget"]]
                self.send({"choices": [{"index": 0, "message": message}]})

        server.RequestHandlerClass = Parsed
        results = probe(CompletionClient(server.url, patience=1.0), CONFIG, tokenizer, [4, 8])
    assert verdict(results) is None
    assert [result.thinking_tokens for result in results] == [4, 8]
