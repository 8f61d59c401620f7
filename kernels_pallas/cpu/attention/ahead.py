"""Asking memory for the next block of keys while this one is multiplied.

Few rows do so little with a key that they wait for memory, which answers best when it is asked steadily: for one token
each step of the products asks for a few lines, for more each chunk of scores asks for a group of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas.cpu.attention.keys import CHUNK_KEYS, GROUP_KEYS, Pages
from kernels_pallas.cpu.ir import I32, PTR, VOID, Function, Value

_LINE_BYTES = 64


@dataclass(frozen=True)
class Ahead:
    """groups: scratch, a pointer for each group of keys of the next block. pages: sizes alone are used."""

    f: Function
    groups: Value
    pages: Pages

    @classmethod
    def on_stack(cls, f: Function, block_keys: int, pages: Pages) -> Ahead:
        return cls(f, f.stack(f"[{block_keys // GROUP_KEYS} x ptr]"), pages)

    def aim(self, pages: Pages, first: Value, end: Value, block_keys: int) -> None:
        """At a block of a sequence; what lies behind its end is asked for again and again, which costs nothing."""
        with self.f.loop(0, block_keys, GROUP_KEYS) as start:
            key = (first + start).min(end - 1).max(0)
            self.groups.at(start // GROUP_KEYS * 8).store(pages.address(key))

    def ask_for_keys(self, first: Value, step: Value) -> None:
        """Step of the head_dim / 2 that score the chunk of keys from `first` on."""
        steps = self.pages.head_dim // 8  # of a group
        group = first // GROUP_KEYS + step // steps
        self._ask(group, step % steps * (GROUP_KEYS * self.pages.key_bytes // steps), 4)

    def ask_for_values(self, step: Value) -> None:
        """Step, of two keys."""
        steps = GROUP_KEYS // 2
        size = GROUP_KEYS * self.pages.key_bytes // steps
        self._ask(step // steps, step % steps * size + self.pages.values_behind, size // _LINE_BYTES)

    def ask_for_groups(self, first: Value, count: Value, num_groups: int, step: Value) -> None:
        """Step of the head_dim / 2 that score a chunk: its part of so many groups, of those that there are."""
        steps = self.pages.head_dim // 2
        size = GROUP_KEYS * self.pages.key_bytes // steps
        with self.f.loop(first, (first + count).min(num_groups)) as group:
            for start in (0, self.pages.values_behind):
                self._ask(group, step * size + start, -(-size // _LINE_BYTES))

    def _ask(self, group: Value, offset: Value, num_lines: int) -> None:
        f = self.f
        line = self.groups.at(group * 8).load(PTR).at(offset)
        for i in range(num_lines):
            hints = (f.constant(hint, I32) for hint in (0, 3, 1))  # to read, to be kept close, data
            f.intrinsic("llvm.prefetch.p0", VOID, line.at(i * _LINE_BYTES), *hints)


assert CHUNK_KEYS % GROUP_KEYS == 0
