"""A slow model of the forest, block by block, written from its description and not from its code.

One record a block; everything else (nodes, LRU order, matches) is worked out from the records when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

ANY = "any"
FOREVER = float("inf")


def chain(path: Sequence[int]) -> tuple[bytes, ...]:
    """Hashes of a prompt whose k-th page is path[k]; equal beginnings have equal hashes."""
    return tuple(bytes(path[: k + 1]).ljust(16, b"\xff") for k in range(len(path)))


@dataclass
class Block:
    parent: bytes | None
    depth: int
    until: dict[int, float] = field(default_factory=dict)  # slot -> when it stops being believed; FOREVER: confirmed
    last: dict[object, int] = field(default_factory=dict)  # slot or ANY -> tick
    shares: list[int] = field(default_factory=list)  # one slot per request of the window


class NaiveForest:
    def __init__(self, *, max_blocks: int = 10**9, ttl_s: float = 10.0) -> None:
        self.known: dict[bytes, Block] = {}
        self.max_blocks = max_blocks
        self.ttl_s = ttl_s
        self.tick = 0

    # --- changes

    def assign(self, hashes: Sequence[bytes], slot: int, now: float) -> list[Block]:
        """Returns the records to give to `unshare`."""
        if not hashes:
            return []
        self._add(hashes, None, 0)
        path = [self.known[block] for block in hashes]
        self._touch(path, slot)
        for block in path:
            block.shares.append(slot)
            if block.until.get(slot) != FOREVER:
                block.until[slot] = now + self.ttl_s
        self._forget()
        return path

    def unshare(self, path: list[Block], slot: int) -> None:
        for block in path:
            block.shares.remove(slot)
        self._drop_unused()

    def expire(self, now: float) -> None:
        for block in self.known.values():
            for slot, until in list(block.until.items()):
                if until <= now:
                    self._release(block, slot)
        self._drop_unused()

    def store(self, hashes: Sequence[bytes], parent: bytes | None, slot: int) -> None:
        if not hashes or (parent is not None and hashes[0] not in self.known and parent not in self.known):
            return
        if hashes[-1] in self.known and self.known[hashes[-1]].until.get(slot) == FOREVER:
            return
        self._add(hashes, parent, self.known[parent].depth if parent in self.known else 0)
        path = self._path(hashes[-1])
        self._touch(path, slot)
        for block in path:
            block.until[slot] = FOREVER
        self._forget()

    def remove(self, hashes: Sequence[bytes], slot: int) -> None:
        gone = set(hashes)
        for name, block in self.known.items():
            if slot in block.until and gone & {name, *self._ancestors(name)}:
                self._release(block, slot)
        self._drop_unused()

    def clear(self, slot: int) -> None:
        for block in self.known.values():
            self._release(block, slot)
        self._drop_unused()

    # --- questions

    def holds(self, slot: int, *, confirmed_only: bool = False) -> set[bytes]:
        return {
            name
            for name, block in self.known.items()
            if slot in block.until and (block.until[slot] == FOREVER or not confirmed_only)
        }

    def match(self, hashes: Sequence[bytes], slot: int) -> int:
        """Leading blocks the slot holds."""
        return next((k for k, name in enumerate(hashes) if name not in self.holds(slot)), len(hashes))

    def lru(self, subject: object) -> list[bytes]:
        """Blocks in eviction order: by last use, leaves first."""
        mine = [(b.last[subject], -b.depth, name) for name, b in self.known.items() if subject in b.last]
        return [name for *_, name in sorted(mine)]

    def nodes(self) -> list[list[bytes]]:
        """Maximal runs of blocks that nothing tells apart, each from its top."""
        children: dict[bytes | None, list[bytes]] = {}
        for name, block in self.known.items():
            children.setdefault(block.parent, []).append(name)

        def joins_parent(name: bytes) -> bool:
            block = self.known[name]
            if block.parent is None or len(children[block.parent]) > 1:
                return False
            above = self.known[block.parent]
            return (
                block.until == above.until and block.last == above.last and sorted(block.shares) == sorted(above.shares)
            )

        runs = []
        for name in self.known:
            if not joins_parent(name):
                run = [name]
                while len(below := children.get(run[-1], [])) == 1 and joins_parent(below[0]):
                    run.append(below[0])
                runs.append(run)
        return runs

    # --- inside

    def _add(self, hashes: Sequence[bytes], parent: bytes | None, depth: int) -> None:
        for name in hashes:
            depth += 1
            self.known.setdefault(name, Block(parent, depth))
            parent = name

    def _touch(self, path: list[Block], slot: int) -> None:
        self.tick += 1
        for block in path:
            block.last[slot] = block.last[ANY] = self.tick

    def _release(self, block: Block, slot: int) -> None:
        block.until.pop(slot, None)
        block.last.pop(slot, None)

    def _ancestors(self, name: bytes) -> list[bytes]:
        found = []
        while (parent := self.known[name].parent) is not None:
            found.append(parent)
            name = parent
        return found

    def _path(self, name: bytes) -> list[Block]:
        return [self.known[block] for block in [name, *self._ancestors(name)]]

    def _drop_unused(self) -> None:
        """What nobody holds and no request used; a block above another is always held or used too."""
        self.known = {name: block for name, block in self.known.items() if block.until or block.shares}

    def _forget(self) -> None:
        while len(self.known) > self.max_blocks:
            coldest = self.lru(ANY)[0]
            (run,) = [run for run in self.nodes() if coldest in run]
            for name in run:
                del self.known[name]
            self._drop_unused()
