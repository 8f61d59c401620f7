"""What the demonstration shows while it runs: a live screen on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from serve.demo.summary import Outcome, hit_ratio
from serve.protos.preble.v1 import scheduler_pb2 as pb

# Narrow enough for 80 columns.
_COLUMNS = ("group", "queue", "running", "prompt", "cached", "hit ratio", "exploit", "explore", "other")
_SHOWN_STREAMS = 8
_LINE_INTERVAL_S = 2.0


class View(Protocol):
    """Told what happens; a context, so that a live screen is left behind clean."""

    def __enter__(self) -> View: ...

    def __exit__(self, *_: object) -> None: ...

    def update(self, outcomes: Sequence[Outcome], states: Sequence[pb.GroupState]) -> None:
        """A few times a second."""

    def ended(self, outcome: Outcome) -> None:
        """One request has its whole answer, or failed."""


def make_view(console: Console) -> View:
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else LineView(console)


class LiveView:
    """A table of groups and the tails of the streams that are running; finished answers scroll by above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.__exit__(None, None, None)

    def update(self, outcomes: Sequence[Outcome], states: Sequence[pb.GroupState]) -> None:
        running = [outcome for outcome in outcomes if outcome.text and outcome.latency_s is None]
        width = max(20, self._console.width - 16)
        tails = [
            Text.assemble((_label(outcome), "dim"), " ", _one_line(outcome.text)[-width:], no_wrap=True)
            for outcome in running[:_SHOWN_STREAMS]
        ]
        self._live.update(Group(group_table(states), *tails))

    def ended(self, outcome: Outcome) -> None:
        self._console.print(_ended_line(outcome), markup=False, highlight=False)


class LineView:
    """A line for each answer, and the groups' state every other second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next_at = time.monotonic() + _LINE_INTERVAL_S

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, outcomes: Sequence[Outcome], states: Sequence[pb.GroupState]) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _LINE_INTERVAL_S
            num_done = sum(outcome.latency_s is not None for outcome in outcomes)
            self._print(f"{num_done} of {len(outcomes)} answered | " + " | ".join(map(_group_line, states)))

    def ended(self, outcome: Outcome) -> None:
        self._print(_ended_line(outcome))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def group_table(states: Sequence[pb.GroupState]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "group" else "right")
    for state in states:
        load = state.load
        table.add_row(
            state.hello.group.group,
            *(str(value) for value in (load.num_waiting, load.num_running, load.prompt_tokens, load.cached_tokens)),
            f"{hit_ratio(load.cached_tokens, load.prompt_tokens):.2f}",
            *(str(value) for value in (state.exploit, state.explore, state.balance + state.round_robin)),
        )
    return table


def _group_line(state: pb.GroupState) -> str:
    load = state.load
    return (
        f"{state.hello.group.group}: {load.num_waiting} waiting, {load.num_running} running, "
        f"hit ratio {hit_ratio(load.cached_tokens, load.prompt_tokens):.2f}, "
        f"{state.exploit} exploit, {state.explore} explore"
    )


def _ended_line(outcome: Outcome) -> str:
    if outcome.usage is None:
        return f"{_label(outcome)} FAILED: {outcome.error}"
    usage = outcome.usage
    figures = f"{usage.group}, {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens cached"
    return f"{_label(outcome)} {_one_line(outcome.text)}\n    ({figures}, first token after {outcome.ttft_s:.2f} s)"


def _label(outcome: Outcome) -> str:
    return f"{outcome.index + 1:2d} {outcome.family:9s}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
