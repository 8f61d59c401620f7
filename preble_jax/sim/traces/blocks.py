"""Block ids of a trace: the prefix rule, and how many tokens a block has."""

from __future__ import annotations

from collections.abc import Sequence

from preble_jax.sim.traces.entry import Entry
from preble_jax.sim.traces.rows import Row

_USUAL_SIZES = (512, 16)  # Mooncake's traces; the traces made from texts
_MOST = 1 << 31  # tokens a block, where nothing bounds it


class BlockNames:
    """Numbers a trace's ids densely, and refuses an id that has not always the same ids before it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int | None, Row]] = {}  # id -> (number, id before it, where first seen)

    def chain(self, row: Row, ids: object) -> tuple[int, ...]:
        if not isinstance(ids, list):
            row.refuse(
                f"hash_ids: expected a list of block ids, got {ids!r}; give every block an id, one of its own"
                " where nothing is shared"
            )
        known = self._known
        before: int | None = None
        chain: list[int] = []
        for name in ids:
            if type(name) is not int:
                row.refuse(f"hash_ids: expected whole numbers, got {name!r}; number the blocks")
            seen = known.get(name)
            if seen is None:
                known[name] = seen = (len(known), before, row)
            elif seen[1] != before:
                row.refuse(
                    f"hash_ids: expected block {name} {_after(seen[1])}, as in line {seen[2].line}, got it"
                    f" {_after(before)}; an id stands for all that is before it: give each prefix ids of its own"
                )
            chain.append(seen[0])
            before = name
        return tuple(chain)


def _after(name: int | None) -> str:
    return "at the begin of a prompt" if name is None else f"after block {name}"


def find_block_size(entries: Sequence[Entry], given: int | None) -> int:
    """Tokens a block: `given`, or what fits the lengths.

    A prompt of L tokens has ceil(L / size) blocks (the last one partial) or floor(L / size) of them (full ones only).
    Where several sizes fit, those go first with which all prompts round the same way; among them Mooncake's 512, then
    16, then powers of two, then the smallest. Raises InvalidRequestError at the first line that does not fit.
    """
    if given is not None:
        for entry in entries:
            if not entry.num_prompt // given <= len(entry.blocks) <= -(-entry.num_prompt // given):
                entry.row.refuse(
                    f"hash_ids: expected {entry.num_prompt // given} full blocks of {given} tokens for a prompt of"
                    f" {entry.num_prompt} and at most a partial one, got {len(entry.blocks)}; give another block size"
                )
        return given
    ranges = [found for found in (_range_up(entries), _range_down(entries)) if found[0] <= found[1]]
    return _preferred(ranges or [_range_either(entries)])


def _range_up(entries: Sequence[Entry]) -> tuple[int, int]:
    """Least and greatest size with which every prompt has ceil(L / size) blocks."""
    low = max(-(-entry.num_prompt // max(len(entry.blocks), 1)) for entry in entries)
    high = min(_most_up(entry) for entry in entries)
    return low, high


def _most_up(entry: Entry) -> int:
    if len(entry.blocks) > 1:
        return (entry.num_prompt - 1) // (len(entry.blocks) - 1)
    return _MOST if entry.blocks else 0


def _range_down(entries: Sequence[Entry]) -> tuple[int, int]:
    """Least and greatest size with which every prompt has floor(L / size) blocks."""
    low = max(entry.num_prompt // (len(entry.blocks) + 1) + 1 for entry in entries)
    high = min(entry.num_prompt // len(entry.blocks) if entry.blocks else _MOST for entry in entries)
    return low, high


def _range_either(entries: Sequence[Entry]) -> tuple[int, int]:
    """Least and greatest size with which every prompt has one or the other."""
    low, high = 1, _MOST
    low_line = high_line = entries[0].row.line
    for entry in entries:
        tokens, count = entry.num_prompt, len(entry.blocks)
        least = tokens // (count + 1) + 1
        most = (tokens - 1) // (count - 1) if count > 1 else _MOST
        if least > high or most < low:
            entry.row.refuse(
                f"hash_ids: expected blocks of {low} to {high} tokens, as by lines {low_line} and {high_line}, got"
                f" {count} blocks for {tokens} tokens; correct input_length or hash_ids"
            )
        if least > low:
            low, low_line = least, entry.row.line
        if most < high:
            high, high_line = most, entry.row.line
    return low, high


def _preferred(ranges: Sequence[tuple[int, int]]) -> int:
    for size in (*_USUAL_SIZES, *(1 << power for power in range(31))):
        if any(low <= size <= high for low, high in ranges):
            return size
    return min(low for low, _ in ranges)
