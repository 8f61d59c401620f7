"""Families of sequences that share pages, brute force: prefixes are compared page by page, pair by pair."""

from __future__ import annotations


def naive_runs(tables, num_pages):
    """Every stretch of pages with the same two or more readers: {(start, stop, members)}.

    tables: per sequence its pages; num_pages: how many of them may be shared.
    """
    runs = set()
    for s, n in enumerate(num_pages):
        column = 0
        while column < n:
            start, readers = column, readers_of(tables, num_pages, s, column)
            while column < n and readers_of(tables, num_pages, s, column) == readers:
                column += 1
            if len(readers) > 1:
                runs.add((start, column, readers))
    return runs


def readers_of(tables, num_pages, s, column):
    """Sequences whose first column + 1 pages are those of s."""
    prefix = list(tables[s][: column + 1])
    return tuple(t for t, n in enumerate(num_pages) if n > column and list(tables[t][: column + 1]) == prefix)


def best_saving(runs, saved, levels):
    """The most that any choice of families saves. saved(run, start): by one family that reads columns start to the
    run's end; start is 0 or the end of a chosen run above it."""

    def inside(child, parent):
        return child is not parent and set(child[2]) <= set(parent[2]) and child[0] >= parent[1]

    def children(of, among):
        below = [run for run in among if of is None or inside(run, of)]
        return [run for run in below if not any(inside(run, other) for other in below)]

    def best(run, start, left):
        if not left:
            return 0.0
        skip = sum(best(child, start, left) for child in children(run, runs))
        take = saved(run, start) + sum(best(child, run[1], left - 1) for child in children(run, runs))
        return max(skip, take, 0.0)

    return sum(best(run, 0, levels) for run in children(None, runs))
