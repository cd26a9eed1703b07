"""A session with a model that thinks: it answers at any time, thinks on, and can be saved and resumed."""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..outside.validation import integer
from ..rollout.http_backend import CompletionClient
from ..rollout.sampling import Sampling
from ..rollout.types import Rollout
from .anytime_config import AnytimeConfig
from .generate import AnytimeOutput, BudgetAnswer, context_length, find_config, is_transformers_model
from .session_backends import SessionBackend, Trace, derived_seed
from .session_requests import EngineSession, ServerSession
from .session_state import MOST_SEED, SessionState
from .session_transformers import TransformersSession

_SETTINGS = ("markers", "sampling", "max_summary_length", "eos_token_ids")


class AnytimeSession:
    """
    Thinking about one question that can be paused, answered from, saved and resumed.

    Where thinking pauses does not change the trace, and neither do answers. Each gets the tokens of the uninterrupted
    run.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `vllm.LLM` or [`CompletionClient`]):
            The model, an engine, or a server.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        prompt (`str` or `list[dict]`):
            The question: a text, which is used unchanged, or a conversation.
        config ([`AnytimeConfig`], *optional*):
            Anytime config of the model. Defaults to [`AnytimeConfig.from_pretrained`].
        sampling ([`Sampling`], *optional*):
            Sampling settings. Defaults to the config's.
        max_summary_length (`int`, *optional*):
            Most tokens of an answer. Defaults to the config's.
        seed (`int`, *optional*):
            Seed of the draws, of the trace and of the answers. Defaults to a random one.

    Attributes:
        config ([`AnytimeConfig`]):
            The settings in use.

    Raises:
        `ValueError`: If the model has no thinking markers, or the prompt leaves no room for an answer.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from trl_anytime import AnytimeSession

    >>> model = AutoModelForCausalLM.from_pretrained("outputs/quickstart/model")
    >>> tokenizer = AutoTokenizer.from_pretrained("outputs/quickstart/model")
    >>> session = AnytimeSession(model, tokenizer, [{"role": "user", "content": "a. g. hf ca bd fb e. de h"}])
    >>> session.think(4)
    >>> session.answer().answers[0]
    >>> session.think(40)
    >>> session.answer().answers[0]
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Any,
        *,
        config: AnytimeConfig | None = None,
        sampling: Sampling | None = None,
        max_summary_length: int | None = None,
        seed: int | None = None,
    ):
        config = find_config(model, tokenizer) if config is None else config
        config = replace(
            config,
            sampling=sampling or config.sampling,
            max_summary_length=max_summary_length or config.max_summary_length,
        )
        (prompt_ids,) = config.prompt_ids(tokenizer, [prompt])
        if seed is None:
            seed = secrets.randbelow(MOST_SEED)
        integer(0, MOST_SEED)(seed, "seed")
        self._open(model, tokenizer, config, prompt_ids, seed)

    def _open(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: AnytimeConfig,
        prompt_ids: list[int],
        seed: int,
        state: SessionState | None = None,
    ) -> None:
        self.config = config = config.with_tokenizer(tokenizer)
        self._tokenizer, self._seed = tokenizer, seed
        self._context = context_length(model)
        config.check_context(len(prompt_ids), 0, self._context, "the model's")
        if state is None:
            self._trace, self._answered = Trace(prompt_ids, config), (0, 0)
        else:
            self._trace = Trace(prompt_ids, config, state.token_ids, state.ahead)
            self._answered = len(state.token_ids), state.answers_here
        self._backend = _backend(model, config, seed, self._context)

    @property
    def _answers_here(self) -> int:
        """Return how many answers were given since the last token."""
        place, number = self._answered
        return number if place == len(self._trace.token_ids) else 0

    @property
    def token_ids(self) -> list[int]:
        """Return the tokens of the trace so far."""
        return list(self._trace.token_ids)

    @property
    def thinking(self) -> str:
        """Return the text of the trace so far."""
        return str(self._tokenizer.decode(self._trace.token_ids))

    @property
    def ended(self) -> bool:
        """Return whether the trace has ended by itself."""
        return self._trace.ended

    @property
    def room(self) -> int | None:
        """Return how many more tokens of thinking the context can hold, or `None` if that is not known."""
        if self._context is None:
            return None
        around = self.config.markers.max_bridge_length + self.config.max_summary_length
        return max(self._context - len(self._trace.all_ids) - around, 0)

    def think(self, tokens: int, on_tokens: Callable[[list[int]], bool | None] | None = None) -> bool:
        """
        Go on thinking.

        An interruption, such as Ctrl-C or a server that fails, loses nothing. The same call goes on.

        Args:
            tokens (`int`):
                Most tokens to add to the trace.
            on_tokens (`Callable`, *optional*):
                Function that gets the new token ids as they come. If it returns `True`, thinking pauses.

        Returns:
            `bool`: whether the trace has ended by itself. Then there is nothing more to think.

        Raises:
            `ValueError`: If so many tokens are beyond the context. Nothing is added then.
            `ConnectionError`: If a server fails.
        """
        integer(1)(tokens, "tokens")
        if self.ended:
            return True
        room = self.room
        if room is not None and tokens > room:
            whole = f"`think({room})` fills it" if room else "It is full, so answer now"
            raise ValueError(
                f"{tokens} more tokens of thinking do not fit into the model's context of {self._context} tokens. "
                f"Prompt and thinking have {len(self._trace.all_ids)}, and the bridges and an answer need up to "
                f"{self.config.markers.max_bridge_length + self.config.max_summary_length}. {whole}."
            )

        def show(new: list[int]) -> bool:
            return on_tokens is not None and on_tokens(new) is True

        self._backend.think(self._trace, tokens, room, None if on_tokens is None else show)
        return self.ended

    def answer(self, num: int = 1) -> BudgetAnswer:
        """
        Answer from the present state, without disturbing it.

        The trace is cut here, or was ended by itself. The bridge follows, then the answer. With greedy decoding this
        is the answer of [`anytime_generate`] at a budget of so many tokens. Answers are drawn with seeds of their own,
        which depend on the place and on how many answers were given there.

        Args:
            num (`int`, *optional*, defaults to `1`):
                Number of answers.

        Returns:
            [`BudgetAnswer`]: the answers. Its budget is the length of the trace.
        """
        integer(1)(num, "num")
        thinking, budget = self._trace.thinking(), len(self._trace.token_ids)
        cut, bridge = thinking.cut(budget, self.config.markers)
        seed = derived_seed(self._seed, "answer", budget, self._answers_here)
        summaries = self._backend.answer(self._trace, bridge, num, seed)
        self._answered = budget, self._answers_here + num
        rollout = Rollout(self._trace.prompt_ids, thinking, [cut], [bridge], [summaries])
        (answer,) = AnytimeOutput.from_rollout(
            rollout, replace(self.config, budgets=[budget]), self._tokenizer
        ).answers
        return answer

    def state(self, cache: bool = True) -> SessionState:
        """
        Return all that is needed to resume.

        Args:
            cache (`bool`, *optional*, defaults to `True`):
                Whether to include the keys and values of a model of transformers. They are shared with the session,
                not copied.
        """
        return SessionState(
            prompt_ids=list(self._trace.prompt_ids),
            token_ids=self.token_ids,
            ahead=list(self._trace.ahead),
            seed=self._seed,
            answers_here=self._answers_here,
            config=self.config.to_values(),
            made_by=_made_by(self._backend, self._tokenizer),
            tensors=self._backend.tensors() if cache else {},
        )

    def save(self, path: str | Path, cache: bool = True) -> Path:
        """
        Write the state into a file. The session can go on.

        Args:
            path (`str` or `Path`):
                The file. An older one is replaced only when the new one is complete.
            cache (`bool`, *optional*, defaults to `True`):
                Whether the file gets the keys and values of a model of transformers. Without them it is small, and
                resuming takes about as long as the thinking took.

        Raises:
            `OSError`: If the file cannot be written.
        """
        return self.state(cache).save(path)

    @classmethod
    def resume(
        cls,
        source: str | Path | SessionState,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        config: AnytimeConfig | None = None,
        exact: bool = True,
    ) -> "AnytimeSession":
        """
        Go on with a session that was saved.

        Args:
            source (`str`, `Path` or [`SessionState`]):
                A file that a session was saved to, or a state.
            model, tokenizer:
                The same as those of the session.
            config ([`AnytimeConfig`], *optional*):
                Settings that the session must have. By default it goes on with its own, whatever they are.
            exact (`bool`, *optional*, defaults to `True`):
                Whether the trace must go on with the tokens of the uninterrupted run. If not, what changes only the
                last bits of numbers may differ: the device, the data type, versions of libraries.

        Raises:
            `ValueError`: If the file is damaged, or the model, the tokenizer or the settings are others. The message
                says which. Also if `exact` cannot be kept.
            `OSError`: If the file is missing or not readable.
        """
        state = source if isinstance(source, SessionState) else SessionState.load(source)
        where = "The state" if isinstance(source, SessionState) else str(source)
        saved = AnytimeConfig.from_values(state.config, where)
        if config is not None:
            _refuse_other_settings(config, saved, where)
        session = cls.__new__(cls)
        session._open(model, tokenizer, saved, list(state.prompt_ids), state.seed, state)
        differs = _refuse_others(state.made_by, _made_by(session._backend, tokenizer), where, exact)
        session._backend.restore(session._trace, {} if differs else state.tensors)
        return session


def _backend(model: Any, config: AnytimeConfig, seed: int, context: int | None) -> SessionBackend:
    if isinstance(model, CompletionClient):
        return ServerSession(model, config, seed)
    if is_transformers_model(model):
        return TransformersSession(model, config, seed, context)
    return EngineSession(model, config, seed)


def _made_by(backend: SessionBackend, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what says which backend, model and tokenizer a session has."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "backend": backend.name,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "model": backend.identity(),
        "numerics": backend.numerics(),
    }


def _refuse_other_settings(config: AnytimeConfig, saved: AnytimeConfig, where: str) -> None:
    differing = [
        f"`{name}` was {_of(saved, name)} and is {_of(config, name)}"
        for name in _SETTINGS
        if _of(saved, name) != _of(config, name)
    ]
    if differing:
        raise ValueError(
            f"{where} was saved with other settings: {'; '.join(differing)}. Resume with the settings of then, or "
            "begin a new session."
        )


def _of(config: AnytimeConfig, name: str) -> Any:
    return config.to_values()[name]


def _refuse_others(then: dict[str, Any], now: dict[str, Any], where: str, exact: bool) -> bool:
    """Refuse another backend, model or tokenizer, and return whether anything else differs."""
    if then["backend"] != now["backend"]:
        raise ValueError(
            f"{where} was saved by the backend {then['backend']!r}, and this is {now['backend']!r}. Each draws and "
            "rounds in its own way. Resume with the same one."
        )
    if then["model"] != now["model"]:
        raise ValueError(
            f"{where} was saved with another model: {_differing(then['model'], now['model'])}. Load the model of "
            "then, or begin a new session."
        )
    if then["tokenizer"] != now["tokenizer"]:
        raise ValueError(
            f"{where} was saved with a tokenizer of another vocabulary. Load the tokenizer that belongs to the model."
        )
    if then["numerics"] == now["numerics"]:
        return False
    if exact:
        raise ValueError(
            f"{where} cannot go on with the tokens of an uninterrupted run: "
            f"{_differing(then['numerics'], now['numerics'])}. Resume as it was saved, or pass `exact=False`."
        )
    return True


def _differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(
        f"`{name}` was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )
