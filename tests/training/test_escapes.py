"""Escapes in training: a model that is made to resume its reasoning, with exact numbers."""

import pytest

from tests.support.tiny import graded_trainer, make_tokenizer
from trl_anytime.rollout.backend import Generation
from trl_anytime.rollout.types import Rollout, Thinking

BOXES = tuple(f"\\boxed{{{digit}}}" for digit in range(10))
TOKENIZER = make_tokenizer(extra_words=BOXES)
GOOD, EMPTY = r"\boxed{1} <|im_end|>", "<|im_end|>"
RESUMED = {
    "unanswered": "so so so so",
    "reopened": r"<think> \boxed{1} <|im_end|>",
    "closed twice": r"\boxed{1} </think> <|im_end|>",
    "contradicted": r"\boxed{1} \boxed{2} <|im_end|>",
}


def ids(words):
    return TOKENIZER.convert_tokens_to_ids(words.split())


class Scripted(Generation):
    """Traces and summaries as they are written down, by the number of the rollout."""

    def __init__(self, traces, summaries):
        super().__init__()
        self.traces, self.summaries = traces, summaries

    def roll_out(self, prompt_ids, settings):
        rollouts = []
        for i, prompt in enumerate(prompt_ids):
            trace = Thinking.from_tokens(ids(self.traces[i % 4]), settings.markers, settings.eos_token_ids)
            texts = self.summaries[i % 4] if settings.num_summaries == 2 else [at[:1] for at in self.summaries[i % 4]]
            summaries = [[ids(words) for words in at_budget] for at_budget in texts[: len(settings.budgets)]]
            rollouts.append(Rollout.from_budgets(list(prompt), trace, settings.budgets, settings.markers, summaries))
        return rollouts


LONG = "1 2 3 4 5 6 7 8 9"
TRACES = [LONG, "1 2 </think>", "1 2 3 4 </think>", "1 2 3 4 5 6 7 <|im_end|>"]
# Two summaries at each of the budgets 3, 6 and 9
SUMMARIES = [
    [[RESUMED["unanswered"], RESUMED["reopened"]], [RESUMED["contradicted"], GOOD], [GOOD, GOOD]],
    [[RESUMED["unanswered"]] * 2] * 3,  # it ended by itself, so nothing is counted
    [[RESUMED["closed twice"], EMPTY], [RESUMED["reopened"]] * 2, [GOOD, GOOD]],  # cut at 3 alone
    [[GOOD, GOOD], [GOOD, RESUMED["unanswered"]], [RESUMED["unanswered"], GOOD]],  # closed by force at 9, too
]
# By hand, of the forced rollouts: at 3 (2 + 1 + 0) of 6, at 6 (1 + 1) of 4, at 9 (0 + 1) of 4
RATIOS = {3: 3 / 6, 6: 2 / 4, 9: 1 / 4}


def trained(tmp_path, summaries=SUMMARIES, traces=TRACES, **settings):
    trainer = graded_trainer(tmp_path, max_steps=1, eval_budgets=[3, 6, 9], **settings)
    trainer.generation = Scripted(traces, summaries)
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def ratios(log, prefix=""):
    name = f"{prefix}summary/escape_ratio@"
    return {int(key.removeprefix(name)): value for key, value in log.items() if key.startswith(name)}


def test_the_ratio_by_hand(tmp_path):
    logs = trained(tmp_path)
    assert ratios(logs[0]) == pytest.approx(RATIOS)
    # An evaluation has the first summary of each: at 3 two of three, at 6 and 9 one of two
    (evaluated,) = (log for log in logs if "eval_anytime/auc" in log)
    assert ratios(evaluated, "eval_") == pytest.approx({3: 2 / 3, 6: 1 / 2, 9: 1 / 2})


def test_without_forced_cuts_there_is_no_ratio(tmp_path):
    logs = trained(tmp_path, traces=["1 2 </think>"] * 4)
    assert all(not ratios(log, prefix) for log in logs for prefix in ("", "eval_"))
