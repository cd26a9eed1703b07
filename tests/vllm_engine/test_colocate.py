"""Both phases in a real engine in this process, against TRL's own calls of the same engine."""

from contextlib import contextmanager

import pytest
import torch

from tests.support.anytime import make_markers
from tests.support.tiny import make_dataset, make_model, make_tokenizer, tiny_trainer
from trl_anytime.rollout.backend import PrefixGeneration, RolloutSettings
from trl_anytime.rollout.trl_backend import TRLSampler
from trl_anytime.rollout.vllm_backend import ColocateGeneration

EOS, THINK_END, SO, ANSWER = 2, 5, 9, 8
BLOCK = 32  # tokens in a block of the engine's cache, see conftest.py


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(head_dim=32, num_attention_heads=2, max_position_embeddings=1024).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return str(path)


def colocate_trainer(model_dir, output_dir, **settings):
    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 512,
        "model_init_kwargs": {"dtype": "float32"},
        "max_steps": 4,
        "num_iterations": 2,
        **settings,
    }
    return tiny_trainer(output_dir, model=model_dir, **settings)


@pytest.fixture(scope="module")
def trainer(model_dir, tmp_path_factory):
    return colocate_trainer(model_dir, tmp_path_factory.mktemp("colocate"))


@pytest.fixture(scope="module")
def vllm(trainer):
    return trainer.vllm_generation


@contextmanager
def sampling(vllm, **settings):
    """Other sampling settings for a while; those that `VLLMGeneration` does not have go to `generation_kwargs`."""
    saved = dict(vars(vllm))
    own = {name: settings.pop(name) for name in list(settings) if name in saved}
    vars(vllm).update(own, generation_kwargs={**vllm.generation_kwargs, **settings})
    try:
        yield
    finally:
        vars(vllm).update(saved)


def make_settings(budgets=(40, 80, 120), num_summaries=2, think_end=(THINK_END,), eos=(EOS,), summary=8):
    markers = make_markers(think_end, (SO,), (ANSWER,))
    return RolloutSettings(list(budgets), num_summaries, summary, markers, list(eos))


PROMPTS = [[3, 6, 10 + i % 10, 10 + i // 2, 2, 3, 7, 4] for i in range(16)]


def tokens(rollouts):
    return [(rollout.thinking.token_ids, rollout.cuts, rollout.summaries) for rollout in rollouts]


def assert_same(rollouts, others):
    assert tokens(rollouts) == tokens(others)
    for rollout, other in zip(rollouts, others, strict=True):
        # float32 sums in another order, over rows of another batch
        torch.testing.assert_close(
            torch.tensor(rollout.packed_logprobs()), torch.tensor(other.packed_logprobs()), atol=1e-4, rtol=0
        )


# The trainer


def test_training(trainer, vllm, monkeypatch):
    syncs = []
    sync_weights = vllm.sync_weights
    monkeypatch.setattr(vllm, "sync_weights", lambda: (syncs.append(trainer.state.global_step), sync_weights()))
    before = [param.detach().clone() for param in trainer.model.parameters()]
    trainer.train()
    assert any((new != old).any() for new, old in zip(trainer.model.parameters(), before, strict=True))
    # Two updates for each generation batch, which is when weights are sent
    assert syncs == [0, 2]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in (logs[0], logs[2]):  # metrics of a generation batch stand where it was generated
        assert log["grad_norm"] > 0
        # That of the engine and of the trainer, after two updates as well: the weights have arrived. Required is 0.01,
        # and in float32 there is no reason for more than its rounding.
        assert 0 < log["sampling/sampling_logp_difference/mean"] < 1e-4
        assert log["sampling/sampling_logp_difference/max"] < 1e-3
        assert log["time/thinking"] > 0 and log["time/summarising"] > 0


def test_evaluation(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "eval_dataset", make_dataset())
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_anytime/reward@9"] <= 1


# What is sampled


@pytest.mark.parametrize("overlap", [True, False])
def test_greedy_tokens_are_those_of_trl(trainer, vllm, overlap):
    settings = make_settings()
    with sampling(vllm, temperature=0.0):
        expected = PrefixGeneration(TRLSampler(trainer)).roll_out(PROMPTS, settings)
        generation = ColocateGeneration(vllm, overlap)
        assert_same(generation.roll_out(PROMPTS, settings), expected)
    # Otherwise the comparison says little
    assert {rollout.thinking.finished for rollout in expected} == {True, False}
    assert set(generation.times.seconds) == {"thinking", "summarising"}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_marker_of_several_tokens(trainer, vllm, overlap):
    with sampling(vllm, temperature=0.0):
        free = PrefixGeneration(TRLSampler(trainer)).roll_out(PROMPTS, make_settings(think_end=(0,)))
        # Some two tokens that the first trace comes to, and a budget that cuts between them
        settings = make_settings(budgets=(4, 5, 80), think_end=tuple(free[0].thinking.token_ids[4:6]))
        expected = PrefixGeneration(TRLSampler(trainer)).roll_out(PROMPTS, settings)
        generation = ColocateGeneration(vllm, overlap)
        assert_same(generation.roll_out(PROMPTS, settings), expected)
    assert expected[0].cuts == [4, 5, 6] and expected[0].thinking.finished
    assert not all(rollout.thinking.finished for rollout in expected)


def test_the_engine_stops_at_a_marker_of_several_tokens(vllm):
    generation = ColocateGeneration(vllm)
    with sampling(vllm, temperature=0.0, ignore_eos=True, logit_bias={0: -100.0}):
        (free,) = generation.roll_out(PROMPTS[:1], make_settings(think_end=(0,), eos=()))
        assert len(free.thinking.token_ids) == 120 and generation.num_steps == 120 + 8
        end = tuple(free.thinking.token_ids[4:6])
        (rollout,) = generation.roll_out(PROMPTS[:1], make_settings(think_end=end, eos=()))
    assert rollout.thinking.token_ids == free.thinking.token_ids[:6]
    assert generation.num_steps == 6 + 8


def test_sampled_tokens_are_the_same_with_and_without_overlap(vllm):
    with sampling(vllm, seed=7, top_k=10, temperature=1.3):
        rollouts, others = (
            ColocateGeneration(vllm, overlap).roll_out(PROMPTS, make_settings()) for overlap in (True, False)
        )
    assert_same(rollouts, others)
    # Every continuation has a seed of its own
    assert any(a != b for rollout in rollouts for a, b in rollout.summaries)
    assert len({rollout.thinking.token_ids[0] for rollout in rollouts}) > 3


def test_sampling_parameters_are_those_of_trl(trainer, vllm, monkeypatch):
    """What the engine is asked for, compared with what TRL asks it for."""
    engine, asked = vllm.llm.llm_engine, []
    add_request = engine.add_request

    def spy(request_id, prompt, params, *args, **kwargs):
        asked.append(params.clone())
        return add_request(request_id, prompt, params, *args, **kwargs)

    monkeypatch.setattr(engine, "add_request", spy)
    settings = make_settings(budgets=(4, 8), num_summaries=1, summary=3)
    with sampling(vllm, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3):
        PrefixGeneration(TRLSampler(trainer)).roll_out(PROMPTS[:1], settings)
        ColocateGeneration(vllm, overlap=False).roll_out(PROMPTS[:1], settings)
    assert len(asked) == 6
    assert [params.extra_args for params in asked[3:]] == [{"thinking_budget": -1}] * 3  # no budget of the processor
    for params in asked:
        params.output_kind = None  # how tokens are handed out
        params.extra_args = None
    assert [str(params) for params in asked[:3]] == [str(params) for params in asked[3:]]


# What it costs


def test_summaries_find_their_thinking_in_the_prefix_cache(vllm):
    # Traces that nothing ends, and contexts that no other test has computed
    settings = make_settings(budgets=(50, 100, 150), num_summaries=4, think_end=(0,), eos=())
    for overlap in (True, False):
        prompts = [[3, 6, 11, 13, 15 + overlap, 17 + i, 2, 3, 7, 4] for i in range(3)]
        generation = ColocateGeneration(vllm, overlap)
        with sampling(vllm, ignore_eos=True, logit_bias={0: -100.0}):
            rollouts = generation.roll_out(prompts, settings)
        assert [rollout.cuts for rollout in rollouts] == [[50, 100, 150]] * 3
        # Per rollout 4 contexts of 10 + 50 + 3, of 10 + 100 + 3 and of 10 + 150 + 3 tokens. Of the prompt and the
        # thinking, 60, 110 and 160 tokens, all full blocks have been computed; the last sampled token has not, and
        # what the first of four computes may serve the others.
        assert generation.num_context_tokens == 3 * 4 * (63 + 113 + 163)
        full_blocks = 60 // BLOCK + 110 // BLOCK + 159 // BLOCK
        assert 3 * 4 * full_blocks * BLOCK <= generation.num_cached_tokens
        assert generation.num_cached_tokens < generation.num_context_tokens


def test_a_straggler_does_not_keep_the_summaries_waiting(vllm):
    candidates = [[3, 6, 10 + i % 10, 10 + i // 10, 2, 3, 7, 4] for i in range(100)]
    settings = make_settings(budgets=(20, 60, 100), summary=8, eos=())
    with sampling(vllm, temperature=0.0, ignore_eos=True):
        traces = [rollout.thinking for rollout in ColocateGeneration(vllm).roll_out(candidates, settings)]
        order = sorted(range(100), key=lambda i: len(traces[i].token_ids))
        lengths = [len(traces[i].token_ids) for i in order]
        assert lengths[6] <= 20 and lengths[-1] == 100
        prompts = [candidates[i] for i in [*order[:7], order[-1]]]
        with_overlap, without = ColocateGeneration(vllm, overlap=True), ColocateGeneration(vllm, overlap=False)
        assert_same(with_overlap.roll_out(prompts, settings), without.roll_out(prompts, settings))
    # The engine has room for 8: 100 steps of thinking, then 6 rounds of 8 steps for the 48 summaries. With overlap,
    # all but those at the straggler's last budget are done by then.
    assert without.num_steps == 100 + 6 * 8
    assert without.num_steps >= 1.2 * with_overlap.num_steps


# Sleep


def test_both_phases_run_between_one_wake_and_one_sleep(vllm, monkeypatch):
    """The CPU has no sleep, so it is a record of the calls that stands in for it; the engine between them is real."""
    calls = []
    llm, step = vllm.llm, vllm.llm.llm_engine.step
    monkeypatch.setattr(vllm, "enable_sleep_mode", True)
    monkeypatch.setattr(vllm, "_llm_weights_sleeping", True)
    monkeypatch.setattr(llm, "wake_up", lambda tags: calls.append(f"wake {tags}"))
    monkeypatch.setattr(llm, "sleep", lambda level: calls.append(f"sleep {level}"))
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: calls.append("loaded"))  # the last thing TRL does there
    monkeypatch.setattr(llm.llm_engine, "step", lambda: (calls.append("step"), step())[1])
    generation = ColocateGeneration(vllm)
    generation.roll_out(PROMPTS, make_settings())
    assert [call for call in calls if call != "step"] == [
        "wake ['weights']",
        "loaded",
        "wake ['kv_cache']",
        "sleep 2",
    ]
    assert calls[:3] + ["step"] * generation.num_steps + ["sleep 2"] == calls
    assert vllm._llm_weights_sleeping

    # An error does not leave it awake
    calls.clear()
    monkeypatch.setattr(llm.llm_engine, "step", fail_after(3, step))
    with pytest.raises(RuntimeError, match=r"\bstep 4\b"):
        generation.roll_out(PROMPTS, make_settings())
    assert calls == ["wake ['weights']", "loaded", "wake ['kv_cache']", "sleep 2"]
    assert not llm.llm_engine.has_unfinished_requests()


# What can go wrong


def fail_after(num_calls, function):
    remaining = [num_calls]

    def failing(*args, **kwargs):
        remaining[0] -= 1
        if remaining[0] < 0:
            raise RuntimeError("device lost")
        return function(*args, **kwargs)

    return failing


@pytest.mark.parametrize("phase", ["thinking", "summarising"])
def test_an_engine_that_dies_in_mid_phase(trainer, vllm, monkeypatch, phase):
    executor = vllm.llm.llm_engine.model_executor
    settings = make_settings(eos=())
    generation = ColocateGeneration(vllm, overlap=False)
    with sampling(vllm, temperature=0.0, ignore_eos=True):
        expected = generation.roll_out(PROMPTS, settings)
        steps = 10 if phase == "thinking" else generation.num_steps - 2
        with monkeypatch.context() as patch:
            patch.setattr(executor, "execute_model", fail_after(steps, executor.execute_model))
            with pytest.raises(RuntimeError, match=r"\bstep \d+.*RuntimeError: device lost"):
                generation.roll_out(PROMPTS, settings)
        assert generation.times.seconds.keys() == {"thinking", phase}
        # Nothing of it is left in the engine: what follows is as if it had not been
        assert not vllm.llm.llm_engine.has_unfinished_requests()
        vllm.llm.reset_prefix_cache()  # the step that failed has computed nothing of what it was to
        assert_same(generation.roll_out(PROMPTS, settings), expected)


def test_an_engine_without_room(vllm):
    """All blocks of the cache but two are taken: 64 tokens are all that fits."""
    pool = vllm.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    vllm.llm.reset_prefix_cache()
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 2)
    try:
        with (
            sampling(vllm, ignore_eos=True, logit_bias={0: -100.0}),
            pytest.raises(RuntimeError, match=r"\b1000\b.*`vllm_gpu_memory_utilization`"),
        ):
            ColocateGeneration(vllm).roll_out(PROMPTS[:1], make_settings(think_end=(0,), eos=()))
    finally:
        pool.free_blocks(taken)
    assert not vllm.llm.llm_engine.has_unfinished_requests()


def test_a_prompt_longer_than_the_engines_context(trainer, vllm):
    assert trainer._engine_context == 512
    trainer._check_context([[4] * 400])
    # 9 thinking tokens, a bridge of 2 + 1, 4 of the summary
    with pytest.raises(ValueError, match=r"\b513\b.*\b512\b.*`vllm_max_model_length`"):
        trainer._check_context([[4] * 10, [4] * 497])
    # The backend by itself: 393 + 120 tokens. vLLM would break off a trace that no longer fits.
    with pytest.raises(ValueError, match=r"\b393\b.*\b120\b.*\b512\b.*`vllm_max_model_length`"):
        ColocateGeneration(vllm).roll_out([[4] * 10, [4] * 393], make_settings())
    assert not vllm.llm.llm_engine.has_unfinished_requests()


def test_a_model_that_needs_more_room_than_the_engine_has(tmp_path):
    make_model(max_position_embeddings=2**22).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"larger than the available KV cache memory.*gpu_memory_utilization"):
        colocate_trainer(str(tmp_path / "model"), tmp_path, vllm_max_model_length=2**22)


def test_an_engine_without_a_prefix_cache(vllm, monkeypatch):
    monkeypatch.setattr(vllm.llm.llm_engine.vllm_config.cache_config, "enable_prefix_caching", False)
    with pytest.raises(ValueError, match="prefix"):
        ColocateGeneration(vllm)


def test_reference_answers_are_scored_by_the_trainer(model_dir, tmp_path):
    """The engine thinks. The answers' log-probabilities are the policy's own, so that nothing is corrected."""
    trainer = colocate_trainer(
        model_dir,
        tmp_path,
        budgets=[0, 3, 9],
        summary_reward="likelihood",
        reference_template="{answer}",
        num_summaries=1,
        reward_funcs=None,
        max_steps=2,
    )
    trainer.train()
    logs = trainer.state.log_history[0]
    assert 0 < logs["anytime/reward@0"] < 1
    assert logs["sampling/importance_sampling_ratio/min"] == pytest.approx(1, abs=1e-3)
    assert logs["sampling/sampling_logp_difference/max"] < 1e-3
