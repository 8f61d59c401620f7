"""A step plan as the arrays the compiled step takes. Host work only, numpy.

What belongs to a sequence and stays (its page table row, its sampling settings) is kept in tables with a row a slot and
brought up to date where it has changed; a step copies the rows it needs. A step's vector is used again when the step is
over, and where the same sequences decode again, only what has changed since is written. Apart from prompt chunks
nothing here is done token by token, and nothing is done page by page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kernels_pallas import SharedPrefixes
from kernels_pallas.families import FamilyPlanner
from preble_jax.engine.packing import Packing
from preble_jax.engine.shapes import StepShape
from preble_jax.model.decoder import StepArrays
from preble_jax.model.sampling import HostOrDeviceArray, SamplingArrays
from preble_jax.sched.sequence import PlannedRow, Sequence, StepPlan

MAX_STOP_IDS = 8  # that the device looks for; the host knows them all
_HOTTEST = 1e30  # uniform over the vocabulary long before; stays a float32


class StepInput(NamedTuple):
    """All that a compiled step takes from the host. S sequences, num_slots slots.

    step: the ragged batch. A token id of -1 is the last token of its sequence's slot, which only the device knows yet.
    sampling: settings of each sequence.
    slots [S] int32: where the step's token of each sequence is kept for the next one; num_slots: nowhere.
    steps_left [S] int32: tokens that a decoding sequence makes at most. num_steps [1] int32: steps to be run.
    stop_ids [S, MAX_STOP_IDS] int32: token ids after which a decoding sequence makes no more; -1 fills up.
    """

    step: StepArrays
    sampling: SamplingArrays
    slots: HostOrDeviceArray
    steps_left: HostOrDeviceArray
    num_steps: HostOrDeviceArray
    stop_ids: HostOrDeviceArray


@dataclass(eq=False)
class StepVector:
    """What travels. packed: the vector; arrays: views into it.

    slots: of the decoding sequences it was last filled in for, if nothing but decoding was done; None: nothing in it
    can be relied on. filled_at: the number of that step. shared: the families that are in it.
    """

    shape: StepShape
    packed: np.ndarray
    arrays: StepInput
    slots: bytes | None = None
    filled_at: int = 0
    shared: SharedPrefixes | None = None


class _Rows(NamedTuple):
    """Numbers of a plan's rows, int32 [rows]: slots, positions of their first tokens, the tokens they make at most, the
    output tokens that come before those, and their last known tokens (-1: the device knows it, the host not yet)."""

    slots: np.ndarray
    starts: np.ndarray
    num_made: np.ndarray
    num_output: np.ndarray
    last_tokens: np.ndarray


class _Families(NamedTuple):
    """Of the last step in which nothing but decoding was done; shape None: no such step counts any more."""

    shape: StepShape | None
    slots: bytes
    shared: SharedPrefixes


class ArrayBuilder:
    """num_pages, page_size: of the pool. pages_per_seq: columns of the page table. num_slots: of running sequences.
    families: finds who shares cached pages; None: every sequence reads its own."""

    def __init__(
        self, num_pages: int, page_size: int, pages_per_seq: int, num_slots: int, families: FamilyPlanner | None = None
    ) -> None:
        self._page_size = page_size
        self._families = families
        self._decode_families = _Families(None, b"", SharedPrefixes.empty(num_tokens=1, num_seqs=1))
        self._pages_per_seq = pages_per_seq
        self.no_kv_slot = num_pages * page_size
        self.num_slots = num_slots
        self._page_table = np.zeros((num_slots, pages_per_seq), np.int32)
        self._sampling = SamplingArrays.greedy(num_slots)
        self._stop_ids = np.full((num_slots, MAX_STOP_IDS), -1, np.int32)
        self._changed_at = np.zeros(num_slots, np.int64)  # number of the step before which the tables' row changed
        self._num_steps = 0
        self._packings: dict[StepShape, Packing] = {}
        self._unused: dict[StepShape, list[StepVector]] = {}

    def packing(self, shape: StepShape) -> Packing:
        """How the arrays of such steps lie in the vector that travels."""
        found = self._packings.get(shape)
        if found is None:
            found = self._packings[shape] = Packing(self._example(shape))
        return found

    def build(self, plan: StepPlan, shape: StepShape) -> StepVector:
        """The step's vector. Unused decode slots have no keys, unused tokens no slot, unused sequences no tokens."""
        self._num_steps += 1
        rows = self._read(plan.rows)
        vector = self._vector(shape)
        arrays, key = vector.arrays, None if plan.prefill else rows.slots.tobytes()
        index = self.index(plan, shape)
        if key is not None and key == vector.slots:
            (changed,) = np.nonzero(self._changed_at[rows.slots] > vector.filled_at)
            if len(changed):
                self._fill_tables(arrays, index[changed], rows.slots[changed], rows.num_made[changed])
        else:
            vector.packed.fill(0)
            vector.shared = None
            arrays.step.slots.fill(self.no_kv_slot)
            arrays.slots.fill(self.num_slots)
            self._fill_tables(arrays, index, rows.slots, rows.num_made)
            self._fill_prefill(arrays.step, plan.prefill, shape)
        vector.slots, vector.filled_at = key, self._num_steps
        arrays.num_steps[0] = plan.num_steps
        arrays.steps_left[index] = rows.num_made
        arrays.sampling.num_made[index] = rows.num_output
        self._fill_decode(arrays.step, rows, len(plan.decode))
        if self._families is not None:
            self._fill_families(self._families, vector, plan, rows.slots)
        return vector

    def take_back(self, vector: StepVector) -> None:
        """Its step is over on every device: the vector may be written to again."""
        self._unused.setdefault(vector.shape, []).append(vector)

    def index(self, plan: StepPlan, shape: StepShape) -> np.ndarray:
        """Where among the step's sequences the rows of the plan are, in `plan.rows`' order."""
        index = np.arange(len(plan.decode) + len(plan.prefill))
        index[len(plan.decode) :] += shape.num_decode_slots - len(plan.decode)
        return index

    def _vector(self, shape: StepShape) -> StepVector:
        unused = self._unused.get(shape)
        return unused.pop() if unused else StepVector(shape, *self.packing(shape).new())

    def _read(self, rows: tuple[PlannedRow, ...]) -> _Rows:
        """The rows' numbers, and the tables' rows of their sequences brought up to date: all that is done for each
        sequence in Python."""
        columns: tuple[list[int], ...] = ([], [], [], [], [])
        slots, starts, num_made, num_output, last_tokens = columns
        for sequence, start, _, made in rows:
            held, tokens, num_pending = sequence.pages, sequence.tokens, sequence.num_pending
            assert held is not None
            if held.num_unchanged < len(held.pages):
                self._refresh(sequence)
            slots.append(sequence.slot)
            starts.append(start)
            num_made.append(made)
            num_output.append(len(tokens) + num_pending - sequence.num_prompt)
            last_tokens.append(-1 if num_pending else tokens[-1])
        return _Rows(*np.array(columns, np.int32))

    def _refresh(self, sequence: Sequence) -> None:
        """Brings the tables' row of a sequence up to date."""
        pages, slot = sequence.pages, sequence.slot
        assert pages is not None
        self._changed_at[slot] = self._num_steps
        if pages.num_unchanged == 0:  # it has just got the slot
            self._decode_families = self._decode_families._replace(shape=None)
            sampling, stop_ids = sequence.request.sampling, sorted(sequence.request.stop_token_ids)[:MAX_STOP_IDS]
            self._sampling.temperature[slot] = min(sampling.temperature, _HOTTEST)
            self._sampling.top_k[slot] = sampling.top_k
            self._sampling.top_p[slot] = sampling.top_p
            self._sampling.min_p[slot] = sampling.min_p
            self._sampling.seed[slot] = sequence.seed
            self._stop_ids[slot] = -1
            self._stop_ids[slot, : len(stop_ids)] = stop_ids
        self._page_table[slot, pages.num_unchanged : len(pages.pages)] = pages.pages[pages.num_unchanged :]
        pages.num_unchanged = len(pages.pages)

    def _fill_tables(self, arrays: StepInput, index: np.ndarray, slots: np.ndarray, num_made: np.ndarray) -> None:
        """What the tables say of the sequences at `index` of the step, in those slots."""
        arrays.slots[index] = slots
        arrays.stop_ids[index] = self._stop_ids[slots]
        arrays.step.page_table[index] = self._page_table[slots]
        # Rows that make no token are greedy: drawing would cost, and nobody would look at it.
        arrays.sampling.temperature[index] = self._sampling.temperature[slots] * (num_made > 0)
        arrays.sampling.top_k[index] = self._sampling.top_k[slots]
        arrays.sampling.top_p[index] = self._sampling.top_p[slots]
        arrays.sampling.min_p[index] = self._sampling.min_p[slots]
        arrays.sampling.seed[index] = self._sampling.seed[slots]

    def _fill_decode(self, step: StepArrays, rows: _Rows, count: int) -> None:
        """count: of the rows, those that decode; they come first."""
        positions = rows.starts[:count]
        step.token_ids[:count] = rows.last_tokens[:count]
        step.positions[:count] = positions
        pages, offsets = np.divmod(positions, self._page_size)
        step.slots[:count] = self._page_table[rows.slots[:count], pages] * self._page_size + offsets
        step.kv_lens[:count] = positions + 1

    def _fill_prefill(self, step: StepArrays, rows: tuple[PlannedRow, ...], shape: StepShape) -> None:
        first = shape.num_decode_slots
        step.cu_q_lens[: first + 1] = np.arange(first + 1)
        step.last_token[:first] = step.cu_q_lens[:first]
        token = first
        for index, row in enumerate(rows, first):
            stop = row.start + row.num_tokens
            positions = np.arange(row.start, stop, dtype=np.int32)
            here = slice(token, token + row.num_tokens)
            step.token_ids[here] = row.sequence.tokens[row.start : stop]
            step.positions[here] = positions
            pages = step.page_table[index, positions // self._page_size]
            step.slots[here] = pages * self._page_size + positions % self._page_size
            step.kv_lens[index] = stop
            token += row.num_tokens
            step.cu_q_lens[index + 1] = token
            step.last_token[index] = token - 1
        step.cu_q_lens[first + len(rows) + 1 :] = token
        step.num_seqs[0] = first + len(rows)

    def _fill_families(self, planner: FamilyPlanner, vector: StepVector, plan: StepPlan, slots: np.ndarray) -> None:
        """Who shares cached pages. It is the same at every step in which the same sequences decode: pages they come to
        later are their own."""
        last, key, step, shape = self._decode_families, slots.tobytes(), vector.arrays.step, vector.shape
        if not plan.prefill and (last.shape, last.slots) == (shape, key):
            shared = last.shared
        else:
            shared = planner.plan(
                step.page_table,
                step.cu_q_lens,
                step.kv_lens,
                num_decode_slots=shape.num_decode_slots,
                num_tokens=shape.num_tokens,
            )
            if not plan.prefill:
                self._decode_families = _Families(shape, key, shared)
        if shared is vector.shared:
            return
        assert step.shared is not None
        for field, values in zip(step.shared, shared, strict=True):
            np.copyto(field, values)
        vector.shared = shared

    def _example(self, shape: StepShape) -> StepInput:
        def ints(*size: int) -> np.ndarray:
            return np.empty(size, np.int32)

        num_tokens, num_seqs = shape.num_tokens, shape.num_seqs
        return StepInput(
            step=StepArrays(
                token_ids=ints(num_tokens),
                positions=ints(num_tokens),
                slots=ints(num_tokens),
                page_table=ints(num_seqs, self._pages_per_seq),
                cu_q_lens=ints(num_seqs + 1),
                kv_lens=ints(num_seqs),
                num_seqs=ints(1),
                last_token=ints(num_seqs),
                shared=(
                    None
                    if self._families is None
                    else self._families.empty(
                        num_decode_slots=shape.num_decode_slots, num_tokens=num_tokens, num_seqs=num_seqs
                    )
                ),
            ),
            sampling=SamplingArrays.greedy(num_seqs),
            slots=ints(num_seqs),
            steps_left=ints(num_seqs),
            num_steps=ints(1),
            stop_ids=ints(num_seqs, MAX_STOP_IDS),
        )
