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

from serve.demo.summary import Outcome, hit_ratio, queue_policies
from serve.protos.preble.v1 import scheduler_pb2 as pb

# Narrow enough for 80 columns.
_COLUMNS = ("group", "queue", "running", "prompt", "cached", "hit ratio", "exploit", "explore", "other")
_SHOWN_STREAMS = 8
_LINE_INTERVAL_S = 2.0


class View(Protocol):
    """Told what happens; a context, so that a live screen is left behind clean."""

    def __enter__(self) -> View: ...

    def __exit__(self, *_: object) -> None: ...

    def update(self, outcomes: Sequence[Outcome], state: pb.GetStateResponse) -> None:
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

    def update(self, outcomes: Sequence[Outcome], state: pb.GetStateResponse) -> None:
        running = [outcome for outcome in outcomes if outcome.text and outcome.latency_s is None]
        width = max(20, self._console.width - 16)
        tails = [
            Text.assemble((_label(outcome), "dim"), " ", _one_line(outcome.text)[-width:], no_wrap=True)
            for outcome in running[:_SHOWN_STREAMS]
        ]
        self._live.update(Group(group_table(state), *tails))

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

    def update(self, outcomes: Sequence[Outcome], state: pb.GetStateResponse) -> None:
        if time.monotonic() >= self._next_at:
            self._next_at = time.monotonic() + _LINE_INTERVAL_S
            num_done = sum(outcome.latency_s is not None for outcome in outcomes)
            first = f"{num_done} of {len(outcomes)} answered"
            if state.placement:
                first += f" ({policies_line(state)})"
            self._print(" | ".join([first, *map(_group_line, state.groups)]))

    def ended(self, outcome: Outcome) -> None:
        self._print(_ended_line(outcome))

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def policies_line(state: pb.GetStateResponse) -> str:
    """Which policies are on."""
    return f"placement {state.placement}, local queue {queue_policies(state)}"


def group_table(state: pb.GetStateResponse) -> Table:
    title = policies_line(state) if state.placement else None
    table = Table(box=box.SIMPLE_HEAD, padding=0, title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == "group" else "right")
    for group in state.groups:
        load, decisions = group.load, group.decisions
        others = sum(decisions.values()) - decisions["exploit"] - decisions["explore"]
        table.add_row(
            group.hello.group.group,
            *(str(value) for value in (load.num_waiting, load.num_running, load.prompt_tokens, load.cached_tokens)),
            f"{hit_ratio(load.cached_tokens, load.prompt_tokens):.2f}",
            *(str(value) for value in (decisions["exploit"], decisions["explore"], others)),
        )
    return table


def _group_line(group: pb.GroupState) -> str:
    load = group.load
    decided = ", ".join(f"{count} {decision}" for decision, count in sorted(group.decisions.items()))
    return (
        f"{group.hello.group.group}: {load.num_waiting} waiting, {load.num_running} running, "
        f"hit ratio {hit_ratio(load.cached_tokens, load.prompt_tokens):.2f}" + (f", {decided}" if decided else "")
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
