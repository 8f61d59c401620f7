"""A step plan as the arrays the compiled step takes. Host work only, numpy."""

from __future__ import annotations

import numpy as np

from preble_jax.engine.shapes import StepShape
from preble_jax.model.decoder import StepArrays
from preble_jax.model.sampling import SamplingArrays
from preble_jax.sched.sequence import PlannedRow, StepPlan

_HOTTEST = 1e30  # uniform over the vocabulary long before; stays a float32


class ArrayBuilder:
    """num_pages, page_size: of the pool. pages_per_seq: columns of the page table."""

    def __init__(self, num_pages: int, page_size: int, pages_per_seq: int) -> None:
        self._page_size = page_size
        self._pages_per_seq = pages_per_seq
        self._no_slot = num_pages * page_size

    def build(self, plan: StepPlan, shape: StepShape) -> tuple[StepArrays, SamplingArrays]:
        """Unused decode slots have no keys, unused tokens no slot, unused sequences no tokens."""
        step = self._empty(shape)
        settings = SamplingArrays.greedy(shape.num_seqs)
        for index, row in enumerate(plan.decode):
            self._fill(step, settings, row, index, index)
        token = shape.num_decode_slots
        for index, row in enumerate(plan.prefill, shape.num_decode_slots):
            self._fill(step, settings, row, index, token)
            token += row.num_tokens
            step.cu_q_lens[index + 1] = token
        step.cu_q_lens[shape.num_decode_slots + len(plan.prefill) + 1 :] = token
        step.num_seqs[0] = shape.num_decode_slots + len(plan.prefill)
        return step, settings

    def rows(self, plan: StepPlan, shape: StepShape) -> np.ndarray:
        """Where in the step's results the rows of the plan are, in `plan.rows`' order."""
        prefill = shape.num_decode_slots + np.arange(len(plan.prefill))
        return np.concatenate([np.arange(len(plan.decode)), prefill]).astype(np.int64)

    def _empty(self, shape: StepShape) -> StepArrays:
        def zeros(*size: int) -> np.ndarray:
            return np.zeros(size, np.int32)

        cu_q_lens = np.minimum(np.arange(shape.num_seqs + 1, dtype=np.int32), shape.num_decode_slots)
        return StepArrays(
            token_ids=zeros(shape.num_tokens),
            positions=zeros(shape.num_tokens),
            slots=np.full(shape.num_tokens, self._no_slot, np.int32),
            page_table=zeros(shape.num_seqs, self._pages_per_seq),
            cu_q_lens=cu_q_lens,
            kv_lens=zeros(shape.num_seqs),
            num_seqs=zeros(1),
            last_token=zeros(shape.num_seqs),
        )

    def _fill(self, step: StepArrays, settings: SamplingArrays, row: PlannedRow, index: int, token: int) -> None:
        sequence, start, stop = row.sequence, row.start, row.start + row.num_tokens
        assert sequence.pages is not None
        pages = np.asarray(sequence.pages.pages, np.int32)
        positions = np.arange(start, stop, dtype=np.int32)
        here = slice(token, token + row.num_tokens)
        step.token_ids[here] = sequence.tokens[start:stop]
        step.positions[here] = positions
        step.slots[here] = pages[positions // self._page_size] * self._page_size + positions % self._page_size
        step.page_table[index, : len(pages)] = pages
        step.kv_lens[index] = stop
        step.last_token[index] = token + row.num_tokens - 1
        sampling = sequence.request.sampling
        if row.samples and not sampling.greedy:
            settings.temperature[index] = min(sampling.temperature, _HOTTEST)
            settings.top_k[index] = sampling.top_k
            settings.top_p[index] = sampling.top_p
            settings.min_p[index] = sampling.min_p
            settings.seed[index] = sequence.seed
            settings.num_made[index] = sequence.num_output
