"""Blocks of keys and values, from pages into the layout that the register tile multiplies.

A block's keys lie in chunks of 64: of each pair of head-dim numbers a row of 64 lanes, one for each key. Its values lie
in pairs of keys: of each pair a row of `head_dim` lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels_pallas.cpu.bf16 import LANES
from kernels_pallas.cpu.ir import I32, I64, PTR, VOID, Function, Value, vector

CHUNK_KEYS = 64  # lanes of a register tile
GROUP_KEYS = 16  # transposed at once


@dataclass(frozen=True)
class Pages:
    """Where keys are. data: the page array. row: this sequence's row of the page table, int32. head: the key head."""

    data: Value
    row: Value
    head: Value
    num_kv_heads: int
    page_size: int
    head_dim: int

    @property
    def key_bytes(self) -> int:
        return 2 * self.head_dim

    @property
    def values_behind(self) -> int:
        """Bytes from a page's keys to its values."""
        return self.page_size * self.key_bytes

    def address(self, key: Value) -> Value:
        page = self.row.at(key // self.page_size * 4).load(I32).convert("sext", I64)
        half = (page * self.num_kv_heads + self.head) * (2 * self.values_behind)
        return self.data.at(half + key % self.page_size * self.key_bytes)


@dataclass(frozen=True)
class Block:
    """Scratch for one block. keys, values: as above. stage: room for `GROUP_KEYS` keys and their values."""

    keys: Value
    values: Value
    stage: Value

    @classmethod
    def on_stack(cls, f: Function, num_keys: int, head_dim: int) -> Block:
        half = f"[{num_keys * head_dim} x i16]"
        return cls(f.stack(half, 64), f.stack(half, 64), f.stack(f"[{2 * GROUP_KEYS * head_dim} x i16]", 64))


def load_block(f: Function, pages: Pages, block: Block, first: Value, num_keys: Value) -> None:
    """Keys first : first + num_keys, to whole groups of `GROUP_KEYS`; zeros behind the last one."""
    dim, key_bytes = pages.head_dim, pages.key_bytes
    with f.loop(0, num_keys, GROUP_KEYS) as start:
        missing = (num_keys - start).is_("<", GROUP_KEYS)
        keys, values = f.variable(block.stage), f.variable(block.stage.at(GROUP_KEYS * key_bytes))
        if pages.page_size % GROUP_KEYS:
            _stage(f, pages, block.stage, first + start, num_keys - start)
        else:
            with f.when(missing):
                _stage(f, pages, block.stage, first + start, num_keys - start)
            with f.when(missing.is_("==", 0)):
                address = pages.address(first + start)
                keys.set(address)
                values.set(address.at(pages.values_behind))
        chunk = start // CHUNK_KEYS * (dim // 2 * CHUNK_KEYS * 4) + start % CHUNK_KEYS * 4
        _transpose_keys(keys.get(), block.keys.at(chunk), dim)
        _interleave_values(f, values.get(), block.values.at(start // 2 * (dim * 4)), dim)


def _stage(f: Function, pages: Pages, stage: Value, first: Value, num_keys: Value) -> None:
    """A group key by key: pages smaller than it, or keys behind the last one, which may be anything."""
    size = pages.key_bytes
    fill(f, stage, 2 * GROUP_KEYS * size)
    with f.loop(0, num_keys.min(GROUP_KEYS)) as i:
        address = pages.address(first + i)
        copy(f, stage.at(i * size), address, size)
        copy(f, stage.at((i + GROUP_KEYS) * size), address.at(pages.values_behind), size)


def _transpose_keys(source: Value, target: Value, head_dim: int) -> None:
    """16 keys of `head_dim` numbers -> head_dim / 2 rows of 16 pairs, `CHUNK_KEYS` pairs apart."""
    for first in range(0, head_dim // 2, LANES):
        width = min(LANES, head_dim // 2 - first)
        rows = [source.at(i * 2 * head_dim + first * 4).load(vector(width, "i32")) for i in range(LANES)]
        if width < LANES:
            rows = [row.shuffle(row, [i % width for i in range(LANES)]) for row in rows]
        for j, column in enumerate(_transposed(rows)[:width]):
            target.at((first + j) * CHUNK_KEYS * 4).store(column, 64)


def _transposed(rows: list[Value]) -> list[Value]:
    """16 x 16, by way of 2 x 2 in each 128 bits, pairs of those, and 4 x 4 pieces of 128 bits."""
    low, high = [0, 16, 1, 17], [2, 18, 3, 19]
    low_pairs, high_pairs = [0, 1, 16, 17], [2, 3, 18, 19]

    def in_each_128(a: Value, b: Value, order: list[int]) -> Value:
        return a.shuffle(b, [4 * part + lane for part in range(4) for lane in order])

    def pieces(a: Value, b: Value, first: int) -> Value:
        """Of each the 128 bits number `first` and `first + 2`."""
        return a.shuffle(b, [base + 4 * part + i for base in (0, 16) for part in (first, first + 2) for i in range(4)])

    fours = []  # [rows' group of four][column in 128 bits]
    for a, b, c, d in zip(*(rows[i::4] for i in range(4)), strict=True):
        halves = [(in_each_128(a, b, order), in_each_128(c, d, order)) for order in (low, high)]
        fours.append([in_each_128(x, y, order) for x, y in halves for order in (low_pairs, high_pairs)])
    columns: list[Value] = [rows[0]] * 16
    for k in range(4):
        a, b, c, d = (four[k] for four in fours)
        for first in range(2):
            left, right = pieces(a, b, first), pieces(c, d, first)
            columns[4 * first + k], columns[4 * (first + 2) + k] = pieces(left, right, 0), pieces(left, right, 1)
    return columns


def _interleave_values(f: Function, source: Value, target: Value, head_dim: int) -> None:
    """16 values of `head_dim` numbers -> 8 rows of pairs."""
    with f.loop(0, GROUP_KEYS // 2) as pair:
        even, row = source.at(pair * (4 * head_dim)), target.at(pair * (4 * head_dim))
        for first in range(0, head_dim, LANES):
            a, b = (even.at(2 * (first + of * head_dim)).load(vector(LANES, "i16")) for of in range(2))
            order = [lane + LANES * of for lane in range(LANES) for of in range(2)]
            row.at(4 * first).store(a.shuffle(b, order), 64)


def copy(f: Function, target: Value, source: Value, num_bytes: Value | int) -> None:
    f.intrinsic("llvm.memcpy.p0.p0.i64", VOID, target, source, f.int64(num_bytes), f.constant(0, "i1"))


def fill(f: Function, target: Value, num_bytes: Value | int) -> None:
    """With zeros."""
    f.module.declare("llvm.memset.p0.i64", VOID, [PTR, "i8", I64, "i1"])
    f.call("llvm.memset.p0.i64", VOID, target, f.constant(0, "i8"), f.int64(num_bytes), f.constant(0, "i1"))
