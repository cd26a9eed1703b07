"""Summaries decoded on top of the thinking's cache, against `generate()` on separate prompts."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList
from trl.trainer.utils import add_fused_lm_head

from tests.support.anytime import make_markers
from tests.support.families import EVERY_FAMILY, FAMILIES
from tests.support.tiny import make_model, tiny_trainer
from trl_anytime.modeling.branch_decoding import BranchLayout, Trunk
from trl_anytime.modeling.support import branching_mismatch
from trl_anytime.modeling.tree_attention import enable_tree_attention
from trl_anytime.rollout.backend import PrefixGeneration, RolloutSettings
from trl_anytime.rollout.transformers_backend import TransformersGeneration, _choose, unsupported_sampling

EOS = 2
PROMPTS = [[7, 8, 9, 10, 11, 12], [13, 14], [15, 4, 7, 8], [9, 9, 12], [6], [18, 17, 16, 15, 14, 13, 12]]


def make_settings(think_end=(5,), **settings):
    defaults = {"budgets": [0, 3, 7, 12], "num_summaries": 2, "max_summary_length": 6, "eos_token_ids": [EOS]}
    return RolloutSettings(markers=make_markers(think_end, (3,), (16, 17)), **(defaults | settings))


def make_tree_model(family="qwen3", **settings):
    model = make_model(family.split()[0], **FAMILIES[family], **settings).eval()
    add_fused_lm_head(model)
    enable_tree_attention(model)
    return model


def cached(model, max_cached_tokens=None, **sampling):
    config = GenerationConfig(**({"do_sample": False} | sampling))
    return TransformersGeneration(lambda: nullcontext(model), config, 0, max_cached_tokens)


def by_prefix(model, **sampling):
    """One unpadded `generate()` for each prompt and each summary."""

    def sample(prompt_ids, max_new_tokens, stop_token_ids, num_generations):
        config = GenerationConfig(
            **({"do_sample": False} | sampling),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_token_ids,
            pad_token_id=0,
        )
        sampled = []
        for ids in prompt_ids:
            tokens = torch.tensor([ids])
            output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
            sampled.append(output[0, len(ids) :].tolist())
        return sampled, None

    return PrefixGeneration(sample)


def usual_token(model, position):
    """A token that a greedy thinking of these prompts has at some position: as a marker, it ends that thinking."""
    settings = make_settings((19, 19, 19), num_summaries=1)
    traces = [rollout.thinking.token_ids for rollout in by_prefix(model).roll_out(PROMPTS, settings)]
    return Counter(ids[position] for ids in traces if len(ids) > position).most_common()[-1][0]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_greedy_rollouts_are_those_of_generate(family):
    model = make_tree_model(family)
    settings = make_settings((usual_token(model, 5),))
    with torch.no_grad():
        ours, theirs = (backend.roll_out(PROMPTS, settings) for backend in (cached(model), by_prefix(model)))
    assert ours == theirs
    finished = [rollout.thinking.finished for rollout in ours]
    assert any(finished) and not all(finished)  # both kinds of contexts, and rows set aside in between
    assert len({tuple(rollout.summaries[0][0]) for rollout in ours}) > 1


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.7}, {"suppress_tokens": [16, 12]}])
def test_greedy_rollouts_with_other_rules(settings):
    model = make_tree_model()
    rollouts = [backend(model, **settings).roll_out(PROMPTS, make_settings()) for backend in (cached, by_prefix)]
    assert rollouts[0] == rollouts[1]
    assert rollouts[0] != cached(model).roll_out(PROMPTS, make_settings())


def test_a_marker_of_several_tokens_ends_the_thinking():
    model = make_tree_model()
    settings = make_settings((19, 19, 19), budgets=[12])
    tokens = by_prefix(model).roll_out(PROMPTS[:1], settings)[0].thinking.token_ids
    settings = make_settings(tuple(tokens[3:5]), budgets=[4, 12])
    ours, theirs = (backend(model).roll_out(PROMPTS, settings) for backend in (cached, by_prefix))
    assert ours == theirs
    assert ours[0].thinking.finished and ours[0].thinking.token_ids == tokens[:5]


SAMPLING = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.2},
    "repetition penalty": {"repetition_penalty": 1.8},
    "all": {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


def surprise(counts, other_counts):
    """Chi-square statistic of two samples of one distribution, in standard deviations above its mean."""
    cells = [cell for cell in counts | other_counts if counts[cell] + other_counts[cell] >= 10]
    n, m = counts.total(), other_counts.total()
    statistic = sum(
        (counts[cell] * (m / n) ** 0.5 - other_counts[cell] * (n / m) ** 0.5) ** 2
        / (counts[cell] + other_counts[cell])
        for cell in cells
    )
    degrees = len(cells) - 1
    assert degrees > 2
    return (statistic - degrees) / (2 * degrees) ** 0.5


def sampled_summaries(model, count, **sampling):
    """First tokens of `count` summaries, at a cut of the one possible thinking."""
    settings = make_settings(budgets=[4], num_summaries=count, max_summary_length=2)
    torch.manual_seed(0)
    rollout = cached(model, do_sample=True, **sampling).roll_out([PROMPTS[0]], settings)[0]
    return rollout, Counter(map(tuple, rollout.summaries[0]))


def generated_summaries(model, rollout, count, **sampling):
    context = [*rollout.prompt_ids, *rollout.thinking.token_ids[: rollout.cuts[0]], *rollout.bridges[0]]
    config = GenerationConfig(do_sample=True, max_new_tokens=2, eos_token_id=[EOS], pad_token_id=0, **sampling)
    torch.manual_seed(1)
    tokens = torch.tensor([context] * count)
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    summaries = output[:, len(context) :].tolist()
    return Counter(tuple(ids[:1] if ids[0] == EOS else ids) for ids in summaries)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
def test_sampled_summaries_follow_the_distribution_of_generate(sampling):
    model = make_tree_model()
    rollout, ours = sampled_summaries(model, 4000, **sampling)
    assert surprise(ours, generated_summaries(model, rollout, 4000, **sampling)) < 4
    other = {"temperature": 1.5 * sampling.get("temperature", 1.0)}
    assert surprise(ours, generated_summaries(model, rollout, 4000, **sampling | other)) > 4  # the test can fail


def test_sampled_thinkings_follow_the_distribution_of_generate():
    """While finished rows are set aside."""
    model = make_tree_model()
    settings = make_settings((7,), budgets=[2, 20], num_summaries=1, max_summary_length=1)
    torch.manual_seed(0)
    rollouts = cached(model, do_sample=True).roll_out([PROMPTS[0]] * 3000, settings)
    ours = Counter(len(rollout.thinking.token_ids) for rollout in rollouts)
    config = GenerationConfig(do_sample=True, max_new_tokens=20, eos_token_id=[EOS, 7], pad_token_id=0)
    tokens = torch.tensor([PROMPTS[0]] * 3000)
    output = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    ends = torch.isin(output[:, tokens.size(1) :], torch.tensor([EOS, 7]))
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, ends.size(1))
    assert surprise(ours, Counter(lengths.tolist())) < 4


class Spy:
    """Records the shape of every forward pass, rows and tokens, and how many tokens those of branches hold cached."""

    def __init__(self, model):
        self.shapes, self.cached_tokens = [], []
        model.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, model, args, kwargs):
        rows, width = kwargs["input_ids"].shape
        self.shapes.append(((rows, width), "tree" in kwargs))
        if "tree" in kwargs:
            tail = rows * (kwargs["past_key_values"].get_seq_length() + width)
            self.cached_tokens.append(kwargs["tree"].trunk.num_tokens + tail)


def test_finished_rows_and_shared_cuts_cost_nothing():
    model = make_tree_model()
    end = usual_token(model, 2)
    settings = make_settings((end,), budgets=[3, 30, 60, 90], num_summaries=3)
    spy = Spy(model)
    rollouts = cached(model).roll_out(PROMPTS, settings)
    lengths = [len(rollout.thinking.token_ids) for rollout in rollouts]
    assert 1 < sum(length > 60 for length in lengths) < len(lengths)
    thinking_rows = [rows for (rows, _), tree in spy.shapes if not tree]
    branch_shapes = [shape for shape, tree in spy.shapes if tree]
    # Finished traces leave the batch; of 90 steps of six rows a good part is saved
    assert thinking_rows[0] == len(PROMPTS) and thinking_rows[-1] <= 1.5 * sum(length > 60 for length in lengths)
    # One row for each distinct cut is prefilled, with its bridge and no more than one token of the thinking
    contexts = {
        (i, cut, bridge) for i, r in enumerate(rollouts) for cut, bridge in zip(r.cuts, r.bridges, strict=True)
    }
    assert branch_shapes[0] == (len(contexts), 1 + settings.markers.max_bridge_length)
    assert len(contexts) < 4 * len(PROMPTS)
    # All budgets keep summaries of their own, decoded together
    assert branch_shapes[1] == (4 * 3 * len(PROMPTS), 1)
    summary_lengths = [len(ids) for r in rollouts for at_budget in r.summaries for ids in at_budget]
    assert len(summary_lengths) == 4 * 3 * len(PROMPTS)
    rows = [rows for rows, _ in branch_shapes[1:]]
    for step, computed in enumerate(rows):
        live = sum(length > step + 1 for length in summary_lengths)
        assert live <= computed <= live / 0.9 + 1


def test_the_cache_is_bounded():
    model = make_tree_model()
    prompts = [(ids * 6)[:6] for ids in PROMPTS]
    settings = make_settings()
    whole = cached(model)
    spy = Spy(model)
    expected = whole.roll_out(prompts, settings)
    assert max(spy.cached_tokens) > 400
    limit = 80  # two prompts of 6 with traces of 12, and beside them branches of at most 11 tokens
    spy.shapes.clear(), spy.cached_tokens.clear()
    assert cached(model, max_cached_tokens=limit).roll_out(prompts, settings) == expected
    assert max(shape[0] for shape, tree in spy.shapes if not tree) == 2
    assert 50 < max(spy.cached_tokens) <= limit
    assert cached(model, max_cached_tokens=1).roll_out(prompts, settings) == expected


def test_trunks_are_read_in_parts(monkeypatch):
    """Where the scores would not fit into memory."""
    model = make_tree_model("olmo3")  # with windows
    expected = cached(model).roll_out(PROMPTS, make_settings())
    monkeypatch.setattr("trl_anytime.modeling.branch_decoding.MAX_SCORES", 1)
    assert cached(model).roll_out(PROMPTS, make_settings()) == expected


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}, None),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"num_beams": 2}, "beam"),
    ],
)
def test_sampling_that_branches_cannot_do(sampling, reason):
    found = unsupported_sampling(make_tree_model(), GenerationConfig(do_sample=True, **sampling))
    assert found is None if reason is None else reason in found


def test_models_whose_cache_is_another(monkeypatch):
    model = make_tree_model()
    assert branching_mismatch(model) is None
    monkeypatch.setattr(Trunk, "from_cache", lambda cache, starts, rollouts: Trunk([], rollouts, [0], {0: 8}))
    assert "(IndexError" in branching_mismatch(model)
    monkeypatch.undo()
    attend = BranchLayout.attend
    monkeypatch.setattr(BranchLayout, "attend", lambda *args, **kwargs: attend(*args, **kwargs) * 1.01)
    assert "log-probabilities differ by" in branching_mismatch(model)


CONTINUOUS_BATCHING = {
    "use_transformers_continuous_batching": True,
    # Its cache takes most of the memory if it may
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
}


@pytest.mark.parametrize(
    ("settings", "backend", "reason"),
    [
        ({}, TransformersGeneration, None),
        ({"packing": "rows"}, PrefixGeneration, "the model has no tree attention"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, PrefixGeneration, "NoRepeatNGramLogitsProcessor"),
        (CONTINUOUS_BATCHING, PrefixGeneration, None),
    ],
)
def test_the_trainer_chooses(tmp_path, caplog, settings, backend, reason):
    trainer = tiny_trainer(tmp_path, max_steps=1, **settings)
    assert type(trainer.generation) is backend
    assert (reason is None and "prompt of its own" not in caplog.text) or reason in caplog.text
    trainer.train()
    assert trainer.state.log_history[0]["time/thinking"] > 0 < trainer.state.log_history[0]["time/summarising"]


def test_the_trainer_generates_without_dropout_and_goes_on_with_it(tmp_path):
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.9, init_lora_weights=False)
    trainer = tiny_trainer(tmp_path, model=get_peft_model(make_model(attention_dropout=0.9), lora), top_k=1)
    trainer.model.train()
    settings = make_settings(budgets=[3, 9])
    rollouts = [trainer.generation.roll_out(PROMPTS, settings) for _ in range(2)]
    assert rollouts[0] == rollouts[1]
    assert trainer.model.training and trainer.model.get_base_model().model.layers[0].training
    with trainer.model.disable_adapter():
        assert trainer.generation.roll_out(PROMPTS, settings) != rollouts[0]


def test_draws_are_those_of_multinomial():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    torch.manual_seed(1)
    assert torch.equal(_choose(LogitsProcessorList(), True, False, None, logits), expected)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("phase", ["traces", "answers"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_logits_are_an_error_on_the_host(do_sample, phase, value):
    """On a GPU, an assertion of `torch.multinomial` would end the process without a cause."""
    model = make_tree_model()

    def break_logits(model, args, kwargs, output):
        if ("tree" in kwargs) == (phase == "answers"):
            output.logits[0, -1, 3] = value
        return output

    model.register_forward_hook(break_logits, with_kwargs=True)
    with pytest.raises(FloatingPointError, match=f"for 1 of .* {phase}"):
        cached(model, do_sample=do_sample).roll_out(PROMPTS[:2], make_settings(num_summaries=1, budgets=[12]))


def test_broken_logits_may_be_left_to_the_caller():
    model = make_tree_model()

    def break_logits(model, args, output):
        output.logits[:] = torch.nan
        return output

    model.register_forward_hook(break_logits)
    (rollout,) = cached(model, remove_invalid_values=True).roll_out(PROMPTS[:1], make_settings(budgets=[4]))
    assert rollout.thinking.token_ids == [0] * 4


class CountCasts(TorchDispatchMode):
    """Count the casts of each parameter."""

    def __init__(self, model):
        super().__init__()
        self._names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self._names:
            self.counts[self._names[args[0].data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


def test_autocast_casts_each_weight_once():
    model = make_tree_model()
    # As Accelerate does
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with CountCasts(model) as casts:
        cached(model).roll_out(PROMPTS, make_settings())
    matrices = [name for name, parameter in model.named_parameters() if parameter.dim() == 2 and "embed" not in name]
    assert casts.counts == dict.fromkeys(matrices, 1)
    with CountCasts(model) as casts, torch.no_grad():
        model(torch.tensor([PROMPTS[0]]))
    assert casts.counts == dict.fromkeys(matrices, 1)  # none are left over


def test_a_model_under_the_autocast_of_an_earlier_trainer(tmp_path):
    model = make_tree_model(initializer_range=0.2)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    assert branching_mismatch(model) is None
    assert isinstance(tiny_trainer(tmp_path, model=model).generation, TransformersGeneration)


@pytest.mark.parametrize(("prompt", "bridge"), [([7, 20], 3), ([7, -1], 3), ([7], 25)])
def test_tokens_without_an_embedding(prompt, bridge):
    markers = make_markers((5,), (bridge,), (16, 17))
    settings = RolloutSettings([3], 1, 6, markers, [EOS])
    wrong = bridge if bridge > 19 else prompt[-1]
    with pytest.raises(ValueError, match=f"token {wrong}.* 20 tokens"):
        cached(make_tree_model()).roll_out([prompt], settings)
