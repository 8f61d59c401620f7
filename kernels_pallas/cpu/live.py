"""Rows of a step that are alive: `live` [4] int32 = begin, end, begin, end of two runs of rows, within the array and in
order: the decode slots in use; the prompt tokens, or sequences, behind the slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kernels_pallas.cpu.ir import I32, I64, Function, Value


def count_live(live: Value) -> Value:
    edges = [_edge(live, i) for i in range(4)]
    return edges[1] - edges[0] + edges[3] - edges[2]


@contextmanager
def each_run(f: Function, live: Value, first: Value, last: Value) -> Iterator[tuple[Value, Value, Value]]:
    """The live rows from the first-th to the last-th, run by run: (which of the live rows it begins and ends at, row of
    the array it begins at)."""
    before = f.variable(f.int64(0))
    with f.loop(0, 2) as run:
        edges = live.at(run * 8)
        start, end = _edge(edges, 0), _edge(edges, 1)
        offset = before.get()
        before.set(offset + (end - start))
        low, high = first.max(offset), last.min(offset + (end - start))
        with f.when(low.is_("<", high)):
            yield low, high, start + (low - offset)


def dead_runs(f: Function, live: Value, num_rows: int) -> list[tuple[Value, Value]]:
    """Begin and end of the runs of an array's rows that are not live."""
    edges = [_edge(live, i) for i in range(4)]
    return [(f.int64(0), edges[0]), (edges[1], edges[2]), (edges[3], f.int64(num_rows))]


def _edge(live: Value, index: Value | int) -> Value:
    return live.at(index * 4).load(I32).convert("sext", I64)
