"""A session at a terminal: thinking streams, Enter asks for an answer, thinking goes on."""

import os
import queue
import sys
import threading
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from ..outside.display import for_terminal
from .generate import BudgetAnswer
from .session import AnytimeSession
from .streaming import EscapedStreamer

_AT_ONCE = 4096  # tokens of one call, where the context is not known
_LEAVE = ("q", "quit", "exit")
HELP = "Enter: answer now and think on. q and Enter, or Ctrl-D: leave."


def check_terminal() -> None:
    """
    Refuse standard streams that are no terminal.

    Raises:
        `ValueError`: If input or output is a pipe or a file.
    """
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        if stream is None or not stream.isatty():
            raise ValueError(
                f"--interactive needs a terminal, but the standard {name} is none. Start it at a terminal, or leave "
                "out --interactive and set --budgets."
            )


class _Keys:
    """Lines that are typed while the model thinks. `None` stands for the end of the input."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # Not by `sys.stdin`, whose lock would hold up the end of the program
        threading.Thread(target=self._read, args=(sys.stdin.fileno(),), daemon=True).start()

    def _read(self, number: int) -> None:
        while True:
            try:
                typed = os.read(number, 4096)
            except OSError:  # the terminal has gone
                typed = b""
            if not typed:
                self._lines.put(None)
                return
            for line in typed.decode(errors="replace").splitlines():
                self._lines.put(line.strip())

    def has_any(self) -> bool:
        """Return whether a line waits."""
        return not self._lines.empty()

    def next(self) -> str | None:
        """Return the line that waits."""
        return self._lines.get_nowait()


def converse(session: AnytimeSession, tokenizer: PreTrainedTokenizerBase) -> BudgetAnswer | None:
    """
    Think at a terminal until the trace ends, the context is full, or the user leaves.

    Args:
        session ([`AnytimeSession`]):
            The session.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.

    Returns:
        [`BudgetAnswer`], *optional*: the last answer that was given.
    """
    print(f"--- {HELP}", flush=True)
    keys, answer = _Keys(), None
    streamer = _new_streamer(tokenizer)

    def show(new: list[int]) -> bool:
        for token in new:
            streamer.put(torch.tensor([token]))
        return keys.has_any()

    while not session.ended and (room := session.room) != 0:
        session.think(room or _AT_ONCE, show)
        leaves, asked = False, False
        while keys.has_any() and not leaves:
            line = keys.next()
            leaves, asked = line is None or line.lower() in _LEAVE, True
        if leaves:
            streamer.end()
            print(f"--- left after {len(session.token_ids)} thinking tokens", flush=True)
            return answer
        if asked and not session.ended and session.room != 0:
            streamer.end()
            answer = _print_answer(session, "")
            print("--- thinking goes on", flush=True)
            streamer = _new_streamer(tokenizer)
    streamer.end()
    return _print_answer(session, ", which ended the thinking" if session.ended else ", which fill the context")


def _new_streamer(tokenizer: PreTrainedTokenizerBase) -> EscapedStreamer:
    return EscapedStreamer(cast(Any, tokenizer), skip_special_tokens=True)


def _print_answer(session: AnytimeSession, how: str) -> BudgetAnswer:
    answer = session.answer()
    print(f"--- answer after {answer.thinking_tokens} thinking tokens{how}")
    print(for_terminal(answer.answers[0]), flush=True)
    return answer
