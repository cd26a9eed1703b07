import math
import os
import re
import statistics
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import GenerationConfig
from trl import GRPOConfig, GRPOTrainer

from tests.support.tiny import (
    Gradients,
    Recorder,
    make_config,
    make_dataset,
    make_model,
    make_tokenizer,
    parity_reward,
    tiny_trainer,
)
from trl_anytime import BRPOTrainer
from trl_anytime.method.advantages import summary_advantages, thinking_advantages
from trl_anytime.method.packing import PackedRollouts
from trl_anytime.rewards import MathReward
from trl_anytime.rewards.returned import checked_rewards
from trl_anytime.rollout.backend import PrefixGeneration
from trl_anytime.rollout.trl_backend import TRLSampler
from trl_anytime.training.micro_batches import prune_batch

# The special case that is GRPO


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"num_iterations": 2, "max_steps": 4},
        {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 8},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 4},
    ],
    ids=["on-policy", "two iterations", "old policy", "accumulation"],
)
def test_one_budget_one_summary_is_grpo(tmp_path, steps):
    """Same rollouts, same loss and gradients as TRL's trainer, also against an old policy."""
    settings = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", **steps}
    gradients = Gradients()
    ours = tiny_trainer(
        tmp_path,
        Recorder,
        budgets=[9],
        num_summaries=1,
        summary_policy="final",
        baseline="v2",
        callbacks=[gradients],
        prune=False,  # TRL's entropy is over all tokens
        **settings,
    )
    ours.train()
    rolled = iter(ours.rolled)

    def replay(prompts, trainer):
        output, batch, rng_state = next(rolled)
        torch.set_rng_state(rng_state)  # TRL shuffles the batch
        rewards = parity_reward(None, [rollout.summaries[0][0] for rollout in batch.rollouts])
        return {**output, "recorded_reward": rewards}

    theirs_gradients = Gradients()
    config = ours.args.to_dict()
    known = {name for name, f in GRPOConfig.__dataclass_fields__.items() if f.init}
    keep = {name: value for name, value in config.items() if name in known and name != "generation_batch_size"}
    keep |= {"max_completion_length": ours.max_completion_length, "accelerator_config": None, "use_cpu": True}
    theirs = GRPOTrainer(
        make_model(),
        lambda recorded_reward, **kwargs: recorded_reward,
        GRPOConfig(**keep),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        rollout_func=replay,
        callbacks=[theirs_gradients],
    )
    theirs.train()

    assert len(gradients.steps) == len(theirs_gradients.steps) == ours.args.max_steps
    assert any(abs(log["loss"]) > 1e-4 for log in ours.state.log_history if "loss" in log)
    for log, their_log in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        names = ["loss", "grad_norm", "reward", "reward_std"]
        # Means over micro-batches, into which TRL deals the rollouts in another order when it accumulates
        names += ["entropy", "clip_ratio/region_mean"] if ours.args.gradient_accumulation_steps == 1 else []
        for name in names:
            # float32 rounding: the attention sums in another order
            if name in their_log:
                assert log[name] == pytest.approx(their_log[name], abs=2e-6, rel=1e-4), name
    largest_of_steps = [max(x.abs().max() for x in step.values()) for step in theirs_gradients.steps]
    assert max(largest_of_steps) > 0  # a step without any advantage has none
    for step, their_step, largest in zip(gradients.steps, theirs_gradients.steps, largest_of_steps, strict=True):
        for name, gradient in their_step.items():
            # A step's rounding moves the weights, and with them the next gradients
            assert (step[name] - gradient).abs().max() <= 5e-5 * largest, name


# What reaches the loss


def test_advantages_of_every_token(tmp_path):
    """The batch that TRL trains on: recomputed from the rollouts and rewards, rollout by rollout."""
    trainer = tiny_trainer(tmp_path, Recorder, prior="linear", max_steps=1, prune=False)
    trainer.train()
    (_, batch, _), scored = trainer.rolled[0], trainer.scored[0]
    rewards = torch.tensor(
        [
            [[parity_reward(None, [ids])[0] for ids in at_budget] for at_budget in rollout.summaries]
            for rollout in batch.rollouts
        ]
    )
    cuts = torch.tensor([rollout.cuts for rollout in batch.rollouts])
    thinking = thinking_advantages(rewards.view(2, 4, 3, 2), [3, 6, 9], "linear").view(8, 3)
    summary = summary_advantages(rewards.view(2, 4, 3, 2), cuts.view(2, 4, 3)).view(8, 3, 2)
    assert thinking.abs().max() > 0 and summary.abs().max() > 0
    for i, rollout in enumerate(batch.rollouts):
        expected, ids, mask = [], [], []
        for t, token in enumerate(rollout.thinking.token_ids):
            expected.append(thinking[i, t // 3].item())
            ids.append(token)
            mask.append(1)
        for j in range(3):
            for a in range(2):
                bridge, tokens = rollout.bridges[j], rollout.summaries[j][a]
                expected += [0.0] * len(bridge) + [summary[i, j, a].item()] * len(tokens)
                ids += [*bridge, *tokens]
                mask += [0] * len(bridge) + [1] * len(tokens)
        assert scored["completion_ids"][i, : len(ids)].tolist() == ids
        assert scored["tool_mask"][i, : len(ids)].tolist() == mask
        assert scored["completion_mask"][i].sum() == len(ids)
        torch.testing.assert_close(scored["advantages"][i, : len(ids)], torch.tensor(expected))
        assert scored["advantages"][i, len(ids) :].abs().sum() == 0


def test_the_loss_divides_by_the_longest_packed_rollout(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert trainer.max_completion_length == 9 + 3 * 2 * (3 + 4)  # bridges "so </think> answer"
    assert tiny_trainer(tmp_path, max_completion_length=500).max_completion_length == 500


def test_summaries_continue_their_own_cut(tmp_path):
    """With the most likely tokens, every trace and summary is what the model itself continues its context with."""
    trainer = tiny_trainer(tmp_path, Recorder, max_steps=1, top_k=1, learning_rate=0.0)
    trainer.train()
    batch = trainer.rolled[0][1]

    def continued(context, max_new_tokens, *stop_ids):
        tokens = torch.tensor([context])
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=[2, *stop_ids], pad_token_id=0
        )
        with torch.no_grad():
            output = trainer.model.eval().generate(
                tokens, attention_mask=torch.ones_like(tokens), generation_config=config
            )
        return output[0, len(context) :].tolist()

    for rollout in batch.rollouts:
        thinking = rollout.thinking.token_ids
        assert thinking == continued(rollout.prompt_ids, 9, *trainer.markers.think_end_ids)
        for j, budget in enumerate([3, 6, 9]):
            cut, bridge = rollout.thinking.cut(budget, trainer.markers)
            summary = continued([*rollout.prompt_ids, *thinking[:cut], *bridge], 4)
            assert rollout.summaries[j] == [summary, summary]
    assert len({tuple(rollout.thinking.token_ids) for rollout in batch.rollouts}) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "steps"), [(4, 4), (2, 4), (4, 2)])
def test_rollouts_of_like_length_share_a_micro_batch(tmp_path, monkeypatch, accumulated, steps):
    """Sorted within each optimiser step, and with the gradients of TRL's own order."""
    settings = {"per_device_train_batch_size": 2, "num_generations": 2, "optim": "sgd", "learning_rate": 0.1}
    settings |= {"gradient_accumulation_steps": accumulated, "steps_per_generation": steps, "max_steps": 4}
    runs = []
    for dealt in (True, False):
        if not dealt:
            monkeypatch.setattr("trl_anytime.training.micro_batches._sorted_by_length", lambda batches: batches)
        gradients, micro_batches = Gradients(), []
        trainer = tiny_trainer(tmp_path, callbacks=[gradients], **settings)
        compute_loss = trainer._compute_loss

        def spy(model, inputs, micro_batches=micro_batches, compute_loss=compute_loss):
            micro_batches.append((inputs["prompt_mask"].sum(1) + inputs["completion_mask"].sum(1)).tolist())
            return compute_loss(model, inputs)

        trainer._compute_loss = spy
        trainer.train()
        runs.append((gradients.steps, micro_batches))
    (sorted_steps, sorted_batches), (plain_steps, plain_batches) = runs
    window = min(accumulated, steps)
    parts = [slice(first, first + window) for first in range(0, 4 * accumulated, window)]
    for part in parts:
        lengths = [n for batch in sorted_batches[part] for n in batch]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(lengths) == sorted(n for batch in plain_batches[part] for n in batch)
    assert sorted_batches != plain_batches
    for step, plain_step in zip(sorted_steps, plain_steps, strict=True):
        largest = max(gradient.abs().max() for gradient in plain_step.values())
        assert all((step[name] - plain_step[name]).abs().max() <= 5e-5 * largest for name in plain_step)


@pytest.mark.parametrize(
    ("settings", "exact"),
    [
        *(({"loss_type": name}, True) for name in ("dr_grpo", "grpo", "dapo", "cispo", "sapo")),
        ({"loss_type": "dapo", "beta": 0.1, "peft_config": LoraConfig(r=4, target_modules="all-linear")}, True),
        ({"loss_type": "bnpo"}, False),
        ({"entropy_coef": 0.1}, False),
        ({"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 9.0}, False),
        ({"top_entropy_quantile": 0.5}, False),
        ({"model": "moe"}, False),
    ],
)
def test_dealing_out_changes_no_gradient(tmp_path, monkeypatch, settings, exact):
    """Sorted only where it changes nothing; where it would, the gradients of all ways to deal out do differ."""
    if settings.get("model") == "moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
        settings = {"model": make_model("qwen3_moe", **experts), "router_aux_loss_coef": 1.0}
    settings = {**settings, "per_device_train_batch_size": 2, "num_generations": 2, "gradient_accumulation_steps": 4}
    trainer = tiny_trainer(tmp_path, optim="sgd", max_steps=1, **settings)
    prepare, dealt = trainer._prepare_inputs, []

    def keep(inputs):
        output = prepare(inputs)
        dealt[:] = dealt or [{**batch} for batch in trainer._buffered_inputs]
        return output

    trainer._prepare_inputs = keep
    trainer.train()
    lengths = [n for batch in dealt for n in (batch["prompt_mask"].sum(1) + batch["completion_mask"].sum(1)).tolist()]
    assert (lengths == sorted(lengths, reverse=True)) == exact

    trainer.use_adaptive_entropy = False  # its coefficient stays as it is now

    def gradient(batches):
        trainer.model.zero_grad()
        trainer.current_gradient_accumulation_steps = 4
        torch.manual_seed(0)
        for batch in batches:
            trainer._compute_loss(trainer.model, batch).backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    trainer.model.train()
    backwards = [{**batch, **{k: v.flip(0) for k, v in batch.items() if v.dim()}} for batch in reversed(dealt)]
    mixed = _mixed(dealt)
    plain = gradient(dealt)
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(backwards), plain, rtol=1e-4, atol=1e-6 * plain.abs().max().item())
    difference = (gradient(mixed) - plain).norm() / plain.norm()
    assert (difference < 1e-4) == exact, difference


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"loss_type": name} for name in ("dr_grpo", "grpo", "dapo", "cispo", "sapo", "bnpo")),
        {"loss_type": "grpo", "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        {"delta": 1.5},
    ],
    ids=lambda settings: "-".join(str(value)[:8] for value in settings.values()),
)
def test_pruning_changes_no_gradient(tmp_path, monkeypatch, settings, packing):
    """
    Loss and gradients of pruned micro-batches, against an old policy and with vLLM's importance correction, in one
    forward pass for each and in one for each length.
    """
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "gradient_accumulation_steps": 2, **settings}
    trainer = tiny_trainer(tmp_path, optim="sgd", max_steps=1, prune=False, packing=packing, **settings)
    prepare, batches = trainer._prepare_inputs, []

    def keep(inputs):
        output = prepare(inputs)
        batches[:] = batches or [{**batch} for batch in trainer._buffered_inputs]
        return output

    trainer._prepare_inputs = keep
    trainer.train()
    trainer.use_vllm = True  # from here on for its correction alone
    generator = torch.Generator().manual_seed(1)
    for batch in batches:
        shape = batch["completion_ids"].shape
        batch["importance_sampling_ratio"] = torch.rand(shape, generator=generator) + 0.5
        batch["old_per_token_logps"] = -torch.rand(shape, generator=generator) * 4
        # By hand, so that each case is there: rollouts and summaries without any, rollouts with a part
        advantages = batch["advantages"] = batch["advantages"].clone()
        advantages[0] = 0
        for row, spans in enumerate(batch["spans"].tolist()):
            for j, at_budget in enumerate(spans):
                for a, (start, _, end) in enumerate(at_budget):
                    if (row + j + a) % 3:
                        advantages[row, start:end] = 0
    batches[1]["advantages"][:3] = 0

    def evaluate(batches):
        trainer.model.zero_grad()
        losses = []
        for batch in batches:
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            losses.append(loss.item())
        return losses, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    full_losses, full = evaluate(batches)
    packed = [PackedRollouts(batch["completion_ids"], batch["cuts"], batch["spans"]) for batch in batches]
    pruned = [prune_batch(batch, rows)[0] for batch, rows in zip(batches, packed, strict=True)]
    widths = [(len(batch["prompt_ids"]), batch["completion_ids"].size(1)) for batch in pruned]
    assert all(width < batch["completion_ids"].size(1) for (_, width), batch in zip(widths, batches, strict=True))
    forward, passes = trainer._forward, []

    def count(model, packed, *args, **kwargs):
        passes.append(len(packed.cuts))
        return forward(model, packed, *args, **kwargs)

    trainer._forward = count
    assert full.abs().max() > 0
    for least, num_passes in ((1024, 2), (1, 4)):
        monkeypatch.setattr("trl_anytime.training.micro_batches._LEAST_SAVED", least)
        passes.clear()
        losses, gradient = evaluate(pruned)
        assert sum(passes) == 3 + 1 and len(passes) <= num_passes and (len(passes) > 2) == (least == 1)
        assert losses == pytest.approx(full_losses, rel=1e-4, abs=1e-6)
        torch.testing.assert_close(gradient, full, rtol=1e-4, atol=2e-6 * full.abs().max().item())


def test_a_run_without_what_has_no_advantage(tmp_path):
    """The same weights, step by step, and the share that was left out."""
    weights, logs = [], []
    for prune in (True, False):
        trainer = tiny_trainer(tmp_path, prune=prune, optim="sgd", learning_rate=1.0, num_iterations=2, max_steps=4)
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
        logs.append([log for log in trainer.state.log_history if "loss" in log])
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)
    for log, full_log in zip(*logs, strict=True):
        assert log["loss"] == pytest.approx(full_log["loss"], abs=1e-5, rel=1e-4)
        assert log["grad_norm"] == pytest.approx(full_log["grad_norm"], abs=1e-5, rel=1e-4)
    ratios = [log["anytime/pruned_ratio"] for log in logs[0] if "anytime/pruned_ratio" in log]
    assert len(ratios) == 2 and all(0 < ratio < 1 for ratio in ratios)
    assert not any("anytime/pruned_ratio" in log for log in logs[1])


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.1, "peft_config": LoraConfig(r=4, target_modules="all-linear")},
        {"entropy_coef": 0.1},
        {"top_entropy_quantile": 0.5},
    ],
)
def test_tokens_that_count_without_advantage_stay(tmp_path, settings):
    trainer = tiny_trainer(tmp_path, max_steps=1, **settings)
    trainer.train()
    assert not any("anytime/pruned_ratio" in log for log in trainer.state.log_history)


def test_nothing_to_learn_trains_nothing(tmp_path):
    """All rewards are equal: a token for each row is left, and weights stay."""
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda completions, **kwargs: [1.0] * len(completions), max_steps=1)
    before = torch.cat([p.flatten() for p in trainer.model.parameters()]).clone()
    trainer.train()
    assert torch.equal(before, torch.cat([p.flatten() for p in trainer.model.parameters()]))
    (log,) = (log for log in trainer.state.log_history if "loss" in log)
    assert log["anytime/pruned_ratio"] > 0.9 and log["loss"] == 0


def _mixed(batches):
    """The same rows in other micro-batches: the first of each, then the second of each."""
    rows = {k: torch.cat([batch[k] for batch in batches]) for k, v in batches[0].items() if v.dim()}
    order = [*range(0, 8, 2), *range(1, 8, 2)]
    return [{**batches[0], **{k: v[order][2 * i : 2 * i + 2] for k, v in rows.items()}} for i in range(4)]


def test_sampling_settings_are_restored(tmp_path):
    trainer = tiny_trainer(tmp_path)
    config = trainer.generation_config.to_dict()
    eos_token_ids = list(trainer.eos_token_ids)
    with pytest.raises(RuntimeError), TRLSampler(trainer)._settings(5, [2, 7]):  # noqa: PT012  the block is tested
        assert trainer.generation_config.max_new_tokens == 5
        assert trainer.generation_config.eos_token_id == trainer.eos_token_ids == [2, 7]
        raise RuntimeError
    assert trainer.generation_config.to_dict() == config
    assert trainer.eos_token_ids == eos_token_ids


# Rewards


def test_reward_functions_see_where_the_thinking_was_cut(tmp_path):
    told = []

    def spy(completion_ids, budget, cut, thinking_length, finished, thinking, **kwargs):
        told.extend(zip(budget, cut, thinking_length, finished, thinking, strict=True))
        return parity_reward(None, completion_ids)

    trainer = tiny_trainer(tmp_path, Recorder, budgets=[0, 3, 9], reward_funcs=spy, max_steps=8)
    trainer.train()
    expected = []
    for rollout in (rollout for _, batch, _ in trainer.rolled for rollout in batch.rollouts):
        tokens, ends = rollout.thinking.token_ids, rollout.thinking.finished
        for budget in (0, 3, 9):
            text = trainer.processing_class.decode(tokens[:budget])
            seen = min(budget, len(tokens))
            expected += [(budget, seen, len(tokens), ends and len(tokens) <= budget, text)] * 2  # summaries
    assert told == expected
    assert len({finished for *_, finished, _ in told}) == 2


def test_reward_functions_see_summaries(tmp_path):
    calls = []

    def spy(prompts, completions, completion_ids, answer, well_formed, trainer_state, **kwargs):
        calls.append((prompts, completions, completion_ids, answer, well_formed))
        return parity_reward(completions, completion_ids)

    async def constant(prompts, **kwargs):
        return [1.0] * len(prompts)

    trainer = tiny_trainer(
        tmp_path, Recorder, reward_funcs=[spy, constant], reward_weights=[1.0, 0.5], max_steps=1, log_completions=True
    )
    trainer.train()
    (prompts, completions, completion_ids, answer, well_formed), batch = calls[0], trainer.rolled[0][1]
    assert len(calls) == 1 and len(prompts) == 8 * 3 * 2
    flat = [ids for rollout in batch.rollouts for row in rollout.summaries for ids in row]
    assert completion_ids == flat
    decode = trainer.processing_class.decode
    assert [c[0]["content"] for c in completions] == [decode(ids, skip_special_tokens=True) for ids in flat]
    assert answer == [a for a in answer[::6] for _ in range(6)] and len(set(answer)) == 2
    assert well_formed == [f for r in batch.rollouts for row in r.well_formed(trainer.markers) for f in row]
    log = trainer.state.log_history[0]
    assert log["rewards/constant/mean"] == 1.0
    assert log["reward"] == pytest.approx(log["rewards/spy/mean"] + 0.5)
    mean = statistics.mean(parity_reward(None, completion_ids))
    assert log["anytime/auc"] == pytest.approx(mean + 0.5)


def test_none_leaves_a_summary_out(tmp_path):
    def sometimes(completion_ids, **kwargs):
        return [None if sum(ids) % 3 == 0 else parity_reward(None, [ids])[0] for ids in completion_ids]

    trainer = tiny_trainer(tmp_path, Recorder, reward_funcs=sometimes)
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 < log["anytime/unscored_ratio"] < 1
    assert math.isfinite(log["loss"]) and math.isfinite(log["grad_norm"])
    assert torch.isfinite(trainer.scored[0]["advantages"]).all()
    # No reward anywhere: no gradient, no crash
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda prompts, **kwargs: [None] * len(prompts))
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["anytime/unscored_ratio"], log["anytime/no_advantage_ratio"], log["grad_norm"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [1.0] * (n - 1), r"`bad`.*\b47\b.*\b48\b"),
        (lambda n: [1.0] * (n - 2) + [math.nan, 1.0], r"`bad`.*\bnan\b.*\b46\b"),
        (lambda n: [math.inf] + [1.0] * (n - 1), r"`bad`.*\binf\b.*\b0\b"),
        (lambda n: 1 / 0, "`bad`.*ZeroDivisionError"),
        (lambda n: sys.exit(0), r"`bad`.*sys.exit\(0\)"),
        (lambda n: dict.fromkeys(range(n), 1.0), r"`bad`.*\bdict\b"),
        (lambda n: "1" * n, r"`bad`.*\bstr\b"),
        (lambda n: None, r"`bad`.*\bNoneType\b"),
        (lambda n: [1.0, "1.0"] + [1.0] * (n - 2), r"`bad`.*\bstr\b.*\b1\b"),
        (lambda n: [1.0] * (n - 1) + [[1.0]], r"`bad`.*\blist\b.*\b47\b"),
        (lambda n: [1e39] + [1.0] * (n - 1), r"`bad`.*1e[+]39.*\b0\b.*float32"),
        (lambda n: [1.0, -(10**400)] + [1.0] * (n - 2), r"`bad`.*\binf\b.*\b1\b"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_bad_rewards(tmp_path, returned, message, is_async):
    def bad(prompts, **kwargs):
        return returned(len(prompts))

    sync = bad
    if is_async:

        async def bad(prompts, **kwargs):
            return sync(prompts)

    trainer = tiny_trainer(tmp_path, reward_funcs=[parity_reward, bad])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.reward_funcs[1] is bad  # unwrapped again


def test_numbers_of_other_types_are_rewards():
    values = [1, True, 0.5, None, Decimal("0.25"), Fraction(1, 4), np.float32(0.5), torch.tensor(2.0), np.array(3)]
    expected = [1.0, 1.0, 0.5, None, 0.25, 0.25, 0.5, 2.0, 3.0]
    assert checked_rewards(values, [""] * 9) == expected
    assert checked_rewards((value for value in values), [""] * 9) == expected
    assert checked_rewards(torch.ones(2), [""] * 2) == checked_rewards(np.ones(2), [""] * 2) == [1.0, 1.0]


def test_reward_models(tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "qwen2", vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    tokenizer = make_tokenizer()
    trainer = tiny_trainer(
        tmp_path,
        max_steps=1,
        reward_funcs=[AutoModelForSequenceClassification.from_config(config)],
        reward_processing_classes=tokenizer,
        processing_class=tokenizer,
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["anytime/auc"])


# Run-time edges


def sampling(**bias):
    """A model that (nearly) always or never samples a word, by the bias of an LM head."""
    model = make_model()
    head = torch.nn.Linear(32, 20)
    head.weight = model.lm_head.weight
    head.bias = torch.nn.Parameter(torch.zeros(20), requires_grad=False)
    for word, value in bias.items():
        head.bias.data[make_tokenizer().convert_tokens_to_ids({"end": "</think>", "eos": "<|im_end|>"}[word])] = value
    model.lm_head = head
    return model


@pytest.mark.parametrize(
    ("bias", "finished", "length"),
    [({"end": 50.0}, 1.0, 1.0), ({"end": -50.0, "eos": -50.0}, 0.0, 9.0), ({"eos": 50.0, "end": -50.0}, 0.0, 1.0)],
    ids=["finished at once", "all cut", "all ended_with_eos"],
)
def test_extreme_thinkings(tmp_path, bias, finished, length):
    trainer = tiny_trainer(tmp_path, model=sampling(**bias), reward_funcs=parity_reward)
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["thinking/finished_ratio"], log["thinking/mean_length"]) == (finished, length)
    assert math.isfinite(log["loss"])
    if "eos" in bias and bias["eos"] > 0:
        assert log["anytime/formatted@3"] == 0


def test_equal_rewards_teach_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=lambda prompts, **kwargs: [1.0] * len(prompts), baseline="v2")
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["anytime/no_advantage_ratio"] == 1
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_empty_thinkings(tmp_path):
    """A backend that returns no thinking at all."""
    trainer = tiny_trainer(tmp_path)
    trainer.generation = PrefixGeneration(TRLSampler(trainer))
    generate = trainer._generate_single_turn

    def no_thinking(prompt_ids, images, fields, num_generations):
        if trainer.generation_config.max_new_tokens == 9:
            return [[] for _ in prompt_ids], None
        return generate(prompt_ids, images, fields, num_generations)

    trainer._generate_single_turn = no_thinking
    trainer.train()
    assert trainer.state.log_history[0]["thinking/mean_length"] == 0
    assert math.isfinite(trainer.state.log_history[0]["loss"])


# Variants that are TRL's


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_nothing(tmp_path, kwargs):
    weights = []
    for checkpointing in (False, True):
        trainer = tiny_trainer(
            tmp_path,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs if checkpointing else None,
        )
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)
    assert (weights[0] - torch.cat([p.flatten() for p in make_model().parameters()])).abs().max() > 1e-4


def test_bf16_is_for_the_forward_pass(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True)
    seen = set()
    trainer.model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, inputs, output: seen.add((output.dtype, output.requires_grad))
    )
    trainer.train()
    assert (torch.bfloat16, True) in seen and (torch.float32, True) not in seen
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


STREAM = IterableDataset.from_generator(lambda: iter(make_dataset()))
PLAIN = Dataset.from_dict({"prompt": ["1 2 <think>", "3 <think>"], "answer": ["1", "2"]})


@pytest.mark.parametrize(
    ("train_dataset", "known"),
    [
        (
            STREAM,
            [
                f"<|im_start|> user {row['prompt'][0]['content']} <|im_end|> <|im_start|> assistant <think>"
                for row in make_dataset()
            ],
        ),
        (PLAIN, PLAIN["prompt"]),
    ],
    ids=["streaming", "plain prompts"],
)
def test_groups_of_prompts_of_any_kind(tmp_path, train_dataset, known):
    trainer = tiny_trainer(tmp_path, Recorder, train_dataset=train_dataset, max_steps=1)
    trainer.train()
    ((_, batch, _),) = trainer.rolled
    prompts = [trainer.processing_class.decode(rollout.prompt_ids) for rollout in batch.rollouts]
    first, second = prompts[0], prompts[4]
    assert prompts == [first] * 4 + [second] * 4
    assert first != second and {first, second} <= set(known)


# Packed or separate rows


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "beta": 0.1},
        # At 0.5 the threshold is the entropy of twelve first tokens, which rounding tells apart
        {"loss_type": "dapo", "top_entropy_quantile": 0.7, "pad_to_multiple_of": 8},
        {"loss_type": "grpo", "entropy_coef": 0.01},
        {"budgets": [0, 3, 9], "baseline": "adaptive"},
    ],
    ids=["the defaults", "lora and kl", "dapo", "entropy bonus", "a budget of 0"],
)
def test_separate_rows_train_the_same(tmp_path, settings):
    weights, logs = [], []
    for mode in ("tree", "rows"):
        trainer = tiny_trainer(
            tmp_path,
            packing=mode,
            num_iterations=2,
            optim="sgd",
            learning_rate=1.0,
            gradient_checkpointing=False,
            **settings,
        )
        trainer.generation = PrefixGeneration(TRLSampler(trainer))  # the same random numbers for both
        trainer.train()
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
        logs.append(trainer.state.log_history)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)
    for tree, rows in zip(*logs, strict=True):
        for name in {"loss", "grad_norm", "entropy", "kl"} & set(tree):
            assert tree[name] == pytest.approx(rows[name], abs=1e-5, rel=1e-4), name


def hybrid_model():
    return make_model("lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)


def test_hybrid_models_train_on_separate_rows_and_say_so(tmp_path, caplog):
    with caplog.at_level("WARNING", logger="trl_anytime.modeling.support"):
        trainer = tiny_trainer(tmp_path, model=hybrid_model())
    # 7 rows of 9 + 7 tokens against one of 9 + 6 · 7
    records = [record for record in caplog.records if record.name == "trl_anytime.modeling.support"]
    (warning,) = [record.getMessage() for record in records]
    assert "conv" in warning and re.search(r"\b2\.2 times\b", warning)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    with pytest.raises(ValueError, match="conv.*`packing='auto'`"):
        tiny_trainer(tmp_path, model=hybrid_model(), packing="tree")


def test_models_that_fail_the_check_keep_their_attention(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_anytime.modeling.support.packing_mismatch", lambda model: "it is odd")
    with caplog.at_level("WARNING", logger="trl_anytime.modeling.support"):
        trainer = tiny_trainer(tmp_path)
    assert "it is odd" in caplog.text
    assert trainer.model.config._attn_implementation == "sdpa"
    trainer.train()


# Evaluation


def test_evaluation_by_hand(tmp_path):
    """Mean over all samples, not over batches: 5 prompts in batches of 2."""
    trainer = tiny_trainer(
        tmp_path,
        Recorder,
        eval_dataset=make_dataset(5),
        eval_budgets=[2, 4],
        num_generations_eval=1,
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    rewards = [
        [parity_reward(None, row)[0] for row in rollout.summaries]
        for _, batch, _ in trainer.rolled
        for rollout in batch.rollouts
    ]
    assert len(rewards) == 5 and all(len(row) == 2 for row in rewards)
    for j, budget in enumerate([2, 4]):
        expected = statistics.mean(row[j] for row in rewards)
        assert metrics[f"eval_anytime/reward@{budget}"] == pytest.approx(expected)
    assert metrics["eval_anytime/auc"] == pytest.approx(statistics.mean(sum(row) / 2 for row in rewards))
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_anytime/auc"], abs=0.2)  # TRL's mean over batches
    assert not any(key.endswith("@3") for key in metrics)
    # One trace serves all budgets
    assert all(len(r.cuts) == 2 and len(r.summaries[0]) == 1 for _, b, _ in trainer.rolled for r in b.rollouts)


# Logging


def test_metrics(tmp_path):
    model = sampling(end=-50.0, eos=-50.0)  # every segment has tokens
    settings = {"num_iterations": 2, "steps_per_generation": 2, "per_device_train_batch_size": 4}
    trainer = tiny_trainer(tmp_path, model=model, **settings)
    trainer.train()
    log = trainer.state.log_history[0]
    names = {"anytime/auc", "anytime/no_advantage_ratio", "anytime/unscored_ratio"}
    names |= {f"anytime/{kind}@{b}" for kind in ("reward", "formatted") for b in (3, 6, 9)}
    names |= {"thinking/mean_length", "thinking/finished_ratio", "summary/mean_length", "summary/clipped_ratio"}
    names |= {f"time/{phase}" for phase in ("thinking", "summarising", "grading", "scoring", "updating")}
    # With two prompts some correlations are undefined, and then left out
    names |= {f"baseline/variance_ratio/{baseline}@{b}" for baseline in ("v1", "v2", "brpo") for b in (3, 6, 9)}
    assert any(name.startswith("baseline/correlation/") for name in log)
    assert None not in log.values()
    names |= {"reward", "reward_std", "num_tokens", "completions/mean_length", "entropy", "step_time"}
    assert names <= set(log)
    assert log["completions/clipped_ratio"] == 1  # no thinking ends
    assert not any(name.endswith("terminated_length") for name in log)
    assert all(log[f"time/{phase}"] > 0 for phase in ("thinking", "summarising", "grading", "scoring", "updating"))


def test_lengths_of_rollouts_whose_thinking_ends(tmp_path):
    trainer = tiny_trainer(tmp_path, Recorder, model=sampling(end=0.0, eos=-1.0), max_steps=1)
    trainer.train()
    (_, batch, _), log = trainer.rolled[0], trainer.state.log_history[0]
    ended = [rollout for rollout in batch.rollouts if rollout.thinking.finished or rollout.thinking.ended_with_eos]
    lengths = [
        len(rollout.thinking.token_ids) + sum(len(ids) for row in rollout.summaries for ids in row)
        for rollout in ended
    ]
    assert 0 < len(ended) < 8 and len(set(lengths)) > 1
    assert log["completions/clipped_ratio"] == 1 - len(ended) / 8
    of = {"mean": statistics.mean(lengths), "min": min(lengths), "max": max(lengths)}
    for name, value in of.items():
        assert log[f"completions/{name}_terminated_length"] == pytest.approx(value)
    # All rollouts: the same measure as TRL's
    trainer = tiny_trainer(tmp_path, model=sampling(end=50.0), max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    for name in of:
        assert log[f"completions/{name}_terminated_length"] == log[f"completions/{name}_length"]


@pytest.mark.parametrize("column", ["budget", "thinking", "step", "prompt", "advantage", "logging_reward"])
def test_extra_columns_do_not_replace_ours(tmp_path, column):
    def logging_reward(completion_ids, log_extra, **kwargs):
        log_extra(column, [0] * len(completion_ids))
        return parity_reward(None, completion_ids)

    trainer = tiny_trainer(tmp_path, reward_funcs=logging_reward)
    with pytest.raises(ValueError, match=f"log_extra.'{column}'"):
        trainer.train()


def test_completions_table(tmp_path):
    def logging_reward(completion_ids, log_extra, **kwargs):
        log_extra("length", [len(ids) for ids in completion_ids])
        return parity_reward(None, completion_ids)

    trainer = tiny_trainer(tmp_path, Recorder, reward_funcs=logging_reward, max_steps=1, log_completions=True)
    trainer.train()
    table = pd.read_parquet(next((tmp_path / "completions").iterdir()))
    batch, decode = trainer.rolled[0][1], trainer.processing_class.decode
    assert len(table) == 8 * 3
    rows = table.to_dict("records")
    for i, rollout in enumerate(batch.rollouts):
        for j, row in enumerate(rows[3 * i : 3 * i + 3]):
            first = rollout.summaries[j][0]
            assert row["budget"] == [3, 6, 9][j]
            assert row["thinking"] == decode(rollout.thinking.token_ids[: rollout.cuts[j]])
            assert row["completion"] == decode(first)
            assert row["logging_reward"] == parity_reward(None, [first])[0]
            assert row["length"] == len(first)
    assert {"prompt", "advantage", "thinking_advantage", "step"} <= set(table)


# Checkpoints


def test_checkpoints_resume(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    trainer = tiny_trainer(tmp_path, **settings)
    trainer.train()
    assert os.path.exists(tmp_path / "checkpoint-1" / "model.safetensors")
    resumed = tiny_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


# Bad input at construction


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budgets": [100, 250]}, r"\b256\b.*\b250\b.*`budgets`"),
        ({"eval_budgets": [250]}, r"\b256\b.*\b250\b.*`eval_budgets`"),
        ({"think_end": "</end>", "truncation_bridge": "</end>"}, "'</end>'.*`think_end`"),
        ({"truncation_bridge": "so"}, "`truncation_bridge`.*'</think>'"),
        ({"peft_config": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)}, "LoRA"),
        ({"train_dataset": Dataset.from_dict({"question": ["1"]})}, "`train_dataset`.*'prompt'.*'question'"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["1"], "image": ["x"]})}, "'image'.*`remove_columns`"),
        ({"train_dataset": None}, "`train_dataset`"),
        ({"temperature": 0.0}, "`temperature`"),
        ({"temperature": math.nan}, "`temperature`"),
        ({"top_p": 0.0}, "`top_p`"),
        ({"generation_kwargs": {"temperature": 0}}, "`temperature`"),
        ({"generation_kwargs": {"do_sample": False}}, "do_sample"),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_trainer(tmp_path, **settings)


ARGUMENTS_OF_REWARDS = [
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "well_formed",
    "budget",
    "cut",
    "thinking_length",
    "finished",
    "thinking",
]


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([{"prompt": "1"}], r"\blist\b"),
        (iter([{"prompt": "1"}]), r"\blist_iterator\b"),
        (DatasetDict({"easy": make_dataset()}), r"\bDatasetDict\b.*dataset\['easy'\]"),
        (Dataset.from_dict({"question": ["1"], "answer": ["1"]}), "'prompt'.*'question', 'answer'"),
        (stream([{"question": "1"}]), "'prompt'.*'question'"),
        (Dataset.from_dict({"prompt": []}), "empty"),
        (Dataset.from_dict({"prompt": ["1", ""]}), "Row 1"),
        (Dataset.from_dict({"prompt": ["1", "2", " \n"]}), "Row 2"),
        (Dataset.from_dict({"prompt": ["1", None]}), "Row 1"),
        (Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}], []]}), "Row 1"),
        (Dataset.from_dict({"prompt": [7]}), "Row 0"),
        *((make_dataset().add_column(name, ["x"] * 8), name) for name in ARGUMENTS_OF_REWARDS),
    ],
)
def test_bad_data(tmp_path, dataset, message):
    """For training, for evaluation, and as one of several sets."""
    cases = {"train_dataset": dataset, "eval_dataset": {"good": make_dataset(2), "bad": dataset}}
    if not isinstance(dataset, dict):  # several sets
        cases["eval_dataset "] = dataset
    for name, value in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            tiny_trainer(tmp_path, **{name.strip(): value})
        assert name.strip() in str(error.value)
        if isinstance(value, dict) and "good" in value:
            assert "'bad'" in str(error.value)


def test_a_column_that_a_reward_does_not_get_is_no_fault(tmp_path):
    tiny_trainer(tmp_path, train_dataset=make_dataset().add_column("completion", ["x"] * 8))


# A model or tokenizer that does not fit


def test_nothing_to_train(tmp_path):
    """An adapter as `from_pretrained` loads it is frozen."""
    get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        tiny_trainer(tmp_path, model=PeftModel.from_pretrained(make_model(), tmp_path / "adapter"))
    trainable = PeftModel.from_pretrained(make_model(), tmp_path / "adapter", is_trainable=True)
    tiny_trainer(tmp_path, model=trainable)
    two = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    two.load_adapter(tmp_path / "adapter", "second", is_trainable=True)
    for name, parameter in two.named_parameters():  # which versions of PEFT do not do alike
        parameter.requires_grad_("second" in name.split("."))
    assert two.active_adapters == ["default"]
    with pytest.raises(ValueError, match="'default'"):
        tiny_trainer(tmp_path, model=two)
    with pytest.raises(ValueError, match="`requires_grad`"):
        tiny_trainer(tmp_path, model=make_model().requires_grad_(False))


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path):
    tokenizer = make_tokenizer(extra_words=("ten",))  # token 20
    data = Dataset.from_dict({"prompt": ["1 <think>", "ten <think>"], "answer": ["1", "10"]})
    fault = r"\b20\b.*\b20 tokens\b.*`model.resize_token_embeddings"  # the token, and those of the model
    with pytest.raises(ValueError, match=fault):
        tiny_trainer(tmp_path, processing_class=tokenizer, train_dataset=data)
    with pytest.raises(ValueError, match=f"`answer_bridge`.*{fault}"):
        tiny_trainer(tmp_path, processing_class=tokenizer, answer_bridge="ten")
    # In a prompt of average length, which is not looked at before it is sampled from
    many = ["1 1 <think>"] * 20 + ["ten 1 <think>"] * 2 + ["1 1 1 1 1 1 1 1 1 <think>"] * 20
    data = Dataset.from_dict({"prompt": many, "answer": ["1"] * 42})
    trainer = tiny_trainer(
        tmp_path, processing_class=tokenizer, train_dataset=data, shuffle_dataset=False, max_steps=50
    )
    with pytest.raises(ValueError, match=fault):
        trainer.train()
    tiny_trainer(tmp_path, processing_class=tokenizer, model=make_model(vocab_size=21), train_dataset=data)


def test_no_end_of_sequence_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="`processing_class.eos_token`"):
        tiny_trainer(tmp_path, processing_class=tokenizer)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="`processing_class.eos_token`"):
        tiny_trainer(tmp_path, processing_class=tokenizer)


def test_prompts_that_render_to_nothing(tmp_path):
    silent = "{% if messages[0].content != '0' %}" + make_tokenizer().chat_template + "{% endif %}"
    with pytest.raises(ValueError, match="chat template"):
        tiny_trainer(tmp_path, processing_class=make_tokenizer(silent))


@pytest.mark.parametrize("name", ["tools", "rollout_func", "environment_factory"])
def test_other_rollouts_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        BRPOTrainer(make_model(), make_config(tmp_path), make_dataset(), **{name: [print]})


def test_arguments_in_the_order_of_trl(tmp_path):
    for arguments in ([make_config(tmp_path)], [make_config(tmp_path), make_dataset()]):
        with pytest.raises(ValueError, match="`BRPOConfig`.*function.*reward_funcs="):
            BRPOTrainer(make_model(), parity_reward, *arguments)
    with pytest.raises(ValueError, match="`train_dataset`.*`reward_funcs="):
        BRPOTrainer(make_model(), make_config(tmp_path), make_dataset(), parity_reward)
    config = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="`GRPOConfig`.*`trl_anytime.BRPOConfig`"):
        BRPOTrainer(make_model(), config, make_dataset())


def test_closed_thinking_is_refused(tmp_path):
    closed = "{{ messages[0].content }} {% if not enable_thinking %}</think>{% endif %}"
    with pytest.raises(ValueError, match=r"`chat_template_kwargs=\{'enable_thinking': True\}`"):
        tiny_trainer(tmp_path, processing_class=make_tokenizer(closed))
    tiny_trainer(tmp_path, processing_class=make_tokenizer(closed), chat_template_kwargs={"enable_thinking": True})


def test_no_chat_template(tmp_path):
    with pytest.raises(ValueError, match="chat[ _]template"):
        tiny_trainer(tmp_path, processing_class=make_tokenizer(chat_template=None))


@pytest.mark.parametrize("answers", [["1", "2", None], [1.0, 2.0, math.nan], ["1", "2", ""]])
def test_missing_answers_name_the_row(tmp_path, answers):
    dataset = Dataset.from_dict({"prompt": ["1", "2", "3"], "answer": answers})
    with pytest.raises(ValueError, match="Row 2"):
        tiny_trainer(tmp_path, reward_funcs=MathReward(), train_dataset=dataset)
    with pytest.raises(ValueError, match="Row 2"):
        tiny_trainer(tmp_path, reward_funcs=[MathReward()], eval_dataset={"a": dataset})


def test_the_default_reward_is_the_maths_verifier(tmp_path):
    tokenizer = make_tokenizer(extra_words=tuple(f"\\boxed{{{digit}}}" for digit in range(10)))
    model = make_model(vocab_size=30)
    trainer = BRPOTrainer(
        model, make_config(tmp_path, max_steps=1, seed=1), make_dataset(), processing_class=tokenizer
    )
    (reward,) = trainer.reward_funcs
    assert isinstance(reward, MathReward) and reward.answer_bridge == "answer"
    trainer.train()
    assert 0 < trainer.state.log_history[0]["anytime/auc"] < 1
