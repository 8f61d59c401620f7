"""Queries and keys turned by their positions, keys and values into their pages: one pass over what a product made.

x [T, K, (G + 2) * D] float32 has, for each of K key heads, the first halves of its G queries and its key, their second
halves in the same order, and its value. Pages are those of `kernels_pallas.layout` for the CPU, bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.cpu.bf16 import BF16_BITS, F32S, LANES, to_bf16
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import I32, I64, Function, Value
from kernels_pallas.cpu.live import count_live, dead_runs, each_run

_ITEM_ROWS = 32
_F32, _BF16 = 4, 2  # bytes


@dataclass(frozen=True)
class RotateAndWrite:
    """num_rows: T. group: G. num_slots: tokens that the layer's pages hold. head_dim: a multiple of 32.

    Arguments: x, cos_sin, pages, slots, live, first_page. Results: the queries, and the pages in their own memory.
    """

    num_rows: int
    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    num_slots: int
    name: str = "rotate_and_write"
    num_args: int = 6
    num_results: int = 2

    @property
    def _q_stride(self) -> int:
        return self.num_kv_heads * self.group * self.head_dim * _BF16

    @property
    def _page_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.page_size * self.head_dim * _BF16

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return ((count_live(buffers[4]) + (_ITEM_ROWS - 1)) // _ITEM_ROWS).max(1)

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        x, cos_sin, _, slots, live, first_page, q, pages = buffers
        with f.when(item.is_("==", 0)):
            for begin, end in dead_runs(f, live, self.num_rows):
                with f.loop(begin, end) as row, f.loop(0, self._q_stride, 2 * LANES) as offset:
                    q.at(row * self._q_stride + offset).store(f.constant(0, BF16_BITS))
        pages = pages.at(first_page.load(I32).convert("sext", I64) * self._page_bytes)
        first = item * _ITEM_ROWS
        last = (first + _ITEM_ROWS).min(count_live(live))
        with each_run(f, live, first, last) as (begin, end, start), f.loop(start, start + (end - begin)) as row:
            slot = slots.at(row * 4).load(I32).convert("zext", I64)  # a negative one is past the last page
            with f.loop(0, self.num_kv_heads) as head:
                columns = (self.group + 2) * self.head_dim
                heads = x.at((row * self.num_kv_heads + head) * (columns * _F32))
                q_heads = q.at(row * self._q_stride + head * (self.group * self.head_dim * _BF16))
                place = (slot // self.page_size * self.num_kv_heads + head) * (2 * self.page_size)
                page = pages.at((place + slot % self.page_size) * (self.head_dim * _BF16))
                self._head(f, heads, cos_sin.at(row * (self.head_dim * _F32)), q_heads, page, slot)

    def _head(self, f: Function, x: Value, cos_sin: Value, q: Value, page: Value, slot: Value) -> None:
        """A key head of a token. page: where its key goes, if the slot is one."""
        half, group = self.head_dim // 2, self.group
        is_somewhere = slot.is_("<", self.num_slots)
        for i in range(0, half, LANES):
            cos, sin = (cos_sin.at((i + part * half) * _F32).load(F32S) for part in range(2))

            def turn(index: Value, to: Value, i: int = i, cos: Value = cos, sin: Value = sin) -> None:
                here = x.at(index * (half * _F32) + i * _F32)
                first, second = here.load(F32S), here.at((group + 1) * half * _F32).load(F32S)
                to.at(i * _BF16).store(to_bf16(f, f.fma(first, cos, second * sin * -1.0)))
                to.at((i + half) * _BF16).store(to_bf16(f, f.fma(second, cos, first * sin)))

            with f.loop(0, group) as index:
                turn(index, q.at(index * (self.head_dim * _BF16)))
            with f.when(is_somewhere):
                turn(f.int64(group), page)
        with f.when(is_somewhere):
            value, to = x.at((group + 1) * self.head_dim * _F32), page.at(self.page_size * self.head_dim * _BF16)
            for i in range(0, self.head_dim, LANES):
                to.at(i * _BF16).store(to_bf16(f, value.at(i * _F32).load(F32S)))


def can_rotate(head_dim: int) -> bool:
    return head_dim % (2 * LANES) == 0


def rotate_and_write(
    x: jax.Array,
    cos_sin: jax.Array,
    kv_pages: jax.Array,
    slots: jax.Array,
    live: jax.Array,
    *,
    first_page: jax.Array | None = None,
    num_pages: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x [T, K, (G + 2) * D] float32, see above; cos_sin [T, D] float32; kv_pages [pages, K, 2, page_size, D] bfloat16's
    bits; slots [T] int32 = page * page_size + offset, past the last page or negative: nowhere; live [4] int32: see
    `live`. first_page [] int32, num_pages: in an array of several layers' pages, where the layer's begin and how many
    they are.

    Returns queries [T, K, G, D] bfloat16, 0 where a row is not live, and the pages, in place where they are donated; a
    row that is not live must have its slot nowhere.
    """
    num_rows, num_kv_heads, columns = x.shape
    page_size, head_dim = kv_pages.shape[3:]
    group = columns // head_dim - 2
    num_slots = (num_pages or kv_pages.shape[0]) * page_size
    kernel = RotateAndWrite(num_rows, num_kv_heads, group, head_dim, page_size, num_slots)
    q, pages = call_kernel(
        kernel,
        [x, cos_sin, kv_pages, slots, live, jnp.int32(0) if first_page is None else first_page],
        [
            jax.ShapeDtypeStruct((num_rows, num_kv_heads, group, head_dim), jnp.bfloat16),
            jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype),
        ],
        aliases={2: 1},
    )
    return q, pages
