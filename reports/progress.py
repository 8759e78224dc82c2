"""Shows that something is happening: bars with time left on a terminal, lines with a time of day everywhere else.

The pipeline names a stage and how many steps it has, and advances. A bar appears only for a stage that has lasted
longer than two seconds, so that quick stages do not flicker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Protocol, TextIO

from rich import progress as bars
from rich.console import Console, RenderableType

QUICK_S = 2.0  # shorter stages show no bar
LINE_S = 10.0  # between two lines of one stage where there is no terminal


class Progress(Protocol):
    """What the pipeline tells. A new stage ends the one before; leaving the `with` block ends the last."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins. total: its steps, None where that is not known."""

    def advance(self, amount: int = 1) -> None:
        """`amount` steps of the current stage are done."""

    def note(self, text: str) -> None:
        """One line for the reader, kept above the bar."""

    def __enter__(self) -> Progress: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_progress(stream: TextIO | None = None) -> Progress:
    """Bars if `stream` (default stderr, so that stdout stays data) is a terminal, else lines."""
    stream = sys.stderr if stream is None else stream
    return TerminalProgress(Console(file=stream)) if stream.isatty() else PlainProgress(stream)


def duration(seconds: float) -> str:
    """ "0.4 s", "41 s", "3:05 min", "2:10:00 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


class PlainProgress:
    """For logs: one line when a stage begins, one every ten seconds with the time left, one when it has ended."""

    def __init__(
        self,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], str] = lambda: time.strftime("%H:%M:%S"),
    ) -> None:
        self._stream, self._clock, self._now = stream, clock, now
        self._name: str | None = None
        self._total: int | None = None
        self._done = 0
        self._began = self._said = 0.0

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish()
        self._name, self._total, self._done = name, total, 0
        self._began = self._said = self._clock()
        self._line(f"{name}" + (f": {total} steps" if total else ""))

    def advance(self, amount: int = 1) -> None:
        self._done += amount
        moment = self._clock()
        if self._name is not None and moment - self._said >= LINE_S:
            self._said = moment
            self._line(f"{self._name}: {self._state(moment - self._began)}")

    def note(self, text: str) -> None:
        self._line(text)

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
        elif self._name is not None:
            self._line(f"{self._name}: stopped after {self._state(self._clock() - self._began)}")

    def _state(self, elapsed: float) -> str:
        if not self._total:
            return f"{self._done} steps, {duration(elapsed)}"
        left = elapsed / self._done * max(0, self._total - self._done) if self._done else 0.0
        return f"{self._done} of {self._total}" + (f", about {duration(left)} left" if left else "")

    def _finish(self) -> None:
        if self._name is not None:
            self._line(f"{self._name}: done in {duration(self._clock() - self._began)}")
        self._name = None

    def _line(self, text: str) -> None:
        print(f"{self._now()} {text}", file=self._stream, flush=True)


class _LateBars(bars.Progress):
    """Shows a task once it is older than QUICK_S, whether or not it has advanced."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            if not task.visible and not task.finished and (task.elapsed or 0.0) >= QUICK_S:
                task.visible = True
        return super().get_renderables()


class TerminalProgress:
    """One bar for the running stage; every stage that has ended leaves one line."""

    def __init__(self, console: Console) -> None:
        self._bars = _LateBars(
            bars.SpinnerColumn(),
            bars.TextColumn("{task.description}"),
            bars.BarColumn(bar_width=None),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            expand=True,
        )
        self._task: bars.TaskID | None = None
        self._name = ""

    def stage(self, name: str, total: int | None = None) -> None:
        self._finish("[green]done[/]")
        self._name = name
        self._task = self._bars.add_task(name, total=total, visible=False)

    def advance(self, amount: int = 1) -> None:
        if self._task is not None:
            self._bars.advance(self._task, amount)

    def note(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish("[green]done[/]" if kind is None else "[red]stopped[/]")
        self._bars.stop()

    def _finish(self, word: str) -> None:
        if self._task is None:
            return
        elapsed = next(task.elapsed or 0.0 for task in self._bars.tasks if task.id == self._task)
        self._bars.remove_task(self._task)
        self._task = None
        self._bars.console.print(f"{word} {self._name} [dim]{duration(elapsed)}[/]", highlight=False)
