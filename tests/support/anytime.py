"""A config for the models of tiny.py, with prompts and traces that meet its markers."""

from trl_anytime import AnytimeConfig, Sampling, anytime_generate
from trl_anytime.rollout.markers import ThinkingMarkers

GREEDY = Sampling(temperature=0)
PROMPTS = ["assistant answer so 0 1 2", "3 4", "5 <|im_start|> assistant answer", "so so 2", "user"]


def make_markers(think_end=(5,), truncation_bridge=(9,), answer_bridge=(8,)):
    """Markers that consist of any tokens. The text of a token is its number where the end has several."""
    think_end = tuple(think_end)
    text = "".join(f"<{token}>" for token in think_end) if len(think_end) > 1 else "</think>"
    markers = ThinkingMarkers(
        text, think_end, f"so {text}", (*truncation_bridge, *think_end), "answer", tuple(answer_bridge)
    )
    return markers.with_token_bytes(lambda token: f"<{token}>".encode()) if markers.in_text else markers


def make_anytime_config(think_end=(5,), budgets=(3, 7, 11, 12)):
    """Bridges as in tiny.make_config; `think_end` may be a usual token, so that traces end."""
    markers = make_markers(think_end)
    budgets = list(budgets)
    return AnytimeConfig(markers, budgets, [1 / len(budgets)] * len(budgets), 4, GREEDY, [2])


def usual_token(model, tokenizer, position=4):
    """A token that a greedy thinking has at some position: as a marker, it ends that thinking."""
    outputs = anytime_generate(model, tokenizer, PROMPTS, config=make_anytime_config((19, 19, 19)))
    traces = [output.rollout.thinking.token_ids for output in outputs]
    return next(ids[position] for ids in traces if len(ids) > position + 1)


def expected_tokens(output, j=0):
    """
    Thinking, bridge and answer at budget j, closed by EOS where the answer has reached its limit. A trace that
    ends with EOS ends the row: no reward comes after it in training either.
    """
    rollout = output.rollout
    if rollout.thinking.ended_with_eos and rollout.cuts[j] == len(rollout.thinking.token_ids):
        return rollout.thinking.token_ids
    tokens = [*rollout.thinking.token_ids[: rollout.cuts[j]], *rollout.bridges[j], *rollout.summaries[j][0]]
    return tokens if tokens[-1] == 2 else [*tokens, 2]
