"""What a long command says about its progress, in a terminal and elsewhere."""

import io
import re
import threading

from trl_anytime.outside.progress import progress

LINE = re.compile(r"name: (\d+) of (\d+) samples \((\d+) %\)")


class Heard(io.StringIO):
    """Takes what is printed, and says when there are so many lines."""

    def __init__(self, lines):
        super().__init__()
        self._lines, self.heard = lines, threading.Event()

    def write(self, text):
        written = super().write(text)
        if self.getvalue().count("\n") >= self._lines:
            self.heard.set()
        return written


def test_lines_come_while_nothing_is_done():
    """As in one long batch."""
    said = Heard(lines=3)
    with progress("name", "sample", 8, file=said, seconds=0.01):
        assert said.heard.wait(60)
    assert {match.groups() for match in map(LINE.match, said.getvalue().splitlines())} == {("0", "8", "0")}
    assert "left" not in said.getvalue()


def test_what_is_said_at_the_start_and_of_the_time_left():
    said = Heard(lines=2)
    with progress("name", "sample", 8, done=2, file=said, seconds=0.01) as count:
        assert "2 of 8" in said.getvalue() and said.getvalue().count("\n") == 1
        count()
        count()
        said.heard.clear()
        assert said.heard.wait(60)
    line = said.getvalue().splitlines()[-1]
    assert LINE.match(line).groups() == ("4", "8", "50")
    spent, left = re.findall(r"\d\d:\d\d", line)
    assert spent == left == "00:00"  # half of it is done, in no time


def test_a_minute_is_the_default():
    said = io.StringIO()
    with progress("na\x1bme", "sample", 1, file=said) as count:
        count()
    (line,) = said.getvalue().splitlines()  # the last one
    assert "1 of 1" in line and "(100 %)" in line and "\x1b" not in line


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = Terminal()
    with progress("name", "sample", 2, done=1, file=said) as count:
        count()
    first, *_, last = re.split(r"[\r\n]", said.getvalue().strip())
    assert "1 of 2" in first and "%|" in last and "2/2" in last
