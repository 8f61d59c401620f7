"""What a device group tells the global scheduler about its prefix tree: numbered events, and snapshots.

A group numbers its events from 0, without holes, within one *generation*. A generation is one life of the group's
process; a later life has a greater number. Whoever listens applies events in order, drops those it has seen and those
of an older generation, and asks for a snapshot when a number is missing. A snapshot says everything that events
0 .. next_seq - 1 add up to.

The tree of a group is closed under parents at every event boundary: a block is stored after its parent and removed
before it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """A chain of full pages became reusable.

    hashes[0] follows `parent` (None: the beginning of a prompt), hashes[k + 1] follows hashes[k]. Blocks that were
    stored before may be named again.
    """

    hashes: tuple[bytes, ...]
    parent: bytes | None


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Pages were evicted. Leaves first."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AllCleared:
    """The whole tree was dropped."""


KVEvent = BlocksStored | BlocksRemoved | AllCleared


@dataclass(frozen=True, slots=True)
class EventBatch:
    """events[k] has the number first_seq + k."""

    generation: int
    first_seq: int
    events: tuple[KVEvent, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tree as it is before event `next_seq`. stored: parents before children."""

    generation: int
    next_seq: int
    stored: tuple[BlocksStored, ...]
