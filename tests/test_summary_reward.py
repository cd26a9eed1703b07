"""Training by the likelihood of reference answers: exact rewards, exact gradients, and what is refused."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig

from tests.support.tiny import (
    Recorder,
    byte_tokenizer,
    make_config,
    make_dataset,
    make_model,
    parity_reward,
    tiny_trainer,
)
from trl_anytime.rewards import ExactMatch
from trl_anytime.rollout.backend import Generation

KINDS = ["likelihood", "log_likelihood", "mean_log_likelihood"]
BUDGETS = [0, 3, 6, 9]
WEIGHTS = [0.1, 0.2, 0.3, 0.4]
EOS = 2


def recorder(output_dir, **settings):
    defaults = {
        "summary_reward": "likelihood",
        "summary_weight": "objective",
        "reference_template": "{answer}",
        "num_summaries": 1,
        "budgets": BUDGETS,
        "prior": WEIGHTS,
        "reward_funcs": None,
        "max_steps": 1,
        "optim": "sgd",
        "prune": False,
        "gradient_checkpointing": False,
    }
    return tiny_trainer(output_dir, Recorder, **{**defaults, **settings})


def contexts(batch):
    """What stands before the answers of a batch, by rollout and budget."""
    return [
        [
            [*rollout.prompt_ids, *rollout.thinking.token_ids[:cut], *bridge]
            for cut, bridge in zip(rollout.cuts, rollout.bridges, strict=True)
        ]
        for rollout in batch.rollouts
    ]


def logprob(model, context, answer):
    logits = model(torch.tensor([[*context, *answer]]), use_cache=False).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_the_reward_is_what_sampled_summaries_estimate(tmp_path, packing):
    """All summaries of at most two tokens, weighed by their probability; right is the answer with EOS behind it."""
    model = make_model()
    trainer = recorder(tmp_path, model=model, learning_rate=0.0, packing=packing)
    trainer.train()
    ((_, batch, _),) = trainer.rolled
    rewards = batch.references.rewards
    assert rewards.shape == (8, len(BUDGETS)) and 0 < rewards.min() < rewards.max()
    tokens = torch.arange(20)
    with torch.no_grad():
        for i, row in enumerate(contexts(batch)):
            right = batch.references.token_ids[i]
            assert len(right) == 2 and right[-1] == EOS
            for j, context in enumerate(row):
                first = model(torch.tensor([context])).logits[0, -1].softmax(-1)
                rows = torch.cat([torch.tensor(context).expand(20, -1), tokens[:, None]], dim=1)
                second = model(rows).logits[:, -1].softmax(-1)
                probabilities = {
                    (a, b)[: 1 if a == EOS else 2]: float(first[a] if a == EOS else first[a] * second[a, b])
                    for a in range(20)
                    for b in range(20)
                }
                assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
                expected = sum(p for summary, p in probabilities.items() if list(summary) == right)
                assert rewards[i, j].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_the_answers_tokens(tmp_path, kind, packing):
    """Of Σ_j P_j reward_j, in a mean over rollouts as `dr_grpo` takes it; the thinking's part is set to 0."""
    model = make_model()
    trainer = recorder(tmp_path, model=model, summary_reward=kind, learning_rate=0.0, packing=packing)
    trainer.train()
    ((_, batch, _),), (output,) = trainer.rolled, trainer.scored
    model.train()
    model.zero_grad()
    thinking = batch.packed.branches() < 0
    inputs = {**output, "advantages": output["advantages"].masked_fill(thinking, 0.0)}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs).backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.zero_grad()
    objective = 0.0
    for i, row in enumerate(contexts(batch)):
        for weight, context in zip(WEIGHTS, row, strict=True):
            log_pi = logprob(model, context, batch.references.token_ids[i])
            objective += (
                weight
                * {
                    "likelihood": log_pi.exp(),
                    "log_likelihood": log_pi,
                    "mean_log_likelihood": log_pi / len(batch.references.token_ids[i]),
                }[kind]
            )
    (-objective / 8 / trainer.max_completion_length).backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    assert largest > 0
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(actual[name], p.grad, atol=1e-5 * largest.item(), rtol=1e-4, msg=name)


def test_the_thinking_earns_what_lies_ahead(tmp_path):
    """R_j without a baseline, P = 0.1 0.2 0.3 0.4: the first token's is the sum over the budgets 3, 6 and 9."""
    trainer = recorder(tmp_path, baseline="none")
    trainer.train()
    ((_, batch, _),), (output,) = trainer.rolled, trainer.scored
    expected = (batch.references.rewards[:, 1:] * torch.tensor(WEIGHTS[1:])).sum(1)
    torch.testing.assert_close(output["advantages"][:, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_answers(tmp_path, kind, settings):
    """One answer for all prompts; thinking and answers are trained, nothing is sampled or graded behind a cut."""
    rows = make_dataset().map(lambda row: {"answer": "7"})
    trainer = recorder(tmp_path, summary_reward=kind, train_dataset=rows, max_steps=30, learning_rate=3e-2,
                       optim="adamw_torch", prune=True, **settings)  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert logs[-1]["reward"] > logs[0]["reward"] + 0.3
    assert logs[0]["reward"] == pytest.approx(
        sum(weight * logs[0][f"anytime/reward@{b}"] for weight, b in zip(WEIGHTS, BUDGETS, strict=True)), rel=1e-6
    )
    assert f"rewards/{kind}/mean" in logs[0] and not [name for name in logs[0] if name.startswith("summary/")]
    assert trainer.reward_func_names == ["MathReward"]  # for evaluations, as before


class AsAnEngine(Generation):
    """The traces of another backend with log-probabilities of its own: half a unit below the policy's, as it says."""

    def __init__(self, inside, policy):
        super().__init__()
        self.inside, self.policy = inside, policy

    def roll_out(self, prompt_ids, settings):
        rollouts = self.inside.roll_out(prompt_ids, settings)
        assert all(summaries == [] for rollout in rollouts for summaries in rollout.summaries)  # nothing is sampled
        pairs = zip(prompt_ids, rollouts, strict=True)
        return [replace(rollout, thinking=self.known(ids, rollout)) for ids, rollout in pairs]

    def known(self, prompt_ids, rollout):
        ids = rollout.thinking.token_ids
        logits = self.policy(torch.tensor([[*prompt_ids, *ids]]), use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        return replace(rollout.thinking, logprobs=(logprobs - 0.5).tolist())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("likelihood", {}),
        ("likelihood", {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
        ("mean_log_likelihood", {}),
    ],
)
def test_rollouts_of_an_engine(tmp_path, kind, settings):
    """
    vLLM samples the thinking and knows its log-probabilities; the reward is the trainer's own. The importance
    correction is for the thinking only, whose ratio is e^0.5, and 1 for answers, which nothing has sampled.
    """
    runs = []
    for is_engine in (False, True):
        trainer = recorder(tmp_path, summary_reward=kind, vllm_importance_sampling_mode="token_truncate", **settings)
        if is_engine:
            policy = trainer.model
            trainer.generation = AsAnEngine(trainer.generation, policy.eval())
            trainer.use_vllm, trainer.vllm_generation = True, SimpleNamespace(sync_weights=lambda: None)
            trainer._last_loaded_step = -1  # as TRL begins with vLLM
        torch.manual_seed(0)
        trainer.train()
        ((_, batch, _),), (output,) = trainer.rolled, trainer.scored
        runs.append((batch, output))
    (plain, _), (batch, output) = runs
    assert [r.thinking.token_ids for r in batch.rollouts] == [r.thinking.token_ids for r in plain.rollouts]
    torch.testing.assert_close(batch.references.rewards, plain.references.rewards)
    ratio, branches = output["importance_sampling_ratio"], batch.on_device(output["completion_ids"]).branches()
    trained = batch.on_device(output["completion_ids"]).trained()
    of_thinking, of_answers = ratio[trained & (branches < 0)], ratio[trained & (branches >= 0)]
    torch.testing.assert_close(of_thinking, torch.full_like(of_thinking, 0.5).exp(), atol=1e-4, rtol=0)
    torch.testing.assert_close(of_answers, torch.ones_like(of_answers), atol=1e-4, rtol=0)


def test_answers_of_weight_0_are_not_trained(tmp_path):
    trainer = recorder(tmp_path, summary_weight=0.0)
    trainer.train()
    ((_, batch, _),), (output,) = trainer.rolled, trainer.scored
    branches = batch.packed.branches() >= 0
    assert (output["advantages"][branches] == 0).all() and (output["advantages"][~branches] != 0).any()


def test_evaluations_sample_and_grade(tmp_path):
    graded = tiny_trainer(
        tmp_path, summary_reward="likelihood", num_summaries=1, reference_template="{answer}", budgets=[3, 9],
        reward_funcs=ExactMatch(), eval_dataset=make_dataset(4), max_steps=1,
    )  # fmt: skip
    metrics = graded.evaluate()
    assert metrics["eval_anytime/reward@9"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert "eval_summary/mean_length" in metrics and "eval_rewards/ExactMatch/mean" in metrics


def test_a_checkpoint_of_another_reward_is_refused(tmp_path):
    recorder(tmp_path, save_strategy="steps", save_steps=1, max_steps=1).train()
    other = recorder(tmp_path, summary_reward="log_likelihood", max_steps=2)
    with pytest.raises(ValueError, match="summary_reward"):
        other.train(resume_from_checkpoint=True)


WITHOUT_ANSWERS = Dataset.from_dict({"prompt": ["1", "2"]})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"summary_reward": "probability"}, "summary_reward"),
        ({"num_summaries": 2}, "num_summaries=2"),
        ({"reference_template": "answer"}, "reference_template"),
        ({"beta": 0.1}, "beta=0.1"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile=0.5"),
        ({"summary_policy": "final"}, "summary_policy='final'"),
        ({"reward_weights": [1.0]}, "reward_weights"),
        ({"reward_funcs": parity_reward}, "reward_funcs"),
        ({"train_dataset": WITHOUT_ANSWERS}, "'answer'"),
        ({"train_dataset": WITHOUT_ANSWERS.add_column("answer", [["1", "2"], ["3"]])}, "Row 0"),
        ({"train_dataset": WITHOUT_ANSWERS.add_column("answer", ["1", ""])}, "Row 1"),
        ({"train_dataset": WITHOUT_ANSWERS.add_column("answer", ["1", "1 2 3 4"])}, "row 1 has 5 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        recorder(tmp_path, **settings)


def test_a_stream_is_refused_where_its_answer_is_missing(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "1 <think>", "answer": ""}] * 8))
    with pytest.raises(ValueError, match="Row 0"):
        recorder(tmp_path, train_dataset=rows)


def test_answers_that_melt_into_the_bridge_are_named(tmp_path, caplog):
    """A real byte-level tokenizer in which ` 4` is one token."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    tokenizer = byte_tokenizer(["41 42 43 45 46"] * 50, chat_template=template)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "x"}], "answer": answer} for answer in "4x"])
    settings = {
        "processing_class": tokenizer,
        "model": make_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id),
        "train_dataset": rows,
        "truncation_bridge": "</think>",
    }
    recorder(tmp_path, answer_bridge="Answer: ", **settings)
    warnings = [record.getMessage() for record in caplog.records if "reference answers" in record.getMessage()]
    assert len(warnings) == 1 and "1 of 2" in warnings[0] and "answer_bridge" in warnings[0]
    caplog.clear()
    recorder(tmp_path, answer_bridge="\n", **settings)
    assert not [record for record in caplog.records if "reference answers" in record.getMessage()]


def test_num_summaries_is_1(tmp_path):
    assert make_config(tmp_path, summary_reward="likelihood", num_summaries=4).num_summaries == 1
