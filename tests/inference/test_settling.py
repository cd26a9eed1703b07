"""Stopping when it has settled: the trace is that without the rule, up to a stop that is found by hand."""

import re
from dataclasses import replace

import pytest
import torch

from tests.support.anytime import GREEDY, make_anytime_config
from tests.support.servers import TinyServer, serving
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import CompletionClient, Sampling, Settling, anytime_generate
from trl_anytime.cli import main
from trl_anytime.inference.streaming import StreamingSampler, stream_answers
from trl_anytime.rollout.settling import StopWhenSettled, Streak

BOXES = tuple(rf"\boxed{{{digit}}}" for digit in range(10))
PROMPTS = [" ".join(str(i * k % 10) for k in range(1, 2 + i % 5)) for i in range(1, 7)]
RULE = Settling(checks=2, every=4)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(extra_words=BOXES)


@pytest.fixture(scope="module")
def model(tokenizer):
    """A random model that often says a box, and seldom ends anything."""
    model = make_model(vocab_size=len(tokenizer)).eval()
    with torch.no_grad():
        model.lm_head.weight[[0, 1, 2, 3, 5]] = -5.0 * model.lm_head.weight[2]
        model.lm_head.weight[20:] *= 1.35
    return model


@pytest.fixture(scope="module")
def config():
    return replace(make_anytime_config(budgets=[6, 40]), max_summary_length=3)


def generate(model, tokenizer, config, **settings):
    return anytime_generate(model, tokenizer, PROMPTS, **{"config": config, "seed": 3, **settings})


def is_exact(free, stopped, config, tokenizer, rule):
    """How many traces settled. All are those without the rule up to where the checks' own answers say."""
    read = StopWhenSettled(rule, config.markers, tokenizer, config.max_summary_length, [2])._read
    for without, output in zip(free, stopped, strict=True):
        trace, full = output.rollout.thinking.token_ids, without.rollout.thinking.token_ids
        assert trace == full[: len(trace)]
        checks = output.rollout.checks
        assert [check.cut for check in checks] == [rule.every * (i + 1) for i in range(len(checks))]
        answers = []
        for check in checks:
            assert len(check.summaries) == rule.answers
            found = [read(summary) for summary in check.summaries]
            often = [answer for answer in found if answer and found.count(answer) >= rule.agreement * rule.answers]
            answers.append(max(often, key=found.count) if often else None)
        streaks = [
            answers[i - rule.checks : i]
            for i in range(rule.checks, len(answers) + 1)
            if None not in answers[i - rule.checks : i] and len(set(answers[i - rule.checks : i])) == 1
        ]
        if output.ended == "settled":
            # The last checks agree for the first time, and the thinking ends there
            assert len(streaks) == 1 and streaks[0] == answers[-rule.checks :]
            assert len(trace) == checks[-1].cut < len(full)
            assert [answer.thinking_tokens for answer in output.answers] == [min(6, len(trace)), len(trace)]
            assert not any(answer.finished for answer in output.answers)
            # The answers of the last check are not sampled again
            assert output.answers[-1].answer_ids == checks[-1].summaries[: len(output.answers[-1].answer_ids)]
        else:
            assert not streaks and trace == full and output.ended == without.ended
            assert len(checks) == (len(trace) - 1) // rule.every
        bridge = config.markers.max_bridge_length
        sampled = sum(len(summary) for check in checks for summary in check.summaries)
        assert output.check_tokens == sampled + bridge * rule.answers * len(checks)
    return sum(output.ended == "settled" for output in stopped)


@pytest.mark.parametrize(
    ("sampling", "rule"),
    [
        (GREEDY, RULE),
        (GREEDY, Settling(checks=3, every=5)),
        (Sampling(temperature=0.5), RULE),
        (Sampling(temperature=0.5), Settling(checks=2, every=4, answers=4, agreement=0.5)),
        (Sampling(temperature=0.5), Settling(checks=1, every=4, answers=2)),
    ],
)
@pytest.mark.parametrize("max_cached_tokens", [None, pytest.param(150, marks=pytest.mark.slow)])
def test_the_thinking_is_that_without_the_rule(model, tokenizer, config, sampling, rule, max_cached_tokens):
    """Whole batches, and parts of two or three traces."""
    settings = {"sampling": sampling, "max_cached_tokens": max_cached_tokens}
    free = generate(model, tokenizer, config, **settings)
    stopped = generate(model, tokenizer, config, **settings, stop_when=rule)
    assert 0 < is_exact(free, stopped, config, tokenizer, rule) < len(PROMPTS)
    assert generate(model, tokenizer, config, **settings, stop_when=rule) == stopped


def test_checks_are_the_answers_at_their_budgets(model, tokenizer, config):
    """Greedy ones, from the trace without the rule."""
    outputs = generate(model, tokenizer, config, sampling=GREEDY, stop_when=RULE)
    budgets = list(range(4, 40, 4))
    answered = generate(model, tokenizer, config, sampling=GREEDY, budgets=budgets)
    for output, full in zip(outputs, answered, strict=True):
        for check in output.rollout.checks:
            assert full.answers[budgets.index(check.cut)].answer_ids == check.summaries


def test_defaults(model, tokenizer, config):
    """A sixteenth of 48 tokens is 3."""
    outputs = generate(model, tokenizer, config, sampling=GREEDY, budgets=[6, 48], stop_when="settled")
    assert {output.rollout.checks[0].cut for output in outputs if output.rollout.checks} == {3}
    free = generate(model, tokenizer, config, sampling=GREEDY, budgets=[6, 48])
    assert is_exact(free, outputs, config, tokenizer, Settling(every=3)) > 0


def test_a_server(model, tokenizer, config):
    expected = generate(model, tokenizer, config, stop_when=RULE)
    assert {output.ended for output in expected} >= {"settled", "budget"}
    with serving(TinyServer(model)) as server:
        client = CompletionClient(server.url, patience=5.0, concurrency=2)
        assert generate(client, tokenizer, config, stop_when=RULE) == expected
        asked = [body["max_tokens"] for body in server.bodies if len(body["prompt"]) == 1]
        assert set(asked) <= {4, 3}  # thinking up to a check, or a summary
        with pytest.raises(ValueError, match="`seed`.*`stop_when`"):
            generate(client, tokenizer, config, sampling=Sampling(), stop_when=RULE)


def test_streaming(model, tokenizer, config, capsys):
    """The tokens of a trace that is printed are those without the rule. The checks are not printed."""
    sampling = Sampling(temperature=0.5)
    expected = generate(model, tokenizer, config, stop_when=RULE)
    ended = []
    for prompt, greedy in zip(PROMPTS, expected, strict=True):
        for drawn in (GREEDY, sampling):
            whose = replace(config, sampling=drawn)
            free, stopped = (
                stream_answers(StreamingSampler(model, tokenizer, drawn, 5), tokenizer, whose, prompt, 256, rule)
                for rule in (None, RULE)
            )
            length = len(stopped.thinking.token_ids)
            assert stopped.thinking.token_ids == free.thinking.token_ids[:length]
            if drawn is GREEDY:
                assert stopped == greedy.rollout
            settled = f"settled after {length} thinking tokens" in capsys.readouterr().out
            assert settled == stopped.thinking.settled
            ended.append(stopped.thinking.settled)
    assert any(ended) and not all(ended)


def test_streaming_from_a_server(model, tokenizer, config, capsys):
    (expected,) = anytime_generate(model, tokenizer, PROMPTS[4:5], config=config, stop_when=RULE)
    assert expected.ended == "settled"
    with serving(TinyServer(model)) as server:
        sample = StreamingSampler(CompletionClient(server.url), tokenizer, GREEDY)
        assert stream_answers(sample, tokenizer, config, PROMPTS[4], 256, RULE) == expected.rollout


def test_the_command(model, tokenizer, config, tmp_path, capsys):
    for part in (model, tokenizer, config):
        part.save_pretrained(tmp_path)
    words = ["generate", str(tmp_path), PROMPTS[4], "--device", "cpu"]
    assert main([*words, "--stop-when", "settled", "--checks", "2", "--check-every", "4"]) == 0
    assert re.search(r"settled after \d+ thinking tokens \(\d+ checks of \d+ tokens\)", capsys.readouterr().out)
    wrong = {("--check-every", "4"): "--stop-when", ("--stop-when", "settled", "--checks", "0"): "`checks`"}
    for more, named in wrong.items():
        assert main([*words, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert named in line


def test_a_model_that_cannot_reuse_its_cache(model, tokenizer, config, monkeypatch):
    monkeypatch.setattr("trl_anytime.modeling.support.unsupported_structure", lambda model: "it is recurrent")
    with pytest.raises(ValueError, match="`stop_when`"):
        generate(model, tokenizer, config, stop_when=RULE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checks": 0}, r"`checks`.*\b0\b"),
        ({"every": -4}, r"`every`.*-4"),
        ({"answers": 1.5}, r"`answers`.*1\.5"),
        ({"agreement": 0}, r"`agreement`.*\b0\b"),
        ({"agreement": 1.1}, r"`agreement`.*1\.1"),
        ({"checks": 1}, "`checks`.*`answers`"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Settling(**settings)


@pytest.mark.parametrize(
    ("stop_when", "message"),
    [
        ("soon", "`stop_when`.*'settled'.*'soon'"),
        (Settling(every=20), r"\b40\b.*\b3 checks\b.*\b20\b"),
        (Settling(answers=2), "`temperature`"),
    ],
)
def test_rules_that_do_not_fit(model, tokenizer, config, stop_when, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, config, stop_when=stop_when)


def test_a_streak_by_hand():
    streak = Streak()
    found = [streak.add(answer) for answer in ("3", "3.0", None, "3", "4", "4", "4")]
    assert found == [1, 2, 0, 1, 1, 2, 3] and streak.answer == "4"
