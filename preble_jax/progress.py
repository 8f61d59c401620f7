"""Progress of what takes longer than a moment: downloads, weights, compilation.

    with progress.task("reading weights", total=272) as task:
        for tensor in tensors:
            task.advance()

Three ways to show it behind one protocol: live bars (`RichProgress`), plain lines (`LineProgress`), nothing
(`NullProgress`). All of them may be used from several threads, and tasks may overlap.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1) -> None:
        """Says that `amount` more units are done."""


class Progress(Protocol):
    """Where work reports how far it is."""

    def task(self, description: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]:
        """Opens a task that ends with the `with` block, by an exception too.

        description: what is being done, lower case ("reading weights").
        total: units there are in all; None when nobody knows.
        unit: "" for a count, "B" for bytes.
        """


def make_progress(stream: TextIO | None = None) -> Progress:
    """A live bar when `stream` (default: stderr) is a terminal that can draw one, plain lines otherwise."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        console = Console(file=stream)
        if not console.is_dumb_terminal:
            return RichProgress(console)
    return LineProgress(stream)


class NullProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield _NullTask()


class _NullTask:
    def advance(self, amount: float = 1) -> None:
        pass


class RichProgress:
    """Live bars on a terminal; drawn while any task is open."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: RichBars | None = None
        self._num_open = 0

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        bars = self._open()
        bar = bars.add_task(description, total=total, amount=_amount(0, total, unit))
        try:
            yield _RichTask(bars, bar, total, unit)
        finally:
            self._close()

    def _open(self) -> RichBars:
        with self._lock:
            self._num_open += 1
            if self._bars is None:
                self._bars = RichBars(
                    SpinnerColumn(),
                    TextColumn("{task.description}"),
                    BarColumn(),
                    TextColumn("{task.fields[amount]}"),
                    TimeElapsedColumn(),
                    console=self._console,
                )
                self._bars.start()
            return self._bars

    def _close(self) -> None:
        with self._lock:
            self._num_open -= 1
            if self._num_open == 0 and self._bars is not None:
                self._bars.stop()
                self._bars = None


class _RichTask:
    def __init__(self, bars: RichBars, bar: TaskID, total: float | None, unit: str) -> None:
        self._bars, self._bar, self._total, self._unit = bars, bar, total, unit
        self._lock = threading.Lock()
        self._done = 0.0

    def advance(self, amount: float = 1) -> None:
        with self._lock:
            self._done += amount
            self._bars.update(self._bar, completed=self._done, amount=_amount(self._done, self._total, self._unit))


class LineProgress:
    """Plain lines, for logs and pipes: at most one a task every `interval_s`, the first after `interval_s`.

    Short tasks print nothing. A thread of its own prints, so that work which never advances is seen too;
    it lives only while a task is open. A task that printed also prints how it ended.

    clock: seconds, monotonic.
    """

    def __init__(
        self,
        stream: TextIO,
        interval_s: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
    ) -> None:
        self._stream: TextIO | None = stream
        self._interval_s = interval_s
        self._clock = clock
        self._threaded = threaded
        self._lock = threading.Lock()
        self._open: list[_LineTask] = []
        self._stop: threading.Event | None = None

    @contextmanager
    def task(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        task = _LineTask(description, total, unit, self._clock())
        self._add(task)
        outcome = "failed after"
        try:
            yield task
            outcome = "done in"
        finally:
            self._remove(task, outcome)

    def poll(self) -> None:
        """Prints a line for each open task whose time has come."""
        now = self._clock()
        with self._lock:
            for task in self._open:
                if now - task.last_line_at >= self._interval_s:
                    task.last_line_at = now
                    task.num_lines += 1
                    self._print(task.line(now))

    def _add(self, task: _LineTask) -> None:
        with self._lock:
            self._open.append(task)
            if self._threaded and self._stop is None:
                self._stop = threading.Event()
                threading.Thread(target=self._run, args=(self._stop,), name="progress", daemon=True).start()

    def _remove(self, task: _LineTask, outcome: str) -> None:
        with self._lock:
            self._open.remove(task)
            if task.num_lines:
                self._print(f"{task.description}: {outcome} {self._clock() - task.started_at:.1f} s")
            if not self._open and self._stop is not None:
                self._stop.set()
                self._stop = None

    def _run(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s / 8):
            self.poll()

    def _print(self, line: str) -> None:
        # Progress never stops the work it describes: a closed stream (a pipe whose reader left) is no reason to fail.
        if self._stream is None:
            return
        try:
            print(line, file=self._stream, flush=True)
        except (OSError, ValueError):
            self._stream = None


class _LineTask:
    def __init__(self, description: str, total: float | None, unit: str, now: float) -> None:
        self.description = description
        self.started_at = self.last_line_at = now
        self.num_lines = 0
        self._total, self._unit = total, unit
        self._lock = threading.Lock()
        self._done = 0.0

    def advance(self, amount: float = 1) -> None:
        with self._lock:
            self._done += amount

    def line(self, now: float) -> str:
        parts = [_amount(self._done, self._total, self._unit), f"{now - self.started_at:.0f} s"]
        return f"{self.description}: " + ", ".join(part for part in parts if part)


def _amount(done: float, total: float | None, unit: str) -> str:
    """Says "45/272 (17%)", "12.0 MB of 98.4 MB (12%)", "45", or "" when there is nothing to say."""
    show = (lambda n: decimal(int(n))) if unit == "B" else (lambda n: f"{n:g}" + (f" {unit}" if unit else ""))
    if total is None:
        return show(done) if done else ""
    between = " of " if unit else "/"
    share = f" ({min(done / total, 1.0):.0%})" if total > 0 else ""
    return f"{show(done)}{between}{show(total)}{share}"
