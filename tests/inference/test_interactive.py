"""`trl-anytime generate --interactive`, at a terminal of its own."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from tests.support.anytime import GREEDY
from tests.support.tiny import make_model, make_tokenizer
from trl_anytime import AnytimeConfig, AnytimeSession, Sampling
from trl_anytime.cli import main
from trl_anytime.commands.common import BAD_INPUT
from trl_anytime.rollout.markers import ThinkingMarkers

pytestmark = pytest.mark.slow  # processes, or a training of its own

MOST_SECONDS = 100
QUESTION = [{"role": "user", "content": "1 2 3"}]


def the_model():
    """One whose greedy thinking about the question goes on for longer than a test."""
    return make_model(seed=4, max_position_embeddings=100_000).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    the_model().save_pretrained(folder)
    markers = ThinkingMarkers("</think>", (5,), "so </think>", (9, 5), "answer", (8,))
    AnytimeConfig(markers, [4, 8], [0.5, 0.5], 3, GREEDY, [2]).save_pretrained(folder)
    return folder


def session_of(folder, **settings):
    """A session in this process about the same question."""
    config = AnytimeConfig.from_pretrained(folder)
    return AnytimeSession(the_model(), make_tokenizer(), QUESTION, config=config, **settings)


class Terminal:
    """A command at a terminal, what it has printed, and keys for it."""

    def __init__(self, *words):
        self.printed = ""
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "trl_anytime", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)
        self._deadline = time.monotonic() + MOST_SECONDS

    def press(self, keys):
        os.write(self._ours, keys.encode())

    def read_until(self, pattern, start=0):
        """Read until the output after `start` has a pattern, and return its match."""
        while (match := re.compile(pattern).search(self.printed, start)) is None:
            ready, _, _ = select.select([self._ours], [], [], max(self._deadline - time.monotonic(), 0))
            assert ready, self.printed
            try:
                self.printed += os.read(self._ours, 65536).decode()
            except OSError:  # the other side has closed
                assert re.compile(pattern).search(self.printed, start), self.printed
        return match

    def close(self):
        self.process.kill()
        os.close(self._ours)


@pytest.fixture
def terminal():
    opened = []

    def start(*words):
        opened.append(Terminal(*words))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


ANSWER = r"--- answer after (\d+) thinking tokens\r\n(.*)\r\n--- thinking goes on"


@pytest.mark.parametrize("leave", ["q\n", "\x04"], ids=["q", "Ctrl-D"])
def test_enter_answers_and_thinking_goes_on(terminal, folder, leave):
    at = terminal("generate", folder, "1 2 3", "--interactive", "--device", "cpu", "--max-summary-length", 3)
    at.read_until("--- .*Ctrl-D.*\r\n")
    at.read_until(r"(\w+ ){20}")
    at.press("\n")
    first = at.read_until(ANSWER)
    at.read_until(r"(\w+ ){20}", first.end())
    at.press("\n")
    second = at.read_until(ANSWER, first.end())
    at.press(leave)
    left = at.read_until(r"--- left after (\d+) thinking tokens", second.end())
    assert at.process.wait(MOST_SECONDS) == 0
    assert 0 < int(first[1]) < int(second[1]) <= int(left[1])

    session = session_of(folder, max_summary_length=3)
    for match in (first, second):
        session.think(int(match[1]) - len(session.token_ids))
        assert match[2].split() == session.answer().answers[0].split()
    session.think(int(left[1]) - len(session.token_ids))
    shown = re.sub(r"--- .*\r\n(.*\r\n--- thinking goes on\r\n)?", "", at.printed)
    expected = session._tokenizer.decode(session.token_ids, skip_special_tokens=True).split()
    words = [word for word in shown.split("--- left")[0].split() if word != "q"]  # the terminal shows what is typed
    assert words[: len(expected)] == expected


def test_a_trace_that_ends_is_answered(terminal, folder):
    at = terminal("generate", folder, "1 2 3", "--interactive", "--device", "cpu", "--temperature", 1, "--seed", 1)
    found = at.read_until(r"--- answer after (\d+) thinking tokens, which ended the thinking\r\n")
    assert at.process.wait(MOST_SECONDS) == 0
    session = session_of(folder, sampling=Sampling(temperature=1.0), seed=1)
    assert session.think(10_000)
    assert int(found[1]) == len(session.token_ids)


@pytest.mark.parametrize(
    ("words", "named"),
    [([], "terminal"), (["--budgets", "4"], "--budgets"), (["-"], "question")],
    ids=["no terminal", "budgets", "standard input"],
)
def test_what_is_refused(folder, capsys, words, named):
    question = words if words == ["-"] else ["1 2", *words]
    assert main(["generate", "missing", *question, "--interactive", "--device", "cpu"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_pipe_is_no_terminal(folder):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "trl_anytime", "generate", str(folder), "1 2", "--interactive"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment)
    os.close(ours)
    os.close(theirs)
    assert ended.returncode == BAD_INPUT and "output" in ended.stderr and not ended.stdout
