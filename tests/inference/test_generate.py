"""Answers at any budget by transformers, against the rollouts of training."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, TextStreamer

from tests.support.anytime import GREEDY, PROMPTS, expected_tokens, make_anytime_config
from tests.support.tiny import make_model, make_tokenizer, tiny_trainer
from trl_anytime import AnytimeConfig, Sampling, ThinkingBudgetLogitsProcessor, anytime_generate
from trl_anytime.inference.generate import AnytimeOutput, BudgetAnswer
from trl_anytime.rollout.backend import RolloutSettings
from trl_anytime.rollout.types import Rollout, Thinking


def test_the_tokens_are_those_of_training(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, generation_kwargs={"top_k": 1})  # greedy
    rollouts = []
    roll_out = trainer.generation.roll_out
    trainer.generation.roll_out = lambda *args: rollouts.append((args, roll_out(*args))) or rollouts[-1][1]
    trainer.save_model()  # before the first update
    trainer.train()
    ((prompt_ids, _settings), trained), *_ = rollouts
    model, tokenizer = make_model(), make_tokenizer()
    outputs = anytime_generate(
        model,
        tokenizer,
        [tokenizer.decode(ids) for ids in prompt_ids],
        num_summaries=2,
        config=AnytimeConfig.from_pretrained(tmp_path),
        sampling=GREEDY,
    )
    assert [output.rollout for output in outputs] == trained
    assert len({tuple(rollout.thinking.token_ids) for rollout in trained}) > 1


class Table(HTMLParser):
    """Collects the rows of a table, the names of tags, and all text."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.tags, self.text = [], set(), ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.rows:
            self.rows[-1][-1] += data


def an_output(answers, well_formed=(True, True)):
    thinking = Thinking([11] * 5, finished=True, ended_with_eos=False)
    rollout = Rollout([3], thinking, [2, 5], [(9, 5, 8), (8,)], [[[12, 2]], [[13, 2]]])
    budgets = zip((2, 8), (2, 5), (False, True), answers, well_formed, strict=True)
    return AnytimeOutput(
        "1 <b>1</b>\x1b[2J",
        [
            BudgetAnswer(at, cut, done, [text], [[12, 2]], [cut + 3], [formed])
            for at, cut, done, text, formed in budgets
        ],
        rollout,
    )


def test_a_notebook_shows_the_curve():
    output = an_output(["<script>alert(1)</script>", "x < y\n& z"], well_formed=(True, False))
    table = Table(output._repr_html_())
    header, at_2, at_8 = table.rows
    assert len(header) == 3
    assert at_2 == ["2", "2, cut", "<script>alert(1)</script>"]
    assert at_8[:2] == ["8", "5"] and at_8[2].startswith("x < y& z") and "ill-formed" in at_8[2]
    assert not {"script", "b"} & table.tags and "1 <b>1</b>\\u001b[2J" in table.text
    widths = [float(width) for width in re.findall(r"width: ([\d.]+)em", output._repr_html_())]
    assert widths[0] / widths[1] == pytest.approx(2 / 5)


def test_a_short_repr():
    shown = repr(an_output(["2", "3" * 1000]))
    assert "2: '2'" in shown and "8: '333" in shown and "5 tokens" in shown
    assert len(shown) < 200 and "\n" not in shown and "\x1b" not in shown


def test_outputs_say_what_was_used(model, tokenizer, config):
    outputs = anytime_generate(model, tokenizer, PROMPTS, [3, 12], config=config)
    finished = [output.answers[-1].finished for output in outputs]
    assert any(finished) and not all(finished)
    for output in outputs:
        length = len(output.rollout.thinking.token_ids)
        for answer, bridge in zip(output.answers, output.rollout.bridges, strict=True):
            assert answer.thinking_tokens == min(length, answer.budget)
            assert answer.finished == (output.rollout.thinking.finished and length <= answer.budget)
            assert len(bridge) == (1 if answer.finished else 3)
            assert answer.num_tokens == [answer.thinking_tokens + len(bridge) + len(answer.answer_ids[0])]
            assert answer.answers == [tokenizer.decode(answer.answer_ids[0], skip_special_tokens=True)]
        assert output.thinking == tokenizer.decode(output.rollout.thinking.token_ids)


def test_budgets_that_share_a_cut_share_answers(model, tokenizer, config):
    sampled = anytime_generate(
        model, tokenizer, PROMPTS, [3, 50, 60], num_summaries=3, config=config, sampling=Sampling(), seed=1
    )
    early = [output for output in sampled if len(output.rollout.thinking.token_ids) <= 50]
    assert early
    for output in early:
        assert output.answers[1].answer_ids == output.answers[2].answer_ids
        assert len(output.answers[1].answers) == 3
    again = anytime_generate(
        model, tokenizer, PROMPTS, [3, 50, 60], num_summaries=3, config=config, sampling=Sampling(), seed=1
    )
    assert again == sampled


def test_the_model_is_left_as_it_was(tokenizer, config):
    model = get_peft_model(make_model(attention_dropout=0.9), LoraConfig(target_modules="all-linear"))
    model.train()
    attention = model.config._attn_implementation
    outputs = [anytime_generate(model, tokenizer, PROMPTS, config=config) for _ in range(2)]
    assert outputs[0] == outputs[1]  # no dropout inside
    assert model.training and model.config._attn_implementation == attention


def test_a_model_without_tree_attention(model, tokenizer, config, monkeypatch, caplog):
    expected = anytime_generate(model, tokenizer, PROMPTS, config=config)
    monkeypatch.setattr("trl_anytime.modeling.support.unsupported_structure", lambda model: "it is recurrent")
    found = anytime_generate(model, tokenizer, PROMPTS, config=config)
    assert found == expected
    assert model.config.model_type in caplog.text and "it is recurrent" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "1 2"}, "`prompts`"),
        ({"budgets": [250]}, r"\b250\b.*\b256\b.*\b2\d\d\b"),  # the context, and the largest budget that fits
        ({"budgets": [4, 4]}, r"`budgets`.*\[4, 4\]"),
    ],
)
def test_bad_arguments(model, tokenizer, config, arguments, message):
    with pytest.raises(ValueError, match=message):
        anytime_generate(model, tokenizer, **({"prompts": PROMPTS, "config": config} | arguments))


# Inside generate()


def generate(model, tokenizer, processor_of, streamer=None, rows=slice(None), **settings):
    """Tokens after the prompt of each row, by plain `generate()` on a batch that is padded on the left."""
    inputs = tokenizer(
        PROMPTS[rows], padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False
    )
    processor = processor_of(inputs["input_ids"].size(1))
    output = model.generate(
        **inputs,
        logits_processor=[processor],
        streamer=streamer,
        generation_config=GenerationConfig(
            **({"do_sample": False} | settings),
            max_new_tokens=processor.max_new_tokens,
            eos_token_id=2,
            pad_token_id=0,
        ),
    )
    return output[:, inputs["input_ids"].size(1) :].tolist()


@pytest.mark.parametrize("think_end", [(5,), (19, 19), None], ids=["never", "two tokens", "usual"])
@pytest.mark.parametrize("budget", [1, 3, 5, 12])
def test_the_processor_is_exact_to_the_token(model, tokenizer, config, think_end, budget):
    config = config if think_end is None else make_anytime_config(think_end)
    expected = anytime_generate(model, tokenizer, PROMPTS, [budget], config=config)
    rows = generate(model, tokenizer, lambda width: ThinkingBudgetLogitsProcessor(config, budget, width))
    for row, output in zip(rows, expected, strict=True):
        tokens = expected_tokens(output)
        assert row[: len(tokens)] == tokens
        assert not any(row[len(tokens) :])


def test_a_budget_for_each_row(model, tokenizer, config):
    budgets = [12, 3, 7, 11, 1]
    rows = generate(model, tokenizer, lambda width: ThinkingBudgetLogitsProcessor(config, budgets, width))
    for i, (row, budget) in enumerate(zip(rows, budgets, strict=True)):
        (output,) = anytime_generate(model, tokenizer, [PROMPTS[i]], [budget], config=config)
        tokens = expected_tokens(output)
        assert row[: len(tokens)] == tokens


def test_sampled_beams_and_sequences_are_held_to_the_budget(model, tokenizer):
    config = make_anytime_config()
    for settings in ({"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
        torch.manual_seed(0)
        for row in generate(
            model, tokenizer, lambda width: ThinkingBudgetLogitsProcessor(config, 6, width), **settings
        ):
            if 5 not in row[:6] and 2 not in row[:6]:
                assert row[6:9] == [9, 5, 8]


def test_streaming(model, tokenizer, config, capsys):
    def processor_of(width):
        return ThinkingBudgetLogitsProcessor(config, 7, width)

    (row,) = generate(model, tokenizer, processor_of, TextStreamer(tokenizer, skip_prompt=True), slice(0, 1))
    assert capsys.readouterr().out.split() == tokenizer.decode(row).split()


def test_an_answer_is_limited_after_an_early_end(model, tokenizer):
    """Else it would get the tokens that the thinking has left over."""
    config = replace(make_anytime_config(), eos_token_ids=[2])
    processor = ThinkingBudgetLogitsProcessor(config, 10, 0)
    # A trace of 2 that ended, the answer bridge, and 4 tokens of answer
    assert processor.forced(torch.tensor([[7, 5, 8, 6, 6, 6]])).tolist() == [-1]
    assert processor.forced(torch.tensor([[7, 5, 8, 6, 6, 6, 6]])).tolist() == [2]


def test_a_budget_that_is_none():
    with pytest.raises(ValueError, match=r"`budgets`.*\[0\]"):
        ThinkingBudgetLogitsProcessor(make_anytime_config(), 0, 5)


def test_budgets_share_a_context_and_its_summaries():
    markers = make_anytime_config().markers
    settings = RolloutSettings([3, 5], 2, 4, markers, [2], share_summaries=True)
    thinking = Thinking([7, 8], finished=False, ended_with_eos=True)  # shorter than both budgets
    (shared,) = settings.contexts(thinking)
    (separate,) = replace(settings, share_summaries=False).contexts(thinking)
    assert shared.cut == separate.cut == 2 and shared.budgets == separate.budgets == (0, 1)
    assert shared.num_summaries == 2 and separate.num_summaries == 4
    assert Rollout.assemble([1], thinking, [shared], [[[4], [5]]]).summaries == [[[4], [5]], [[4], [5]]]
    assert Rollout.assemble([1], thinking, [separate], [[[3], [4], [5], [6]]]).summaries == [[[3], [4]], [[5], [6]]]
