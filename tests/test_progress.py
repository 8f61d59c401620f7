"""Progress lines: quiet when work is short, at most one line an interval when it is long, never in the work's way."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from preble_jax.progress import LineProgress, NullProgress, Progress, RichProgress, make_progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream: io.StringIO, clock: Clock) -> LineProgress:
    return LineProgress(stream, interval_s=2.0, clock=clock, threaded=False)


def test_short_work_prints_nothing(lines: LineProgress, clock: Clock, stream: io.StringIO) -> None:
    with lines.task("reading weights", total=2) as task:
        task.advance()
        clock.now += 1.9
        lines.poll()
    assert stream.getvalue() == ""


def test_one_line_an_interval_then_the_outcome(lines: LineProgress, clock: Clock, stream: io.StringIO) -> None:
    with lines.task("reading weights", total=272) as task:
        for _ in range(45):
            clock.now += 0.125
            task.advance()
            lines.poll()
    assert stream.getvalue().splitlines() == [
        "reading weights: 16/272 (6%), 2 s",
        "reading weights: 32/272 (12%), 4 s",
        "reading weights: done in 5.6 s",
    ]


def test_bytes_and_unknown_totals(lines: LineProgress, clock: Clock, stream: io.StringIO) -> None:
    with lines.task("downloading", total=98_000_000, unit="B") as download, lines.task("compiling") as compiling:
        download.advance(12_000_000)
        clock.now += 2
        lines.poll()
        compiling.advance(3)
        clock.now += 2
        lines.poll()
    assert stream.getvalue().splitlines() == [
        "downloading: 12.0 MB of 98.0 MB (12%), 2 s",
        "compiling: 2 s",
        "downloading: 12.0 MB of 98.0 MB (12%), 4 s",
        "compiling: 3, 4 s",
        "compiling: done in 4.0 s",
        "downloading: done in 4.0 s",
    ]


def test_failure_is_told_and_passes_through(lines: LineProgress, clock: Clock, stream: io.StringIO) -> None:
    with pytest.raises(KeyError), lines.task("reading weights"):
        clock.now += 3
        lines.poll()
        raise KeyError("layers.3.qkv")
    assert stream.getvalue().splitlines()[-1] == "reading weights: failed after 3.0 s"


def test_a_closed_stream_does_not_stop_the_work(clock: Clock) -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, clock=clock, threaded=False)
    stream.close()
    with progress.task("reading weights") as task:
        clock.now += 3
        progress.poll()
        task.advance()


def test_work_that_never_advances_is_seen_and_the_thread_ends_with_it(stream: io.StringIO) -> None:
    progress = LineProgress(stream, interval_s=0.02)
    deadline = time.monotonic() + 10
    with progress.task("compiling", total=4):
        while not stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
    assert stream.getvalue().startswith("compiling: 0/4 (0%)")
    while any(thread.name == "progress" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the progress thread outlived its last task"
        time.sleep(0.005)


def test_advances_from_many_threads_all_count(lines: LineProgress, clock: Clock, stream: io.StringIO) -> None:
    with lines.task("compiling", total=4000) as task:
        threads = [threading.Thread(target=lambda: [task.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        clock.now += 2
        lines.poll()
    assert "compiling: 4000/4000 (100%)" in stream.getvalue()


def test_a_terminal_gets_bars_and_a_pipe_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_progress(Terminal()), RichProgress)
    assert isinstance(make_progress(io.StringIO()), LineProgress)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(Terminal()), LineProgress)


def test_bars_show_amounts_of_overlapping_tasks() -> None:
    stream = Terminal()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=120))
    for _ in range(2):  # bars must be able to open again after the last task has closed them
        with progress.task("reading weights", total=4) as weights, progress.task("downloading", 98e6, "B") as download:
            weights.advance(3)
            download.advance(49e6)
    assert "3/4 (75%)" in stream.getvalue()
    assert "49.0 MB of 98.0 MB (50%)" in stream.getvalue()


def test_null_progress_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    progress: Progress = NullProgress()
    with progress.task("reading weights", total=4) as task:
        task.advance(3)
    assert capfd.readouterr() == ("", "")
