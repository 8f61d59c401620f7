"""Flash attention of one tile of queries and one key head: the item of work.

Rows are a tile's tokens times the query heads of the key head. Block after block of keys is laid out once for all of
them; then each few rows get their scores, weights and weighted values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from kernels_pallas.cpu.attention.ahead import Ahead
from kernels_pallas.cpu.attention.keys import CHUNK_KEYS, GROUP_KEYS, Block, Pages, copy, fill, load_block
from kernels_pallas.cpu.attention.schedule import REGISTER_ROWS
from kernels_pallas.cpu.attention.softmax import (
    EXP2,
    EXP2_SHIFT,
    NO_SCORE,
    InMemory,
    everywhere,
    exp2_of_negative,
    exp2_shifted,
    larger,
)
from kernels_pallas.cpu.attention.tile import REGISTER_BYTES, TILE_VECTORS, multiply
from kernels_pallas.cpu.bf16 import F32S, LANES, to_bf16, zeros
from kernels_pallas.cpu.ir import F32, I32, I64, Function, Value, Variable
from kernels_pallas.cpu.vmath import LOG2_E, exp2

DECODE_BLOCK_KEYS, BLOCK_KEYS = 64, 256  # for a tile of one token, of more
_COLUMN_BYTES = 24  # of a row of the table of tiles


@dataclass(frozen=True, kw_only=True)
class AttentionKernel:
    """tile_tokens: of the largest tile. sizes as in `Geometry`."""

    num_kv_heads: int
    group: int
    head_dim: int
    page_size: int
    tile_tokens: int
    causal: bool
    sm_scale: float
    sliding_window: int | None
    soft_cap: float | None

    name = "attention"
    num_args = 6
    num_results = 2

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return buffers[4].load(I32).convert("sext", I64) * self.num_kv_heads

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        """buffers: queries, pages, page table, table of tiles, sizes, first page; out, lse."""
        tile = buffers[3].at(item // self.num_kv_heads * _COLUMN_BYTES)
        single = tile.at(8).load(I32).is_("==", 1)
        with f.when(single):
            _Item(self, f, buffers, item, 1).write()
        if self.tile_tokens > 1:
            with f.when(single.is_("==", 0)):
                _Item(self, f, buffers, item, self.tile_tokens).write()


class _Item:
    """Writes one item's code, for tiles of at most so many tokens."""

    def __init__(self, kernel: AttentionKernel, f: Function, buffers: list[Value], item: Value, tokens: int) -> None:
        self.kernel, self.f = kernel, f
        self.block_keys = DECODE_BLOCK_KEYS if tokens == 1 else BLOCK_KEYS
        queries, pages, page_table, tiles, sizes, first_page, self.out, self.lse = buffers
        tile = tiles.at(item // kernel.num_kv_heads * _COLUMN_BYTES)
        seq, self.token, self.num_tokens, self.position, self.begin, self.end = (
            tile.at(4 * i).load(I32).convert("sext", I64) for i in range(6)
        )
        self.head = item % kernel.num_kv_heads
        columns = sizes.at(4).load(I32).convert("sext", I64)
        page_bytes = 2 * kernel.num_kv_heads * kernel.page_size * kernel.head_dim * 2
        pages = pages.at(first_page.load(I32).convert("sext", I64) * page_bytes)
        self.pages = Pages(
            pages, page_table.at(seq * columns * 4), self.head, kernel.num_kv_heads, kernel.page_size, kernel.head_dim
        )
        self.next_pages, self.next_begin, self.next_end = self._next_item(page_table, tiles, sizes, item)
        self.ahead = Ahead.on_stack(f, self.block_keys, self.pages)
        self.single = tokens == 1
        self.queries = queries
        most = tokens * kernel.group
        self.tile_rows = -(-most // -(-most // REGISTER_ROWS)) if tokens == 1 else min(most, REGISTER_ROWS)
        padded = -(-most // self.tile_rows) * self.tile_rows
        self.num_rows = self.num_tokens * kernel.group
        self.padded_rows = (self.num_rows + (self.tile_rows - 1)) // self.tile_rows * self.tile_rows
        chunks = self.padded_rows // self.tile_rows * (self.block_keys // CHUNK_KEYS)
        self.groups_a_chunk = (chunks + (self.block_keys // GROUP_KEYS - 1)) // chunks  # of the next block
        dim = kernel.head_dim
        self.block = Block.on_stack(f, self.block_keys, dim)
        self.rows = f.stack(f"[{padded * dim} x i16]", 64)
        self.sums = f.stack(f"[{padded * dim} x float]", 64)  # weighted values
        self.totals = f.stack(f"[{padded * LANES} x float]", 64)  # weights, lane by lane
        self.maxima = f.stack(f"[{padded} x float]", 64)
        self.scores = f.stack(f"[{2 * self.tile_rows * self.block_keys} x float]", 64)  # of two tiles by turns
        self.weights = f.stack(f"[{self.tile_rows * self.block_keys} x i16]", 64)
        self.peaks = f.stack(f"[{self.tile_rows * LANES} x float]", 64)  # greatest scores, lane by lane
        self.offsets = f.stack(f"[{self.tile_rows} x float]", 64)
        self.keeps = f.stack(f"[{self.tile_rows} x float]", 64)

    def write(self) -> None:
        f, kernel = self.f, self.kernel
        self.numbers = InMemory(f, (*EXP2, self._log2_scale))
        first = self.begin
        if kernel.sliding_window is not None:
            seen = (self.position - (kernel.sliding_window - 1)).max(0) // kernel.page_size * kernel.page_size
            first = first.max(seen)
        self._start()
        with f.loop(first, self.end, self.block_keys) as key:
            num_keys = (self.end - key).min(self.block_keys)
            load_block(f, self.pages, self.block, key, num_keys)
            self._look_ahead(key)
            (self._attend_one if self.single else self._attend_many)(key, num_keys)
        self._finish()

    def _next_item(self, page_table: Value, tiles: Value, sizes: Value, item: Value) -> tuple[Pages, Value, Value]:
        """What this thread, of two, will probably do after this item: its pages, first key and key after the last."""
        heads = self.kernel.num_kv_heads
        other = (item + 2).min(sizes.load(I32).convert("sext", I64) * heads - 1)
        tile = tiles.at(other // heads * _COLUMN_BYTES)
        seq, begin, end = (tile.at(4 * i).load(I32).convert("sext", I64) for i in (0, 4, 5))
        row = page_table.at(seq * sizes.at(4).load(I32).convert("sext", I64) * 4)
        return replace(self.pages, row=row, head=other % heads), begin, end

    def _look_ahead(self, key: Value) -> None:
        f, following = self.f, key + self.block_keys
        with f.when(following.is_("<", self.end)):
            self.ahead.aim(self.pages, following, self.end, self.block_keys)
        with f.when(following.is_(">=", self.end)):
            self.ahead.aim(self.next_pages, self.next_begin, self.next_end, self.block_keys)

    def _start(self) -> None:
        f, kernel = self.f, self.kernel
        token_bytes = kernel.group * kernel.head_dim * 2
        source = self.queries.at((self.token * kernel.num_kv_heads + self.head) * token_bytes)
        with f.loop(0, self.num_tokens) as i:
            copy(f, self.rows.at(i * token_bytes), source.at(i * (token_bytes * kernel.num_kv_heads)), token_bytes)
        row_bytes = kernel.head_dim * 2
        fill(f, self.rows.at(self.num_rows * row_bytes), (self.padded_rows - self.num_rows) * row_bytes)
        fill(f, self.sums, self.padded_rows * (kernel.head_dim * 4))
        fill(f, self.totals, self.padded_rows * REGISTER_BYTES)
        with f.loop(0, self.padded_rows) as row:
            self.maxima.at(row * 4).store(f.constant(NO_SCORE, F32))

    def _attend_one(self, key: Value, num_keys: Value) -> None:
        """A block, for one token."""
        with self.f.loop(0, self.padded_rows, self.tile_rows) as row:
            self._score(row, key, num_keys)
            self._follow_maxima(row)
            self._weigh(row, num_keys)
            self._sum_values(row, num_keys)

    def _attend_many(self, key: Value, num_keys: Value) -> None:
        """A block, for more. One tile's weights are made while the next one is scored, because what is no product
        costs least beside products."""
        f = self.f
        scored = f.variable(f.int64(0))  # keys of the tile before
        with f.loop(0, self.padded_rows + self.tile_rows, self.tile_rows) as row:
            before, num_scored = row - self.tile_rows, scored.get()
            more = row.is_("<", self.padded_rows)
            seen = (self._keys_end(row + (self.tile_rows - 1)) - key).min(num_keys).max(0)
            with f.when(more):
                self._score(row, key, seen, num_scored)
            with f.when(more.is_("==", 0)):
                self._weigh(before, num_scored)
            with f.when(num_scored.is_(">", 0)):
                self._sum_values(before, num_scored)
            with f.when(more):
                self._follow_maxima(row)
            scored.set(seen)

    def _keys_end(self, row: Value) -> Value:
        """The key after the last one that a row sees."""
        position = self.position + row // self.kernel.group
        return self.end.min(position + 1) if self.kernel.causal else self.end

    def _keys_begin(self, row: Value) -> Value:
        """With a window: the first key that a row sees; not above 0 where that is all."""
        assert self.kernel.sliding_window is not None
        return self.position + row // self.kernel.group - (self.kernel.sliding_window - 1)

    def _score(self, row: Value, key: Value, num_keys: Value, num_weighed: Value | None = None) -> None:
        """Products of the rows and the block's first keys, to whole chunks, capped and masked, and their peaks. Beside
        them the tile before gets its weights of its first `num_weighed` keys, which are no more."""
        f, kernel, dim = self.f, self.kernel, self.kernel.head_dim
        self._forget_peaks()
        with f.loop(0, num_keys, CHUNK_KEYS) as first:
            scores = [[f.variable(zeros(f)) for _ in range(TILE_VECTORS)] for _ in range(self.tile_rows)]
            keys = self.block.keys.at(first * (2 * dim))
            product = partial(
                multiply, f, scores, self.rows.at(row * (2 * dim)), 2 * dim, keys, 4 * CHUNK_KEYS, dim // 2
            )
            if num_weighed is None:
                product(partial(self.ahead.ask_for_keys, first))
            else:
                asked = (row // self.tile_rows * self.block_keys + first) // CHUNK_KEYS * self.groups_a_chunk
                ask = partial(self.ahead.ask_for_groups, asked, self.groups_a_chunk, self.block_keys // GROUP_KEYS)
                both = first.is_("<", num_weighed)
                with f.when(both):
                    product(partial(self._weigh_beside, row - self.tile_rows, first, ask))
                with f.when(both.is_("==", 0)):
                    product(ask)
            if kernel.soft_cap is not None:
                self._cap(scores, kernel.soft_cap)
            self._mask(scores, row, key + first)
            target = self._scores(row, first)
            for i, variables in enumerate(scores):
                a, b, c, d = registers = [variable.get() for variable in variables]
                for j, register in enumerate(registers):
                    target.at((i * TILE_VECTORS + j) * REGISTER_BYTES).store(register, REGISTER_BYTES)
                peak = self.peaks.at(i * REGISTER_BYTES)
                highest = larger(larger(larger(a, b), larger(c, d)), peak.load(F32S, REGISTER_BYTES))
                peak.store(highest, REGISTER_BYTES)

    def _cap(self, scores: list[list[Variable]], cap: float) -> None:
        """Scores become cap * tanh(scaled / cap), with 1 - 2 / (e**(2 x) + 1) for tanh."""
        one = self.f.constant(1.0, F32S)
        for score in chain.from_iterable(scores):
            power = exp2(self.f, score.get() * (2 * LOG2_E * self.kernel.sm_scale / cap))
            score.set((one - (one + one) / (power + one)) * cap)

    def _mask(self, scores: list[list[Variable]], row: Value, key: Value) -> None:
        """Scores of a chunk's keys that a row does not see become minus infinity."""
        f, window = self.f, self.kernel.sliding_window
        masked = self._keys_end(row).is_("<", key + CHUNK_KEYS)
        if window is not None:
            masked = masked | self._keys_begin(row + (self.tile_rows - 1)).is_(">", key)
        with f.when(masked):
            for i, variables in enumerate(scores):
                end = (self._keys_end(row + i) - key).convert("trunc", I32).splat(LANES)
                begin = (self._keys_begin(row + i) - key).convert("trunc", I32).splat(LANES) if window else None
                for j, score in enumerate(variables):
                    here = f.constants(range(j * LANES, (j + 1) * LANES), I32)
                    seen = here.is_("<", end)
                    if begin is not None:
                        seen = seen & here.is_(">=", begin)
                    score.set(seen.then(score.get(), f.constant(float("-inf"), F32S)))

    def _forget_peaks(self) -> None:
        for i in range(self.tile_rows):
            self.peaks.at(i * REGISTER_BYTES).store(self.f.constant(NO_SCORE, F32S), REGISTER_BYTES)

    def _follow_maxima(self, row: Value) -> None:
        """The rows' maxima rise to their peaks; what is kept of their sums, and the weights' offset, follow."""
        f = self.f
        for i in range(self.tile_rows):
            maximum, total = self.maxima.at((row + i) * 4), self.totals.at((row + i) * REGISTER_BYTES)
            before = maximum.load(F32).splat(LANES)
            peak = self.peaks.at(i * REGISTER_BYTES).load(F32S, REGISTER_BYTES)
            top = everywhere(larger(peak, before), "max")
            offset, offset_before = (
                f.fma(x, f.constant(-self._log2_scale, F32S), f.constant(EXP2_SHIFT, F32S)) for x in (top, before)
            )
            # By the offsets as they were rounded, which the weights so far contain: a maximum that stays keeps all.
            lower = offset - offset_before
            keep = lower.is_("==", 0.0).then(1.0, exp2_of_negative(f, lower))
            maximum.store(top.lane(0))
            self.offsets.at(i * 4).store(offset.lane(0))
            self.keeps.at(i * 4).store(keep.lane(0))
            total.store(total.load(F32S, REGISTER_BYTES) * keep, REGISTER_BYTES)

    def _scores(self, row: Value, first: Value) -> Value:
        """Of a tile and a chunk of the block: for each row a score for each key."""
        return self.scores.at((row // self.tile_rows % 2 * self.block_keys + first) * (self.tile_rows * 4))

    def _weigh(self, row: Value, num_keys: Value) -> None:
        """A tile's scores to weights."""
        f = self.f
        numbers = [f.constant(number, F32S) for number in (*EXP2, self._log2_scale)]
        with f.loop(0, num_keys, CHUNK_KEYS) as first:
            for register in range(self.tile_rows * TILE_VECTORS):
                self._weigh_register(row, first, f.int64(register), numbers)

    def _weigh_beside(self, row: Value, first: Value, ask: Callable[[Value], None], k: Value) -> None:
        """What of weighing a chunk goes with a step of scoring one."""
        ask(k)
        steps, registers = self.kernel.head_dim // 2, self.tile_rows * TILE_VECTORS
        done, due = k * registers // steps, (k + 1) * registers // steps
        for i in range(-(-registers // steps)):
            with self.f.when((done + i).is_("<", due)):
                self._weigh_register(row, first, done + i, self.numbers.read())

    def _weigh_register(self, row: Value, first: Value, register: Value, numbers: list[Value]) -> None:
        """One of a chunk's; its row's total follows. numbers: EXP2 and the scale."""
        f, i = self.f, register // TILE_VECTORS
        *coefficients, scale = numbers
        offset = self.offsets.at(i * 4).load(F32).splat(LANES)
        score = self._scores(row, first).at(register * REGISTER_BYTES).load(F32S, REGISTER_BYTES)
        weight = exp2_shifted(f, f.fma(score, scale, offset), coefficients)
        place = i * self.block_keys + first + register % TILE_VECTORS * LANES
        self.weights.at(place * 2).store(to_bf16(f, weight), 2 * LANES)
        total = self.totals.at((row + i) * REGISTER_BYTES)
        total.store(total.load(F32S, REGISTER_BYTES) + weight, REGISTER_BYTES)

    def _sum_values(self, row: Value, num_keys: Value) -> None:
        """What was summed is kept in part, and the block's weighted values are added."""
        f, dim = self.f, self.kernel.head_dim
        num_pairs = (num_keys + (GROUP_KEYS - 1)) // GROUP_KEYS * (GROUP_KEYS // 2)
        keeps = [self.keeps.at(i * 4).load(F32).splat(LANES) for i in range(self.tile_rows)]
        for first in range(0, dim, TILE_VECTORS * LANES):
            target = self.sums.at(row * (4 * dim)).at(4 * first)
            width = min(TILE_VECTORS, (dim - first) // LANES)
            places = [[target.at(4 * (i * dim + j * LANES)) for j in range(width)] for i in range(self.tile_rows)]
            sums = [
                [f.variable(place.load(F32S, REGISTER_BYTES) * keep) for place in registers]
                for registers, keep in zip(places, keeps, strict=True)
            ]
            values = self.block.values.at(4 * first)
            multiply(
                f,
                sums,
                self.weights,
                2 * self.block_keys,
                values,
                4 * dim,
                num_pairs,
                self.ahead.ask_for_values if self.single and not first else None,
            )
            for place, total in zip(chain.from_iterable(places), chain.from_iterable(sums), strict=True):
                place.store(total.get(), REGISTER_BYTES)

    @property
    def _log2_scale(self) -> float:
        """From what maxima are of to binary logarithms of weights."""
        return LOG2_E * (1.0 if self.kernel.soft_cap is not None else self.kernel.sm_scale)

    def _finish(self) -> None:
        f, kernel = self.f, self.kernel
        dim = kernel.head_dim
        with f.loop(0, self.num_rows) as row:
            total = everywhere(self.totals.at(row * REGISTER_BYTES).load(F32S, REGISTER_BYTES), "sum")
            seen = total.is_(">", 0.0)
            inverse = seen.then(f.constant(1.0, F32S) / total, 0.0)
            target = (self.token + row // kernel.group) * kernel.num_kv_heads + self.head
            target = target * kernel.group + row % kernel.group
            for j in range(0, dim, LANES):
                value = self.sums.at(row * (4 * dim)).at(4 * j).load(F32S, REGISTER_BYTES)
                self.out.at(target * (4 * dim)).at(4 * j).store(value * inverse)
            peak = self.maxima.at(row * 4).load(F32) * (self._log2_scale / LOG2_E)
            lse = peak + f.intrinsic("llvm.log.f32", F32, total.lane(0))
            self.lse.at(target * 4).store(total.lane(0).is_(">", 0.0).then(lse, float("-inf")))
