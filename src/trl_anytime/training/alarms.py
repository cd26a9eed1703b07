"""Alarms: warn once when training goes wrong in one of several known ways, with a sample and a suggestion."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from accelerate.logging import get_logger
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..evaluation.zeros import CLIPPED, ESCAPED, NO_BOX
from ..rollout.types import Rollout

logger = get_logger(__name__)

# Updates that a figure is averaged over. One or two hard batches raise no alarm, and a run has hundreds of updates.
WINDOW = 10
# A ratio at or above this counts as always, at or below 1 - this as never
ALWAYS = 0.99
# Largest spread of rewards that count as equal at all budgets. Their means differ by rounding only.
SAME = 1e-6
# Share of the rollouts whose tokens all have advantage 0. It rises as problems get solved. In a run of the learning
# study that reached a reward of .98 it rose to .86 over ten updates.
NO_ADVANTAGE = 0.95
# Share of the graded answers that timed out. They score 0 whatever they say. That noise is as large as a typical gain.
TIMEOUTS = 0.05
# Mean difference between vLLM's and the trainer's log-probabilities, in nats per token. With bfloat16 on both sides,
# 0.01 to 0.04 is reported. At 0.1 a token's ratio is off by half of what PPO's clipping allows.
LOGPROB_DIFFERENCE = 0.1
# Entropy relative to the first window. Training lowers it, and good runs keep a quarter
# (https://huggingface.co/papers/2505.22617). The quickstart keeps four tenths.
ENTROPY_LEFT = 0.1
# Median gradient norm relative to the window before. It was at most 2.1 in the runs of the learning study.
GRAD_NORM_GROWTH = 10.0
# Fewest norms in a window. A log holds the norm of one update only, and a single large one may be chance.
GRAD_NORMS = 3

_PIECE = 80  # characters shown of a prompt, of each end of a trace and of a summary, a few lines in all


@dataclass(frozen=True)
class Alarm:
    """
    Describe one way in which training goes wrong.

    Args:
        name (`str`):
            What is wrong.
        metric (`str`):
            Description of the figure.
        figure (`Callable`):
            Reads the figure from one log. Returns `None` if the log does not have it.
        threshold (`float`):
            The alarm goes off if the mean figure of the last window is at least this.
        suggestion (`str`):
            What to change.
        low (`bool`, *optional*, defaults to `False`):
            Whether the alarm goes off if the figure is at most `threshold` instead.
        compared_with (`str`, *optional*):
            `"first"`: `threshold` is a multiple of the mean over the first window. `"before"`: `threshold` is a
            multiple of the median over the window before the last, and the figure is a median too.
        shows (`Callable`, *optional*):
            Scores how well a rollout and one of its summaries (token ids and text) show what is wrong. If not set,
            the first summary is shown.
    """

    name: str
    metric: str
    figure: Callable[[Mapping[str, float]], float | None]
    threshold: float
    suggestion: str
    low: bool = False
    compared_with: str | None = None
    shows: Callable[[Rollout, list[int], str], float] = lambda rollout, ids, text: 0

    @property
    def least_values(self) -> int:
        """Return the fewest values that a window must have, whatever number of updates they stand for."""
        return GRAD_NORMS if self.compared_with == "before" else 1


# Figures in one log


def _rewards(metrics: Mapping[str, float]) -> list[float]:
    return [value for name, value in metrics.items() if name.startswith("anytime/reward@")]


def _largest_reward(metrics: Mapping[str, float]) -> float | None:
    return max(map(abs, _rewards(metrics)), default=None)


def _reward_spread(metrics: Mapping[str, float]) -> float | None:
    """
    Return the largest minus the smallest reward, as a share of the largest.

    The spread is 0 if no trace is cut, because summaries then differ by chance alone.
    """
    rewards = _rewards(metrics)
    if len(rewards) < 2 or not any(rewards):  # rewards of 0 have an alarm of their own
        return None
    if metrics.get("thinking/never_cut_ratio", 0) >= ALWAYS:
        return 0.0
    return (max(rewards) - min(rewards)) / max(map(abs, rewards))


def _no_advantage(metrics: Mapping[str, float]) -> float | None:
    # Rewards of 0 have an alarm of their own
    return metrics.get("anytime/no_advantage_ratio") if any(_rewards(metrics)) else None


def _counts(metrics: Mapping[str, float], counter: str) -> float:
    """Sum one of the counters that `trl_anytime.rewards` log over all reward functions."""
    return sum(n for name, n in metrics.items() if name.startswith("rewards/") and name.endswith(f"/{counter}"))


def _no_box(metrics: Mapping[str, float]) -> float | None:
    missing = _counts(metrics, "no_box")
    looked_at = missing + _counts(metrics, "graded") + _counts(metrics, "too_long")
    return missing / looked_at if looked_at else None


def _escapes(metrics: Mapping[str, float]) -> float | None:
    ratios = [value for name, value in metrics.items() if name.startswith("summary/escape_ratio@")]
    return sum(ratios) / len(ratios) if ratios else None


def _timeouts(metrics: Mapping[str, float]) -> float | None:
    graded = _counts(metrics, "graded")
    return _counts(metrics, "timeouts") / graded if graded else None


def _grad_norm(metrics: Mapping[str, float]) -> float | None:
    return metrics.get("grad_norm") or None  # 0: an update without a signal


def _logged(name: str) -> Callable[[Mapping[str, float]], float | None]:
    return lambda metrics: metrics.get(name)


ALARMS = (
    Alarm(
        "no reward at any budget",
        "the largest `anytime/reward@…`",
        _largest_reward,
        0.0,
        "Check in the sample whether the reward function would recognise a correct answer. If it would, train on "
        "problems that this model can sometimes solve",
        low=True,
    ),
    Alarm(
        "nothing to learn from",
        "`anytime/no_advantage_ratio`",
        _no_advantage,
        NO_ADVANTAGE,
        "Train on problems that the model solves sometimes, neither always nor never",
    ),
    Alarm(
        "boxes are missing",
        r"the share of summaries without \boxed{} (`no_box`)",
        _no_box,
        NO_BOX,
        r"End every prompt with the request to put the final answer within \boxed{}",
        shows=lambda rollout, ids, text: "\\boxed" not in text,
    ),
    Alarm(
        "summaries are cut off",
        "`summary/clipped_ratio`",
        _logged("summary/clipped_ratio"),
        CLIPPED,
        "Raise `max_summary_length`",
        shows=lambda rollout, ids, text: len(ids),
    ),
    Alarm(
        "summaries resume the reasoning",
        "the mean `summary/escape_ratio@…`",
        _escapes,
        ESCAPED,
        "Look at the sample. If it goes on thinking, set a `truncation_bridge` that the model knows, or begin with "
        "longer budgets. If it is a good answer that is cut off, raise `max_summary_length`",
        shows=lambda rollout, ids, text: len(ids) * (not rollout.thinking.finished),
    ),
    Alarm(
        "thinking is never finished",
        "`thinking/finished_ratio`",
        _logged("thinking/finished_ratio"),
        1 - ALWAYS,
        "Raise the last of `budgets`. If the sample ends its thinking with another marker, set `think_end` to it",
        low=True,
        shows=lambda rollout, ids, text: not rollout.thinking.finished,
    ),
    Alarm(
        "thinking is always empty",
        "`thinking/empty_ratio`",
        _logged("thinking/empty_ratio"),
        ALWAYS,
        "Check in the sample whether the chat template closes the thinking. If it does, change "
        "`chat_template_kwargs`. If not, start from a model that thinks",
        shows=lambda rollout, ids, text: -len(rollout.thinking.token_ids),
    ),
    Alarm(
        "the verifier gives up",
        "the share of graded answers that timed out (`timeouts`)",
        _timeouts,
        TIMEOUTS,
        "Give `MathReward` more `workers`. If that does not help, raise its `cpu_limit`",
    ),
    Alarm(
        "vLLM and trainer disagree on log-probabilities",
        "the mean difference per token (`sampling/sampling_logp_difference/mean`)",
        _logged("sampling/sampling_logp_difference/mean"),
        LOGPROB_DIFFERENCE,
        "Make vLLM compute what the trainer does. Use the same dtype, no quantization, `top_p=1`, `top_k=0` and no "
        "`min_p`",
    ),
    Alarm(
        "the reward is the same at all budgets",
        "the spread of `anytime/reward@…` as a share of the largest",
        _reward_spread,
        SAME,
        "If traces end before the first of `budgets`, lower it. Otherwise check that the reward function reads the "
        "completion",
        low=True,
    ),
    Alarm(
        "entropy has collapsed",
        "`entropy`",
        _logged("entropy"),
        ENTROPY_LEFT,
        "Lower `learning_rate`, or set `entropy_coef`",
        low=True,
        compared_with="first",
    ),
    Alarm(
        "the gradient explodes",
        "the median `grad_norm`",
        _grad_norm,
        GRAD_NORM_GROWTH,
        "Lower `learning_rate`",
        compared_with="before",
    ),
)


@dataclass
class _History:
    """
    Hold the values of one figure.

    Args:
        last_step (`int`):
            Step of the last value.
        values (`list[tuple[int, float]]`):
            Pairs of a number of updates and the value that stands for them. Only values still needed are kept.
        first (`float`, *optional*):
            Mean over the first window.
    """

    last_step: int = 0
    values: list[tuple[int, float]] = field(default_factory=list)
    first: float | None = None


class Alarms(TrainerCallback, ExportableState):
    """
    Watch what is logged and warn once for each alarm.

    A logged value counts as the mean over all updates since the previous log. The progress of the alarms is saved in
    `trainer_state.json`, and a resumed run continues from there. Only the main process watches.
    `trainer.remove_callback(Alarms)` switches all alarms off.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Decodes the sample. If not set, it is taken from the trainer when training begins.

    Attributes:
        rollouts (`Sequence[Rollout]`):
            Rollouts that the sample is taken from. If there are none, no sample is shown.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.rollouts: Sequence[Rollout] = ()
        self._tokenizer = tokenizer
        self._forget()

    def _forget(self) -> None:
        self._histories = {alarm.name: _History() for alarm in ALARMS}
        self._gone_off: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, processing_class: Any = None, **kwargs: Any) -> None:
        """Reset the alarms, or restore them from a checkpoint's `trainer_state.json`."""
        self._tokenizer = self._tokenizer or processing_class
        self._forget()
        # The checkpoint of a run without alarms has no entry, and transformers needs one to save the state
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self.progress = saved["attributes"]["progress"]

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Warn if an alarm goes off."""
        if state.is_world_process_zero and logs is not None:
            for warning in self.update(state.global_step, logs):
                logger.warning(warning)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge a run that was too short for a window by the updates that it had."""
        if state.is_world_process_zero and state.global_step == state.max_steps < WINDOW:
            for warning in self.judge_short_run(state.global_step):
                logger.warning(warning)

    def judge_short_run(self, step: int) -> list[str]:
        """
        Return the warnings of a run that ends before a window is full.

        All its updates count as the window. Alarms that compare two windows stay silent.

        Args:
            step (`int`):
                Optimiser steps of the run.
        """
        warnings = []
        for alarm in ALARMS:
            history = self._histories[alarm.name]
            if alarm.compared_with is None and alarm.name not in self._gone_off and history.values:
                warnings += self._judge(alarm, history, step, updates=sum(count for count, _ in history.values))
        return warnings

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """
        Add one log, and return the warnings that follow from it.

        Args:
            step (`int`):
                Optimiser steps so far.
            metrics (`Mapping[str, Any]`):
                Logged metrics. Those of an evaluation and values that are not numbers are ignored.

        Returns:
            `list[str]`: one warning per alarm that goes off.
        """
        numbers = {
            name: float(value)
            for name, value in metrics.items()
            if isinstance(value, int | float) and not math.isnan(value)
        }
        warnings = []
        for alarm in ALARMS:
            value = alarm.figure(numbers)
            if value is None or alarm.name in self._gone_off:
                continue
            history = self._histories[alarm.name]
            history.values.append((step - history.last_step, value))
            history.last_step = step
            warnings += self._judge(alarm, history, step, WINDOW)
        return warnings

    def _judge(self, alarm: Alarm, history: _History, step: int, updates: int) -> list[str]:
        """Return the warning if an alarm goes off over the last `updates` updates, otherwise none."""
        finding = _finding(alarm, history, updates)
        if finding is None:
            return []
        self._gone_off.append(alarm.name)
        return [f"Step {step}: {finding}.{self._sample(alarm)} Suggestion: {alarm.suggestion}."]

    def _sample(self, alarm: Alarm) -> str:
        """
        Describe the summary that shows the alarm best.

        Only the first summary at each budget is considered. Among equals, the last budget wins.
        """
        if not self.rollouts or self._tokenizer is None:
            return ""
        places = [(rollout, j) for rollout in self.rollouts for j in reversed(range(len(rollout.cuts)))]
        summaries = [rollout.summaries[j][0] for rollout, j in places]
        texts = self._tokenizer.batch_decode(summaries)
        best = max(range(len(places)), key=lambda i: alarm.shows(places[i][0], summaries[i], texts[i]))
        (rollout, j), summary = places[best], texts[best]
        cut = rollout.cuts[j]
        prompt, thinking = self._tokenizer.batch_decode([rollout.prompt_ids, rollout.thinking.token_ids[:cut]])
        if len(prompt) > _PIECE:
            prompt = f"[...] {prompt[-_PIECE:]}"
        if len(thinking) > 2 * _PIECE:
            thinking = f"{thinking[:_PIECE]} [...] {thinking[-_PIECE:]}"
        if len(summary) > _PIECE:
            summary = f"{summary[:_PIECE]} [...]"
        return f" Sample: prompt {prompt!r}, {cut} tokens of thinking {thinking!r}, summary {summary!r}."

    def state(self) -> dict[str, Any]:
        """Return what transformers writes into `trainer_state.json`."""
        return {"args": {}, "attributes": {"progress": self.progress}}

    @property
    def progress(self) -> dict[str, Any]:
        """Return the alarms that have gone off and the values that later windows need, in plain types."""
        return {
            "gone_off": list(self._gone_off),
            "histories": {name: [h.last_step, list(h.values), h.first] for name, h in self._histories.items()},
        }

    @progress.setter
    def progress(self, saved: Mapping[str, Any]) -> None:
        self._gone_off = list(saved["gone_off"])
        self._histories |= {name: _History(*history) for name, history in saved["histories"].items()}


def _finding(alarm: Alarm, history: _History, window: int) -> str | None:
    """
    Describe what is wrong, if the last window is full and its figure has reached the threshold.

    A window is full when its values stand for `window` updates.

    Values that no later window needs are dropped from `history`.
    """
    last = _last_window(history.values, alarm.least_values, window)
    if not last:
        return None
    updates = sum(count for count, _ in last)
    figure = sum(count * value for count, value in last) / updates
    threshold, multiple = alarm.threshold, ""
    if alarm.compared_with == "before":
        before = _last_window(history.values[: -len(last)], alarm.least_values, window)
        if not before:
            return None
        history.values = before + last
        figure, threshold = (median(value for _, value in part) for part in (last, before))
        threshold *= alarm.threshold
        multiple = (
            f", which is {alarm.threshold:g} times that of the {sum(count for count, _ in before)} updates before"
        )
    else:
        history.values = last
    if alarm.compared_with == "first":
        history.first = figure if history.first is None else history.first
        threshold *= history.first
        multiple = f", {alarm.threshold:g} times that of the first {WINDOW} updates"
    if figure > threshold if alarm.low else figure < threshold:
        return None
    return (
        f"{alarm.name}: {alarm.metric} was {figure:.3g} over the last {updates} updates. The alarm goes off at "
        f"{threshold:.3g} or {'less' if alarm.low else 'more'}{multiple}"
    )


def _last_window(values: list[tuple[int, float]], least_values: int, window: int) -> list[tuple[int, float]]:
    """Return the last values that stand for at least `window` updates, or none if there are too few."""
    updates = 0
    for length, (count, _) in enumerate(reversed(values), start=1):
        updates += count
        if updates >= window and length >= least_values:
            return values[-length:]
    return []
