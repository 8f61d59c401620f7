"""The Hopper kernel. A persistent block of threads goes from item to item: one tile of query rows, one range of keys.

    producer warpgroup    page table -> TMA of pages -------> rings of K and V in shared memory
    consumer warpgroups   S = Q K^T (wgmma) -> softmax in registers -> O += P V (wgmma)

The producer runs ahead across items, so that the rings never empty between two of them. Decode and tiles differ in
`Blocks` only: whether the consumers share a tile's rows and take alternate steps, or each has rows of its own.

A query row is one (token, query head of the group): row r of a key head is token r // G, so that any group size fills
a tile. Shapes: W = 64 rows of a warpgroup, B keys of a step, D head dim, G query heads a key head.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.gpu import compat
from kernels_pallas.gpu.blocks import NUM_SMS, REDUCTION_SCRATCH_BYTES, STORE_COLUMNS, WGMMA_ROWS, Blocks

# Columns of the table of items. POSITION: where the tile's first token sits among its sequence's keys.
SEQ, FIRST_ROW, KEY_BEGIN, KEY_END, POSITION = range(5)
ITEM_FIELDS = 8

_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # the maximum before any key was seen: finite, so that its difference from -inf is not NaN
_SWIZZLE_BYTES = 128
_ACC_COLUMNS = 64  # of one accumulator: a head_dim of 256 has two
_CLEAR = 64  # rows and columns of V cleared at a time
_INTERPRETED_SMS = 2  # few, so that each goes through several items


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything static about one launch. rows_kept: rows of each warpgroup that can hold results."""

    blocks: Blocks
    group: int
    head_dim: int
    page_size: int
    num_kv_heads: int
    max_items: int
    rows_kept: int
    causal: bool
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool

    @property
    def copy_keys(self) -> int:
        """Keys of one TMA copy: a page, or a part of a page that is larger than a step."""
        return min(self.page_size, self.blocks.block_kv)

    @property
    def copies_per_step(self) -> int:
        return self.blocks.block_kv // self.copy_keys

    @property
    def steps_apart(self) -> int:
        """From one step of a consumer to its next."""
        return self.blocks.num_consumers if self.blocks.split_keys else 1

    @property
    def num_blocks(self) -> int:
        """Blocks of threads launched."""
        return min(_INTERPRETED_SMS if self.interpret else NUM_SMS, self.max_items * self.num_kv_heads)

    @property
    def column_parts(self) -> list[tuple[int, int]]:
        """(first column, columns) of each accumulator."""
        size = min(self.head_dim, _ACC_COLUMNS)
        return [(first, size) for first in range(0, self.head_dim, size)]


def attend_items(
    task: Task, items: jax.Array, num_items: jax.Array, page_table: jax.Array, q: jax.Array, kv_pages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """items [max_items, 8] int32, of which the first num_items [1] are attended; page_table [S, pages_per_seq];
    q [Hkv, rows, D] bfloat16, where items start at multiples of 8 rows (TMA of swizzle tiles demands it) with a whole
    tile to read; kv_pages [P, Hkv, 2, page_size, D] bfloat16.

    Returns partial results: out [max_items, Hkv, num_consumers, rows_kept, D] and lse [max_items, Hkv, num_consumers,
    W], float32, natural logarithm. What belongs to no item, or to a row past its tile's end, is undefined.
    """
    blocks = task.blocks
    lead = (task.max_items, task.num_kv_heads, blocks.num_consumers)

    def body(items_ref: Any, num_ref: Any, table_ref: Any, q_ref: Any, kv_ref: Any, *rest: Any, **smem: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup < blocks.num_consumers)
        def _() -> None:
            plgpu.set_max_registers(blocks.registers[0], action="increase")
            _for_each_item(task, items_ref, num_ref, functools.partial(_consume, task, warpgroup, rest, smem))

        @pl.when(warpgroup == blocks.num_consumers)
        def _() -> None:
            plgpu.set_max_registers(blocks.registers[1], action="decrease")
            produce = functools.partial(_produce, task, table_ref, q_ref, kv_ref, smem)
            _drain(task, smem, *_for_each_item(task, items_ref, num_ref, produce))

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*lead, task.rows_kept, task.head_dim), jnp.float32),
            jax.ShapeDtypeStruct((*lead, WGMMA_ROWS), jnp.float32),
        ),
        scratch_types=_scratch(task),
        grid=(task.num_blocks,),
        grid_names=("block",),
        num_threads=blocks.num_consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=REDUCTION_SCRATCH_BYTES,
            lowering_semantics=plgpu.LoweringSemantics.Lane,  # layouts as written; later versions infer them instead
        ),
        interpret=compat.interpret_params() if task.interpret else None,
    )
    out, lse = kernel(items, num_items, page_table, q, kv_pages)
    return out, lse


def _scratch(task: Task) -> dict[str, Any]:
    """Shared memory by name. A ring has a `full` barrier a slot, which TMA completes, and a `free` one for the way
    back; wgmma wants matrices in swizzled tiles."""
    blocks, dim = task.blocks, task.head_dim
    ring = (blocks.num_stages, blocks.block_kv, dim)
    consumers_of_a_step = 1 if blocks.split_keys else blocks.num_consumers
    full = functools.partial(plgpu.Barrier, num_arrivals=task.copies_per_step, num_barriers=blocks.num_stages)
    free = functools.partial(plgpu.Barrier, num_arrivals=consumers_of_a_step, num_barriers=blocks.num_stages)
    scratch: dict[str, Any] = {
        "q": plgpu.SMEM((blocks.num_q_slots, blocks.tile_rows, dim), jnp.bfloat16, transforms=_tiles(jnp.bfloat16)),
        "k": plgpu.SMEM(ring, jnp.bfloat16, transforms=_tiles(jnp.bfloat16)),
        "v": plgpu.SMEM(ring, jnp.bfloat16, transforms=_tiles(jnp.bfloat16)),
        "q_full": plgpu.Barrier(num_barriers=blocks.num_q_slots),
        "q_free": plgpu.Barrier(num_arrivals=blocks.num_consumers, num_barriers=blocks.num_q_slots),
        "k_full": full(),
        "k_free": free(),
        "v_full": full(),
        "v_free": free(),
    }
    if blocks.split_keys:
        staged = (blocks.num_consumers, WGMMA_ROWS, STORE_COLUMNS)
        scratch["staged"] = plgpu.SMEM(staged, jnp.float32, transforms=_tiles(jnp.float32))
    else:
        scratch["cleared"] = plgpu.Barrier(num_arrivals=blocks.num_consumers)
    return scratch


def _tiles(dtype: Any) -> tuple[Any, ...]:
    columns = _SWIZZLE_BYTES // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(_SWIZZLE_BYTES)


@dataclass(frozen=True)
class _Item:
    """Scalars: one key head's share of a row of the table. It sees keys [begin, end) of sequence `seq` in num_steps
    steps of B; `count` items and `first_step` steps went through this block of threads before."""

    index: Any
    head: Any
    seq: Any
    first_row: Any
    begin: Any
    end: Any
    position: Any
    num_steps: Any
    count: Any
    first_step: Any

    @classmethod
    def read(cls, task: Task, items_ref: Any, index: Any, head: Any, count: Any, first_step: Any) -> _Item:
        begin, end, position = (items_ref[index, field] for field in (KEY_BEGIN, KEY_END, POSITION))
        if task.sliding_window is not None:  # pages before the first query's window are not read
            first_seen = jnp.maximum(position - (task.sliding_window - 1), 0)
            begin = jnp.maximum(begin, first_seen - lax.rem(first_seen, jnp.int32(task.page_size)))
        size = task.blocks.block_kv
        num_steps = lax.div(jnp.maximum(end - begin, 0) + (size - 1), jnp.int32(size))
        seq, first_row = items_ref[index, SEQ], items_ref[index, FIRST_ROW]
        return cls(index, head, seq, first_row, begin, end, position, num_steps, count, first_step)


def _for_each_item(task: Task, items_ref: Any, num_ref: Any, visit: Any) -> tuple[Any, Any]:
    """Calls visit(item) for this block's share: neighbours in the grid attend with one head, whose keys they share.

    Returns how many items and how many steps these were.
    """
    num_items = num_ref[0]
    block, num_blocks = lax.axis_index("block"), task.num_blocks
    num_rounds = lax.div(num_items * task.num_kv_heads - block + (num_blocks - 1), jnp.int32(num_blocks))

    def round_(count: Any, first_step: Any) -> Any:
        work = block + count * num_blocks
        head = lax.div(work, num_items)
        item = _Item.read(task, items_ref, work - head * num_items, head, count, first_step)
        visit(item)
        return first_step + item.num_steps

    return num_rounds, lax.fori_loop(0, num_rounds, round_, jnp.int32(0))


def _produce(task: Task, table_ref: Any, q_ref: Any, kv_ref: Any, smem: dict[str, Any], item: _Item) -> None:
    """Fetches an item's queries and pages. Pages past its last key are replaced by that key's: nothing unread is."""
    blocks, keys, page_size = task.blocks, task.copy_keys, jnp.int32(task.page_size)
    q_slot = lax.rem(item.count, jnp.int32(blocks.num_q_slots))

    @pl.when(item.count >= blocks.num_q_slots)
    def _() -> None:
        plgpu.barrier_wait(smem["q_free"].at[q_slot])

    rows = task.rows_kept if blocks.split_keys else blocks.tile_rows
    source = q_ref.at[item.head, pl.ds(item.first_row, rows)]
    plgpu.copy_gmem_to_smem(source, smem["q"].at[q_slot, pl.ds(0, rows)], smem["q_full"].at[q_slot])

    @pl.loop(0, item.num_steps)
    def _(step: Any) -> None:
        slot = lax.rem(item.first_step + step, jnp.int32(blocks.num_stages))
        sources = []
        for i in range(task.copies_per_step):
            key = jnp.minimum(item.begin + step * blocks.block_kv + i * keys, item.end - 1)
            offset = lax.rem(key, page_size)
            sources.append((table_ref[item.seq, lax.div(key, page_size)], offset - lax.rem(offset, jnp.int32(keys))))
        for half, name in enumerate("kv"):

            @pl.when(item.first_step + step >= blocks.num_stages)
            def _(name: str = name) -> None:
                plgpu.barrier_wait(smem[f"{name}_free"].at[slot])

            for i, (page, offset) in enumerate(sources):
                plgpu.copy_gmem_to_smem(
                    kv_ref.at[page, item.head, half, pl.ds(offset, keys)],
                    smem[name].at[slot, pl.ds(i * keys, keys)],
                    smem[f"{name}_full"].at[slot],
                )


def _drain(task: Task, smem: dict[str, Any], num_items: Any, num_steps: Any) -> None:
    """Waits until the consumers are done with every slot, so that no barrier is left in the middle of a phase."""
    for name, slots, used in (
        ("q", task.blocks.num_q_slots, num_items),
        ("k", task.blocks.num_stages, num_steps),
        ("v", task.blocks.num_stages, num_steps),
    ):

        @pl.loop(jnp.maximum(used - slots, 0), used)
        def _(i: Any, name: str = name, slots: int = slots) -> None:
            plgpu.barrier_wait(smem[f"{name}_free"].at[lax.rem(i, jnp.int32(slots))])


def _consume(task: Task, warpgroup: Any, results: tuple[Any, ...], smem: dict[str, Any], item: _Item) -> None:
    """One warpgroup's steps of an item, and its partial result."""
    q_slot = lax.rem(item.count, jnp.int32(task.blocks.num_q_slots))
    q, tile_row = smem["q"].at[q_slot], jnp.int32(0)
    if not task.blocks.split_keys:
        tile_row = warpgroup * WGMMA_ROWS
        q = q.at[pl.ds(tile_row, WGMMA_ROWS)]
    state = (
        *(_full(task, (WGMMA_ROWS, columns), 0.0) for _, columns in task.column_parts),
        _full(task, (WGMMA_ROWS,), _LOWEST),
        _full(task, (WGMMA_ROWS,), 0.0),
    )
    plgpu.barrier_wait(smem["q_full"].at[q_slot])

    # This warpgroup's steps are first, first + apart, ...: counted over all items, so that a slot of the ring is always
    # the same consumer's. All rows see every key of the earliest ones.
    apart = task.steps_apart
    first = lax.rem(warpgroup + (apart - lax.rem(item.first_step, jnp.int32(apart))), jnp.int32(apart))
    step = functools.partial(_step, task, item, warpgroup, q, _positions(task, item, tile_row), smem, first)

    def own(num_steps: Any) -> Any:
        return lax.div(jnp.maximum(num_steps - first + (apart - 1), 0), jnp.int32(apart))

    num_full, num_all = own(_num_full_steps(task, item)), own(item.num_steps)
    state = lax.fori_loop(0, num_full, functools.partial(step, masked=False), state)
    state = lax.fori_loop(num_full, num_all, functools.partial(step, masked=True), state)
    plgpu.barrier_arrive(smem["q_free"].at[q_slot])
    _store(task, item, warpgroup, state, results, smem)


def _full(task: Task, shape: tuple[int, ...], value: float) -> Any:
    """In the layout of a wgmma's result, [W, n], or of one number for each of its rows, [W]."""
    full = jnp.full(shape, value, jnp.float32)
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return full if task.interpret else plgpu.layout_cast(full, layout)  # 0.10's interpreter knows no layouts


def _iota(task: Task, shape: tuple[int, int], axis: int) -> Any:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=None if task.interpret else plgpu.Layout.WGMMA)


def _positions(task: Task, item: _Item, tile_row: Any) -> Any:
    """[W, B] int32: where each row's query sits among its sequence's keys; None where no mask asks for it.

    Often past the item's end: of a split tile an item has some of the keys, but a window ends at the query.
    """
    if not task.causal:
        return None
    row = _iota(task, (WGMMA_ROWS, task.blocks.block_kv), 0) + tile_row
    return lax.div(row, jnp.int32(task.group)) + item.position


def _num_full_steps(task: Task, item: _Item) -> Any:
    """Steps, from the first on, of which every row sees every key. A window hides keys at the other end too."""
    if task.sliding_window is not None:
        return jnp.int32(0)
    end = jnp.minimum(item.end, item.position + 1) if task.causal else item.end
    return lax.div(jnp.maximum(end - item.begin, 0), jnp.int32(task.blocks.block_kv))


def _step(
    task: Task,
    item: _Item,
    warpgroup: Any,
    q: Any,
    position: Any,
    smem: dict[str, Any],
    first: Any,
    i: Any,
    state: tuple[Any, ...],
    *,
    masked: bool,
) -> tuple[Any, ...]:
    """Adds B keys to (accumulators..., maximum, total): step first + i * apart. The maximum is in units of log2."""
    *accs, maximum, total = state
    step = i * task.steps_apart + first
    slot = lax.rem(item.first_step + step, jnp.int32(task.blocks.num_stages))
    first_key = item.begin + step * task.blocks.block_kv
    shape = (WGMMA_ROWS, task.blocks.block_kv)

    plgpu.barrier_wait(smem["k_full"].at[slot])
    scores = _product(task, q, smem["k"].at[slot], transposed=True)
    plgpu.barrier_arrive(smem["k_free"].at[slot])

    scale = task.sm_scale * _LOG2E
    if task.soft_cap is not None:
        scores = jnp.tanh(scores * (task.sm_scale / task.soft_cap))
        scale = task.soft_cap * _LOG2E
    if masked:
        key = _iota(task, shape, 1) + first_key
        visible = key < item.end
        if task.causal:
            visible = visible & (key <= position)
        if task.sliding_window is not None:
            visible = visible & (key > position - task.sliding_window)
        scores = jnp.where(visible, scores, -jnp.inf)  # NaN of unwritten keys too

    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
    keep = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_maximum, shape, [0]))
    total = total * keep + weights.sum(axis=1)
    weights = weights.astype(jnp.bfloat16)

    plgpu.barrier_wait(smem["v_full"].at[slot])
    if masked:

        @pl.when(first_key + task.blocks.block_kv > item.end)
        def _() -> None:
            _clear_values(task, warpgroup, smem, slot, item.end - first_key)

    new_accs = []
    for acc, (column, columns) in zip(accs, task.column_parts, strict=True):
        part = _product(task, weights, smem["v"].at[slot, :, pl.ds(column, columns)])
        new_accs.append(acc * lax.broadcast_in_dim(keep, acc.shape, [0]) + part)
    plgpu.barrier_arrive(smem["v_free"].at[slot])
    return (*new_accs, new_maximum, total)


def _product(task: Task, a: Any, b_ref: Any, *, transposed: bool = False) -> Any:
    """a [W, n] in registers or shared memory times b [n, m] (or b [m, n] transposed) in shared memory, by wgmma.

    Interpreted it is jnp.dot: that wgmma takes no operand from registers, and in 0.10 no transposed one.
    """
    if task.interpret:
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b_ref))
        return jnp.dot(a, b.T if transposed else b, preferred_element_type=jnp.float32)
    b_ref = b_ref.transpose((1, 0)) if transposed else b_ref

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, a, b_ref)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((WGMMA_ROWS, b_ref.shape[1]), jnp.float32))


def _clear_values(task: Task, warpgroup: Any, smem: dict[str, Any], slot: Any, num_valid: Any) -> None:
    """Zeros in the rows of V [B, D] from `num_valid` on: a weight of zero times NaN would be NaN.

    Consumers that share the step clear a part each and wait for the others.
    """
    corners = [(r, c) for r in range(0, task.blocks.block_kv, _CLEAR) for c in range(0, task.head_dim, _CLEAR)]

    def clear(corners: list[tuple[int, int]]) -> None:
        for row, column in corners:
            tile = smem["v"].at[slot, pl.ds(row, _CLEAR), pl.ds(column, _CLEAR)]
            key = _iota(task, (_CLEAR, _CLEAR), 0) + row
            tile[...] = jnp.where(key < num_valid, tile[...], jnp.bfloat16(0))
        plgpu.commit_smem()

    if task.blocks.split_keys:
        clear(corners)
        return
    sharers = task.blocks.num_consumers
    for sharer in range(sharers):
        pl.when(warpgroup == sharer)(functools.partial(clear, corners[sharer::sharers]))
    plgpu.barrier_arrive(smem["cleared"])
    plgpu.barrier_wait(smem["cleared"])


def _store(
    task: Task, item: _Item, warpgroup: Any, state: tuple[Any, ...], results: tuple[Any, ...], smem: dict[str, Any]
) -> None:
    """A full tile goes from registers to its place. Of a split item few of the 64 rows are results: TMA takes those."""
    *accs, maximum, total = state
    out_ref, lse_ref = (ref.at[item.index, item.head, warpgroup] for ref in results)
    seen = total > 0.0
    lse_ref[...] = jnp.where(seen, maximum * (1 / _LOG2E) + jnp.log(total), -jnp.inf)
    inverse = jnp.where(seen, 1.0 / total, 0.0)
    for acc, (column, columns) in zip(accs, task.column_parts, strict=True):
        out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
        if not task.blocks.split_keys:
            out_ref.at[:, pl.ds(column, columns)][...] = out
            continue
        staged = smem["staged"].at[warpgroup]
        for first in range(0, columns, STORE_COLUMNS):
            staged[...] = out[:, first : first + STORE_COLUMNS]
            plgpu.commit_smem()
            target = out_ref.at[:, pl.ds(column + first, STORE_COLUMNS)]
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, task.rows_kept)], target)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
