from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from quantbench.reports.progress import PlainProgress, Progress, TerminalProgress, duration, open_progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.41, "0.4 s"), (9.94, "9.9 s"), (41.2, "41 s"), (185, "3:05 min"), (3599.4, "59:59 min"), (7800, "2:10:00 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    """Moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def plain(clock: Clock, stream: io.StringIO) -> Progress:
    return PlainProgress(stream, clock, lambda: "13:00:00")


def test_plain_lines_with_time_left(plain: Progress, clock: Clock, stream: io.StringIO) -> None:
    with plain as progress:
        progress.stage("collect", 30)
        for _ in range(10):
            clock.now += 2
            progress.advance()
        progress.note("spilling hidden states to disk")
        progress.stage("report")
        clock.now += 0.5
    assert stream.getvalue().splitlines() == [
        "13:00:00 collect: 30 steps",
        "13:00:00 collect: 5 of 30, about 50 s left",
        "13:00:00 collect: 10 of 30, about 40 s left",
        "13:00:00 spilling hidden states to disk",
        "13:00:00 collect: done in 20 s",
        "13:00:00 report",
        "13:00:00 report: done in 0.5 s",
    ]


def test_plain_without_a_total(plain: Progress, clock: Clock, stream: io.StringIO) -> None:
    with plain as progress:
        progress.stage("fetch")
        clock.now += 11
        progress.advance(3)
    assert "fetch: 3 steps, 11 s" in stream.getvalue()


def test_plain_says_where_it_stopped(plain: Progress, clock: Clock, stream: io.StringIO) -> None:
    def work() -> None:
        with plain as progress:
            progress.stage("collect", 4)
            clock.now += 1
            progress.advance()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stream.getvalue().splitlines()[-1] == "13:00:00 collect: stopped after 1 of 4, about 3.0 s left"
    assert "done" not in stream.getvalue()


def test_more_steps_than_announced_never_give_negative_time(plain: Progress, clock: Clock, stream: io.StringIO) -> None:
    with plain as progress:
        progress.stage("collect", 2)
        clock.now += 12
        progress.advance(5)
    assert "collect: 5 of 2\n" in stream.getvalue()


def test_a_pipe_gets_lines_and_a_terminal_bars() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(open_progress(io.StringIO()), PlainProgress)
    assert isinstance(open_progress(Terminal()), TerminalProgress)


def on_terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=90, color_system=None, legacy_windows=False), stream


def test_a_quick_stage_shows_no_bar_but_a_line() -> None:
    console, stream = on_terminal()
    with TerminalProgress(console) as progress:
        progress.stage("plan", 3)
        progress.advance(3)
        progress.stage("collect", 2)
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", stream.getvalue())
    assert "3/3" not in text
    assert "done plan 0.0 s" in text
    assert "done collect 0.0 s" in text


def test_a_stage_above_two_seconds_shows_a_bar_with_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantbench.reports import progress as module

    monkeypatch.setattr(module, "QUICK_S", 0.0)
    console, stream = on_terminal()
    with TerminalProgress(console) as progress:
        progress.stage("collect", 4)
        progress.advance(1)
        progress._bars.refresh()
        progress.note("[odd] note")
    assert "1/4" in stream.getvalue()
    assert "collect" in stream.getvalue()
    assert "[odd] note" in stream.getvalue()


def test_a_broken_run_is_not_called_done() -> None:
    console, stream = on_terminal()

    def work() -> None:
        with TerminalProgress(console) as progress:
            progress.stage("collect", 4)
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        work()
    assert "stopped collect" in stream.getvalue()
    assert "done" not in stream.getvalue()


def test_advancing_before_the_first_stage_is_harmless(plain: Progress, stream: io.StringIO) -> None:
    plain.advance()
    TerminalProgress(on_terminal()[0]).advance()
    assert stream.getvalue() == ""
