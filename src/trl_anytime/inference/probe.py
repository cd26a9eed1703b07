"""Probe of a server: it is asked at several thinking budgets, and the tokens of its answers are judged."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..outside.display import for_terminal
from ..outside.tables import aligned
from ..outside.validation import TOKEN_ID, fields, list_of, or_null, string
from ..rollout.encoding import encode
from ..rollout.escapes import EscapeSearch
from ..rollout.http_backend import CompletionClient
from ..rollout.sampling import BUDGET_FIELD, is_clipped
from .anytime_config import AnytimeConfig

QUESTION = (
    "How many ways are there to split the integers 1 through 14 into 7 pairs such that in each pair, the greater "
    "number is at least 2 times the lesser number? Let's think step by step and output the final answer within "
    "\\boxed{}."
)
# Fields of a request that name a budget: for the logits processor of this package, and for vLLM itself
OWN_FIELD, VLLM_FIELD = f"vllm_xargs.{BUDGET_FIELD}", "thinking_token_budget"
# Tokens that a request allows beyond the budget, so that a server that ignores the budget shows it
_HEADROOM = 256
# A reasoning parser splits an answer, and each server has its own name for the trace
_TEXT = or_null(string())
_MESSAGE = fields({"content": _TEXT, "reasoning_content": _TEXT, "reasoning": _TEXT})
_ANSWER = fields(choices=list_of(fields({"token_ids": or_null(list_of(TOKEN_ID))}, message=_MESSAGE), least=1, most=1))


@dataclass(frozen=True)
class ProbeResult:
    """
    Result of asking a server at one budget.

    Args:
        budget (`int`):
            The budget in thinking tokens.
        thinking_tokens (`int`, *optional*):
            Thinking tokens of the answer. `None` if the server refused.
        outcome (`str`):
            `"enforced"` (the trace was cut within the budget), `"not reached"` (it ended by itself before),
            `"ignored"` (it continued beyond) or `"refused"`.
        answered (`bool`):
            Whether an answer came after the trace.
        markers (`str`):
            `"trained"`, or what is wrong with the tokens between trace and answer.
        detail (`str`):
            Further remarks.
        escape (`str`, *optional*):
            How the answer resumes the reasoning behind a cut, see
            [`~trl_anytime.rollout.escapes.EscapeSearch.kind`]. `None` if it does not, or if the trace was not cut.
    """

    budget: int
    thinking_tokens: int | None
    outcome: str
    answered: bool
    markers: str
    detail: str = ""
    escape: str | None = None

    @property
    def passed(self) -> bool:
        """Return whether nothing is wrong."""
        return self.outcome in ("enforced", "not reached") and self.answered and self.markers == "trained"


def judge(token_ids: list[int], budget: int, config: AnytimeConfig, tokenizer: PreTrainedTokenizerBase) -> ProbeResult:
    """
    Judge from the tokens of an answer whether the server kept to a budget.

    Args:
        token_ids (`list[int]`):
            All tokens after the prompt.
        budget (`int`):
            The budget in thinking tokens.
        config ([`AnytimeConfig`]):
            The trained markers and bridges.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
    """
    markers = config.markers
    end = markers.end_of_thinking(token_ids)
    if end is None:
        outcome = "ignored" if len(token_ids) > budget else "not reached"
        ended_by_eos = token_ids[-1:] and token_ids[-1] in config.eos_token_ids
        found = "the trace ended with EOS, not with its marker" if ended_by_eos else "the trace never ended"
        return ProbeResult(budget, len(token_ids), outcome, False, found)

    # Start of the bridge, if it is the trained one
    before_end = markers.truncation_bridge_ids.index(markers.think_end_ids[0])
    start = end - len(markers.think_end_ids) - before_end
    bridge = markers.truncation_bridge_ids
    is_cut = start >= 0 and tuple(token_ids[start : start + len(bridge)]) == bridge
    if bridge == markers.think_end_ids:  # the model's own end looks the same. Some servers count what opens the trace.
        is_cut = start in (budget - 1, budget)
    thinking = start if is_cut else end
    rest = token_ids[start + len(bridge) :] if is_cut else token_ids[end:]
    has_answer_bridge = tuple(rest[: len(markers.answer_bridge_ids)]) == markers.answer_bridge_ids
    summary = rest[len(markers.answer_bridge_ids) :] if has_answer_bridge else rest
    answered = bool(str(tokenizer.decode(summary, skip_special_tokens=True)).strip())

    # A bare end marker at the budget is not part of the trace. It may come from the server or the model.
    outcome = "enforced" if is_cut else "not reached"
    if thinking - (0 if is_cut else len(markers.think_end_ids)) > budget:
        outcome = "ignored"
    elif not is_cut and thinking - len(markers.think_end_ids) == budget:
        outcome = "enforced"
    found, detail = "trained", ""
    if markers.count_think_end(token_ids) > 1:
        found = "the trace ended more than once"
    elif outcome == "enforced" and not is_cut:
        found = f"closed without {markers.truncation_bridge!r}"
    elif is_cut and not has_answer_bridge:
        found = f"no {markers.answer_bridge!r} before the answer"
    elif not has_answer_bridge:
        detail = "it ended by itself, without an answer bridge after it"
    escape = _escape(summary, config, tokenizer) if is_cut else None
    return ProbeResult(budget, thinking, outcome, answered, found, detail, escape)


def _escape(token_ids: list[int], config: AnytimeConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return how an answer resumes the reasoning, of which training would see the first tokens."""
    summary = token_ids[: config.max_summary_length]
    clipped = is_clipped(summary, config.max_summary_length, config.eos_token_ids)
    text = str(tokenizer.decode(summary, skip_special_tokens=True))
    return EscapeSearch(config.markers, tokenizer).kind(summary, text, clipped)


def probe(
    client: CompletionClient,
    config: AnytimeConfig,
    tokenizer: PreTrainedTokenizerBase,
    budgets: list[int],
    budget_field: str = OWN_FIELD,
    question: str = QUESTION,
) -> list[ProbeResult]:
    """
    Ask a server at several budgets through `/v1/chat/completions`.

    Args:
        client ([`CompletionClient`]):
            The server.
        config ([`AnytimeConfig`]):
            The trained markers and bridges.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        budgets (`list[int]`):
            Budgets in thinking tokens.
        budget_field (`str`, *optional*, defaults to `"vllm_xargs.thinking_budget"`):
            Field of the request for the budget. The default is that of [`VLLMThinkingBudget`]. Dots lead into
            objects.
        question (`str`, *optional*):
            Question to ask. It should need a long thinking trace.

    Raises:
        `ConnectionError`: If the server gives no complete answer.
        `ValueError`: If a budget is beyond the server's context, or the tokenizer cannot encode the question or an
            answer.
    """
    messages = config.conversation(question)
    num_prompt_tokens = len(config.prompt_ids(tokenizer, [messages])[0])
    config.check_context(num_prompt_tokens, max(budgets), client.max_model_len, "the server's")
    most = None if client.max_model_len is None else client.max_model_len - num_prompt_tokens
    results = []
    for budget in budgets:
        needed = budget + config.markers.max_bridge_length + config.max_summary_length + _HEADROOM
        body: dict[str, Any] = {
            "model": client.model,
            "messages": messages,
            "max_tokens": needed if most is None else min(needed, most),
            "return_token_ids": True,
            "skip_special_tokens": False,
            "chat_template_kwargs": config.chat_template_kwargs,
            **config.sampling.vllm(),
        }
        *path, name = budget_field.split(".")
        place = body
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(
                    f"`budget_field` must lead into objects, but {part!r} is not one, got {budget_field!r}."
                )
        place[name] = budget
        try:
            answer = client.request("/v1/chat/completions", body, check=_ANSWER)
        except ValueError as error:
            results.append(ProbeResult(budget, None, "refused", False, "-", str(error)))
            continue
        (choice,) = answer["choices"]
        token_ids = choice.get("token_ids")
        if token_ids is None:
            written = _text(choice["message"], config)
            token_ids = encode(tokenizer, written) if written else []
        results.append(judge(token_ids, budget, config, tokenizer))
    return results


def _text(message: dict[str, Any], config: AnytimeConfig) -> str:
    """Return what a model wrote, joined again if the server has split it."""
    reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content") or ""
    if not reasoning or config.markers.think_end in content:
        return reasoning + content
    return f"{reasoning}{config.markers.think_end}{content}" if content else reasoning


def verdict(results: list[ProbeResult], budget_field: str = OWN_FIELD) -> str | None:
    """
    Say what is wrong with a server that was asked by `budget_field`, and what to do.

    Returns `None` if nothing is wrong.
    """
    other = {
        OWN_FIELD: f"Start it as `trl-anytime serve-command` says, or use vLLM's field: --budget-field {VLLM_FIELD}.",
        VLLM_FIELD: f"If `trl-anytime serve-command` started the server, use --budget-field {OWN_FIELD}.",
    }.get(budget_field, "")
    for outcome, message in (
        ("refused", "The server refuses thinking budgets"),
        ("ignored", "The server ignores thinking budgets"),
    ):
        at = [result for result in results if result.outcome == outcome]
        if at:
            budgets = ", ".join(str(result.budget) for result in at)
            return " ".join(filter(None, (f"{message} ({budgets} tokens).", at[0].detail, other)))
    for result in results:
        if result.markers != "trained":
            return f"At {result.budget} tokens: {result.markers}."
        if not result.answered:
            return f"At {result.budget} tokens, no answer came."
    if not any(result.outcome == "enforced" for result in results):
        return "No trace reached its budget, so nothing is proved. Use smaller --budgets, or a harder --question."
    return None


def escapes(results: list[ProbeResult]) -> str | None:
    """Say how many answers behind a cut resume the reasoning, or return `None` if none does."""
    cut = [result for result in results if result.outcome == "enforced"]
    resumed = [f"{result.budget} ({result.escape})" for result in cut if result.escape is not None]
    if not resumed:
        return None
    return f"{len(resumed)} of {len(cut)} answers behind a cut resume the reasoning: at {', '.join(resumed)} tokens."


def results_table(results: list[ProbeResult]) -> str:
    """Show the results as a table."""
    rows = [["budget", "thinking", "outcome", "answered", "escape", "markers"]]
    rows += [
        [
            str(result.budget),
            "-" if result.thinking_tokens is None else str(result.thinking_tokens),
            result.outcome,
            "yes" if result.answered else "no",
            result.escape or "-",
            for_terminal(
                f"{result.markers}{f' ({result.detail})' if result.detail and result.passed else ''}",
                one_line=True,
            ),
        ]
        for result in results
    ]
    return aligned(rows, left=(5,))
