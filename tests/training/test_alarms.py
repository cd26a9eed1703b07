"""Alarms: each goes off once, where it should, and not a little earlier or where a figure is a little better."""

import json
import re

import pytest
import torch
from transformers import TrainerCallback, TrainerState

from tests.support import DATA
from tests.support.pages import table
from tests.support.scenarios import SETTINGS
from tests.support.tiny import make_model, make_tokenizer, parity_reward, tiny_trainer
from trl_anytime.rewards import MathReward
from trl_anytime.rollout.types import Rollout, Thinking
from trl_anytime.training.alarms import ALARMS, Alarms

HEALTHY = {
    "anytime/reward@2": 0.25,
    "anytime/reward@4": 0.5,
    "anytime/no_advantage_ratio": 0.25,
    "summary/clipped_ratio": 0.0,
    "summary/escape_ratio@2": 0.1,
    "summary/escape_ratio@4": 0.0,
    "thinking/finished_ratio": 0.5,
    "thinking/empty_ratio": 0.0,
    "thinking/never_cut_ratio": 0.25,
    "rewards/MathReward/graded": 60.0,
    "rewards/MathReward/no_box": 4.0,
    "rewards/MathReward/too_long": 0.0,
    "rewards/MathReward/timeouts": 0.0,
    "sampling/sampling_logp_difference/mean": 0.02,
    "entropy": 0.8,
    "grad_norm": 0.3,
}


def rewards(first, last):
    return {"anytime/reward@2": first, "anytime/reward@4": last}


def counts(graded, no_box, timeouts):
    names = {"graded": graded, "no_box": no_box, "timeouts": timeouts}
    return {f"rewards/MathReward/{name}": float(count) for name, count in names.items()}


# (alarm, metrics that set it off, metrics that do not quite)
CASES = [
    ("no reward at any budget", rewards(0.0, 0.0), rewards(0.0, 0.001)),
    ("nothing to learn from", {"anytime/no_advantage_ratio": 0.96}, {"anytime/no_advantage_ratio": 0.94}),
    ("boxes are missing", counts(48, 52, 0), counts(51, 49, 0)),
    ("summaries are cut off", {"summary/clipped_ratio": 0.26}, {"summary/clipped_ratio": 0.24}),
    # The mean over the budgets
    ("summaries resume the reasoning", {"summary/escape_ratio@2": 0.52}, {"summary/escape_ratio@2": 0.48}),
    ("thinking is never finished", {"thinking/finished_ratio": 0.0}, {"thinking/finished_ratio": 0.02}),
    ("thinking is always empty", {"thinking/empty_ratio": 1.0}, {"thinking/empty_ratio": 0.98}),
    ("the verifier gives up", counts(1000, 0, 51), counts(1000, 0, 49)),
    (
        "vLLM and trainer disagree on log-probabilities",
        {"sampling/sampling_logp_difference/mean": 0.101},
        {"sampling/sampling_logp_difference/mean": 0.099},
    ),
    ("the reward is the same at all budgets", rewards(0.7, 0.7), rewards(0.7, 0.7001)),
    # Chance alone tells the budgets apart where no thinking is cut
    ("the reward is the same at all budgets", {"thinking/never_cut_ratio": 1.0}, {"thinking/never_cut_ratio": 0.98}),
    ("entropy has collapsed", {"entropy": 0.07}, {"entropy": 0.09}),
    ("the gradient explodes", {"grad_norm": 3.1}, {"grad_norm": 2.9}),
]


def sound(alarms, logs):
    """(step, warning) of a series of logs, by step."""
    return [(step, warning) for step, metrics in logs for warning in alarms.update(step, metrics)]


def numbers(warning):
    """The numbers of a warning before its suggestion, sorted."""
    return sorted(float(number) for number in re.findall(r"\d+(?:\.\d+)?", warning.split("Suggestion")[0]))


def test_every_alarm_has_a_case():
    assert {name for name, _, _ in CASES} == {alarm.name for alarm in ALARMS}


def test_nothing_is_wrong():
    assert sound(Alarms(make_tokenizer()), [(step, HEALTHY) for step in range(1, 100)]) == []


@pytest.mark.parametrize(("name", "bad", "nearly"), CASES, ids=[f"{case[0]} {i}" for i, case in enumerate(CASES)])
def test_an_alarm_goes_off_once(name, bad, nearly):
    """After 30 healthy updates, once the mean over ten has reached the threshold; once more would be a nuisance."""
    healthy = [(step, HEALTHY) for step in range(1, 31)]
    assert sound(Alarms(make_tokenizer()), healthy + [(step, HEALTHY | nearly) for step in range(31, 70)]) == []
    ((step, warning),) = sound(Alarms(make_tokenizer()), healthy + [(step, HEALTHY | bad) for step in range(31, 70)])
    # The median over ten is that of the bad ones from the sixth on
    assert step == {"the gradient explodes": 36}.get(name, 40)
    (alarm,) = (alarm for alarm in ALARMS if alarm.name == name)
    assert str(step) in warning and "10 updates" in warning
    assert name in warning and alarm.metric in warning and alarm.suggestion in warning


def test_figure_and_threshold_are_named():
    (warning,) = Alarms(make_tokenizer()).update(10, {"summary/clipped_ratio": 0.5})
    assert "`summary/clipped_ratio`" in warning
    # Threshold, figure, step, updates
    assert numbers(warning) == [0.25, 0.5, 10, 10]
    alarms = Alarms(make_tokenizer())
    alarms.update(10, {"entropy": 2.0})
    (warning,) = alarms.update(20, {"entropy": 0.1})
    # The figure 0.1 over 10 updates; the threshold 0.2 is 0.1 times the 2 of the first 10 updates; step 20
    assert "`entropy`" in warning and numbers(warning) == [0.1, 0.1, 0.2, 10, 10, 20]


def test_updates_count_and_not_logs():
    """Means over four updates each: the third completes twelve, the first window of at least ten."""
    clipped = {"summary/clipped_ratio": 1.0}
    ((step, warning),) = sound(Alarms(make_tokenizer()), [(4, clipped), (8, clipped), (12, clipped), (16, clipped)])
    assert step == 12 and "12 updates" in warning
    # Rollouts of sixteen updates are logged once, with the first of these
    reused = [(1, clipped), *((step, {"entropy": 1.0}) for step in range(2, 17)), (17, clipped)]
    ((step, _),) = sound(Alarms(make_tokenizer()), reused)
    assert step == 17


def test_a_mean_over_unequal_stretches():
    """(9 · 0.2 + 1 · 0.65) / 10 = 0.245 is below the threshold; with 0.75 it would be 0.255."""
    assert (
        sound(Alarms(make_tokenizer()), [(9, {"summary/clipped_ratio": 0.2}), (10, {"summary/clipped_ratio": 0.65})])
        == []
    )
    alarms = Alarms(make_tokenizer())
    assert sound(alarms, [(9, {"summary/clipped_ratio": 0.2}), (10, {"summary/clipped_ratio": 0.75})]) != []


def test_one_large_gradient_is_no_explosion():
    """Logged every ten updates, it may be the only one of them."""
    alarms = Alarms(make_tokenizer())
    norms = [0.3, 0.3, 0.3, 90.0, 0.3, 0.3, 90.0, 90.0]
    (found,) = [step for step, _ in sound(alarms, [(10 * i, {"grad_norm": n}) for i, n in enumerate(norms, start=1)])]
    assert found == 80


def test_updates_without_a_signal_are_not_small_gradients():
    norms = [0.0, 0.3] * 20
    assert sound(Alarms(make_tokenizer()), [(i, {"grad_norm": n}) for i, n in enumerate(norms, start=1)]) == []


def test_what_has_no_meaning_is_ignored():
    alarms = Alarms(make_tokenizer())
    one_budget = {"anytime/reward@4": 0.7, "thinking/never_cut_ratio": 1.0}
    evaluation = {f"eval_{name}": 0.0 for name in HEALTHY}
    odd = {"entropy": None, "grad_norm": float("nan"), "loss": "a text", "anytime/reward@4": None}
    rewards_beyond_1 = rewards(-30.0, 12.0)
    for metrics in (one_budget, evaluation, odd, rewards_beyond_1, {}):
        assert sound(alarms, [(step, metrics) for step in range(1, 40)]) == []


def test_zero_rewards_set_off_one_alarm():
    """That they are the same at all budgets and teach nothing follows."""
    metrics = HEALTHY | rewards(0.0, 0.0) | {"anytime/no_advantage_ratio": 1.0}
    ((_, warning),) = sound(Alarms(make_tokenizer()), [(step, metrics) for step in range(1, 40)])
    assert "no reward at any budget" in warning


def test_a_restart_goes_on_in_the_middle_of_a_window():
    logs = [(step, HEALTHY | ({"grad_norm": 9.0, "entropy": 0.01} if step > 25 else {})) for step in range(1, 50)]
    straight = sound(Alarms(make_tokenizer()), logs)
    assert [step for step, _ in straight] == [30, 35]
    for stop in (20, 30, 33, 40):
        first, second = Alarms(make_tokenizer()), Alarms(make_tokenizer())
        sounded = sound(first, logs[:stop])
        second.progress = json.loads(json.dumps(first.progress))
        assert sounded + sound(second, logs[stop:]) == straight


def test_a_run_that_learns():
    """
    60 updates of AR-linear in the learning study (registers, seed 0). In none of its runs did the median gradient of
    ten updates grow more over that of the ten before: to 2.1 times.
    """
    metrics = json.loads((DATA / "learning_run.json").read_text())
    logs = [(i + 1, {name: values[i] for name, values in metrics.items()}) for i in range(60)]
    assert sound(Alarms(make_tokenizer()), logs) == []
    # The medians of updates 21 to 30 and 31 to 40 are 0.052 and 0.046
    exploding = [(step, log | {"grad_norm": log["grad_norm"] * (12 if step > 30 else 1)}) for step, log in logs]
    ((_, warning),) = sound(Alarms(make_tokenizer()), exploding)
    assert "the gradient explodes" in warning


# Samples


def rollout(thinking, summaries, finished=True):
    tokenizer = make_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(text.split()) for text in (thinking, *summaries)]
    return Rollout(
        tokenizer.convert_tokens_to_ids(["user", "1", "2"]),
        Thinking(ids[0], finished, False),
        [min(budget, len(ids[0])) for budget in (2, 4)],
        [(), ()],
        [[summary] for summary in ids[1:]],
    )


def sample_of(name, bad, rollouts):
    alarms = Alarms(make_tokenizer())
    alarms.rollouts = rollouts
    warnings = [warning for _, warning in sound(alarms, [(10, HEALTHY), (20, HEALTHY | bad)])]
    (warning,) = (warning for warning in warnings if name in warning)
    return warning.split("Sample")[1].split("Suggestion")[0]


def shows(sample, prompt, num_tokens, thinking, summary):
    quoted = re.findall("'([^']*)'", sample)
    return quoted == [prompt, thinking, summary] and f"{num_tokens} tokens" in sample


def test_the_sample_shows_what_is_wrong():
    rollouts = [rollout("1 2 3 4 </think>", ["5", "6"]), rollout("3 1 4 1", ["0 0 0 0", "7"], finished=False)]
    # The last budget of the first rollout, where nothing else is asked for
    reward = sample_of("no reward", rewards(0.0, 0.0), rollouts)
    assert shows(reward, "user 1 2", 4, "1 2 3 4", "6")
    clipped = sample_of("cut off", {"summary/clipped_ratio": 1.0}, rollouts)
    assert shows(clipped, "user 1 2", 2, "3 1", "0 0 0 0")
    unfinished = sample_of("never finished", {"thinking/finished_ratio": -0.5}, rollouts)
    assert shows(unfinished, "user 1 2", 4, "3 1 4 1", "7")


def test_the_sample_is_short():
    long = rollout(" ".join("1234567890" * 200), ["9 " * 500, "8 " * 500])
    long.cuts[:] = [1000, 2000]
    long.prompt_ids[:0] = long.thinking.token_ids
    sample = sample_of("no reward", rewards(0.0, 0.0), [long])
    assert len(sample) < 500 and sample.count("[...]") == 3
    assert "user 1 2'" in sample and "2000 tokens" in sample and "'1 2 3" in sample


# Real runs


def biased(end=1.0, eos=3.0, resumes=-50.0, extra_words=()):
    """A random model with a bias to end: traces are cut, finished and given up, and most summaries end early."""
    tokenizer = make_tokenizer(extra_words=extra_words)
    model = make_model(vocab_size=len(tokenizer))
    head = torch.nn.Linear(32, len(tokenizer))
    head.weight = model.lm_head.weight
    head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)), requires_grad=False)
    # A summary that starts to think again would set off an alarm of its own
    for word, value in (("</think>", end), ("<|im_end|>", eos), ("<think>", resumes)):
        head.bias.data[tokenizer.convert_tokens_to_ids(word)] = value
    model.lm_head = head
    return model


def train(tmp_path, caplog, reward=parity_reward, model=None, extra_words=(), callbacks=None, **settings):
    """The warnings of a tiny run."""
    settings = {"max_steps": 11, "max_summary_length": 24, "learning_rate": 1e-4, **settings}
    trainer = tiny_trainer(
        tmp_path,
        model=model or biased(extra_words=extra_words),
        reward_funcs=reward,
        processing_class=make_tokenizer(extra_words=extra_words),
        callbacks=callbacks,
        **settings,
    )
    with caplog.at_level("WARNING", logger="trl_anytime.training.alarms"):
        trainer.train()
    messages = [record.getMessage() for record in caplog.records if record.name == "trl_anytime.training.alarms"]
    return [message.removeprefix("[RANK 0] ") for message in messages if "Suggestion" in message]


def names(warnings):
    return {warning.split(": ")[1] for warning in warnings}


def constant(value):
    return lambda completions, **kwargs: [value] * len(completions)


def growing(completion_ids, trainer_state, **kwargs):
    return [(100.0 if trainer_state.global_step >= 10 else 1.0) * (sum(ids) % 2) for ids in completion_ids]


class TooFast(TrainerCallback):
    """A learning rate out of all proportion, from the eleventh update on."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step >= 10:
            for group in optimizer.param_groups:
                group["lr"] = 0.3


def test_a_run_where_nothing_is_wrong(tmp_path, caplog):
    assert train(tmp_path, caplog, model=biased(end=1.3), max_steps=22) == []


def test_no_reward(tmp_path, caplog):
    (warning,) = train(tmp_path, caplog, reward=constant(0.0))
    assert names([warning]) == {"no reward at any budget"}
    # Figure and threshold, step, updates
    assert numbers(warning.split("Sample")[0]) == [0, 0, 10, 10]
    assert "'<|im_start|> user" in warning and "assistant <think>'" in warning


def test_a_constant_reward(tmp_path, caplog):
    warnings = train(tmp_path, caplog, reward=constant(0.7))
    assert names(warnings) == {"nothing to learn from", "the reward is the same at all budgets"}


@pytest.mark.slow
def test_no_boxes(tmp_path, caplog):
    warnings = train(tmp_path, caplog, reward=MathReward(), max_steps=20)
    assert names(warnings) == {"no reward at any budget", "boxes are missing"}


@pytest.mark.slow
def test_summaries_that_are_cut_off(tmp_path, caplog):
    """Behind a forced cut they resume the reasoning, as far as can be told."""
    warnings = train(tmp_path, caplog, model=biased(eos=2.0), max_summary_length=4)
    assert all("Step 10" in warning for warning in warnings)
    assert names(warnings) == {"summaries are cut off", "summaries resume the reasoning"}


@pytest.mark.slow
def test_summaries_that_resume_the_reasoning(tmp_path, caplog):
    """They end, but often begin to think again."""
    (warning,) = train(tmp_path, caplog, model=biased(end=3.0, resumes=3.0))
    assert names([warning]) == {"summaries resume the reasoning"} and "<think>" in warning.split("Sample")[1]


@pytest.mark.slow
def test_thinking_that_never_ends(tmp_path, caplog):
    warnings = train(tmp_path, caplog, model=biased(end=-50.0))
    assert names(warnings) == {"thinking is never finished"}


@pytest.mark.slow
def test_thinking_that_is_empty(tmp_path, caplog):
    warnings = train(tmp_path, caplog, reward=constant(0.7), model=biased(end=50.0), max_summary_length=4)
    assert {"thinking is always empty", "the reward is the same at all budgets"} <= names(warnings)


@pytest.mark.slow
def test_a_verifier_that_gives_up(tmp_path, caplog):
    """Every summary is the same tower of powers, which a worker gives up."""
    tower = r"\boxed{9^{9^{9^9}}}"
    warnings = train(
        tmp_path, caplog, reward=MathReward(workers=1), extra_words=(tower,), answer_bridge=tower, max_steps=10
    )
    assert "the verifier gives up" in names(warnings) and "boxes are missing" not in names(warnings)


@pytest.mark.slow
def test_entropy_that_collapses(tmp_path, caplog):
    warnings = train(tmp_path, caplog, callbacks=[TooFast()], max_steps=30)
    assert "entropy has collapsed" in names(warnings)


@pytest.mark.slow
def test_a_gradient_that_explodes(tmp_path, caplog):
    warnings = train(tmp_path, caplog, reward=growing, max_steps=21)
    assert names(warnings) == {"the gradient explodes"}


def test_alarms_can_be_switched_off(tmp_path, caplog):
    assert train(tmp_path, caplog, reward=constant(0.0), alarms=False) == []


@pytest.mark.slow
def test_logs_that_are_far_apart(tmp_path, caplog):
    """Rollouts of four updates, logged every seven, which are means."""
    settings = {"steps_per_generation": 2, "num_iterations": 2, "logging_steps": 7, "per_device_train_batch_size": 4}
    warnings = train(tmp_path, caplog, reward=constant(0.0), max_steps=21, **settings)
    (warning,) = (warning for warning in warnings if "no reward at any budget" in warning)
    assert "Step 14" in warning and "14 updates" in warning


@pytest.mark.slow
def test_only_the_main_process_warns_and_a_restart_knows(ranks, tmp_path):
    """Rollouts at steps 1, 5, 9 and 13 are logged at 3, 6, 9 and 15: there a window is full."""
    settings = {"max_steps": 17, "save_total_limit": None, "eval_strategy": "no", "save_steps": 2}
    settings |= {"world_size": 2, "per_device_train_batch_size": 2}
    assert (SETTINGS["logging_steps"], SETTINGS["num_iterations"], SETTINGS["steps_per_generation"]) == (3, 2, 2)

    def said(resume=None):
        ended = ranks.run("train", tmp_path, resume=resume, **settings)
        assert [rank.code for rank in ended] == [0, 0]
        return [rank.output.count("Step 15: summaries are cut off") for rank in ended]

    assert said() == [1, 0]
    assert said(str(tmp_path / "out/checkpoint-14")) == [1, 0]
    assert said(str(tmp_path / "out/checkpoint-16")) == [0, 0]


def test_the_documentation_lists_every_alarm_with_its_threshold():
    thresholds = {row[0]: row[1] for row in table("docs/monitoring.md", "alarm")}
    assert thresholds.keys() == {alarm.name for alarm in ALARMS}
    for alarm in ALARMS:
        figures = [float(figure) for figure in re.findall(r"\d[\d.]*(?:e-\d+)?", thresholds[alarm.name])]
        assert any(figure == pytest.approx(alarm.threshold) for figure in figures), alarm.name


# The end of a short run


def end_of_run(alarms, steps, max_steps, metrics, caplog):
    """The warnings of a run: in `logs` of each step, then at its end."""
    state = TrainerState(global_step=steps, max_steps=max_steps)
    for step in range(1, steps + 1):
        assert alarms.update(step, metrics) == []
    with caplog.at_level("WARNING"):
        alarms.on_train_end(None, state, None)
    return [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]


def test_a_run_shorter_than_a_window_is_judged_at_its_end(caplog):
    bad = HEALTHY | rewards(0.0, 0.0) | {"summary/clipped_ratio": 0.3, "entropy": 0.0}
    warnings = end_of_run(Alarms(make_tokenizer()), 3, 3, bad, caplog)
    # Entropy is compared with the first window, and there is none
    names = {alarm.name for alarm in ALARMS if any(alarm.name in warning for warning in warnings)}
    assert names == {"no reward at any budget", "summaries are cut off"} and len(warnings) == 2
    # Threshold, figure, step, updates
    assert sorted(numbers(warnings[1])) == [0.25, 0.3, 3, 3]


def test_a_healthy_short_run_is_silent(caplog):
    assert end_of_run(Alarms(make_tokenizer()), 3, 3, HEALTHY, caplog) == []


def test_a_run_that_was_stopped_early_is_not_judged(caplog):
    """It is resumed, and its window may fill up."""
    assert end_of_run(Alarms(make_tokenizer()), 3, 100, HEALTHY | rewards(0.0, 0.0), caplog) == []


def test_what_has_gone_off_is_not_repeated_at_the_end(caplog):
    alarms = Alarms(make_tokenizer())
    ((step, _),) = sound(alarms, [(10, HEALTHY | {"summary/clipped_ratio": 1.0})])
    alarms.on_train_end(None, TrainerState(global_step=10, max_steps=10), None)
    assert step == 10 and caplog.records == []
