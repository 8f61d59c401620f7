"""What a simulated group's steps cost, and what they came to."""

from __future__ import annotations

from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.sequence import StepPlan
from preble_jax.sched.step_fit import StepTotals
from preble_jax.sim.cost.base import StepCost, StepWork
from preble_jax.sim.record import GroupRecord


class StepLedger:
    """record: of all processes of the group. Counts as preble_jax.engine.ledger does: the last token of a prompt, when
    it is all that is left of it, is a row that decodes.

    decode_steps, max_dispatch_s: as in EngineSettings.
    """

    def __init__(self, group: str, cost: StepCost, *, decode_steps: int, max_dispatch_s: float) -> None:
        self.cost = cost
        self.record = GroupRecord(group=group)
        self._decode_steps = decode_steps
        self._max_dispatch_s = max_dispatch_s
        self.start()

    def start(self) -> None:
        """Another process."""
        self._steps = self._extended = self._decoded = 0
        self._seconds = 0.0
        self._decode_step_s = 0.0  # exponential mean of steps that only decode

    @property
    def longest_shared_s(self) -> float:
        """Steps that take longer never share a dispatch."""
        return self._max_dispatch_s / 4 if self._decode_steps > 1 else 0.0

    @property
    def totals(self) -> StepTotals:
        """Of the process that runs, as its reports say."""
        return StepTotals(self._steps, self._extended, self._decoded, self._seconds)

    def max_steps(self) -> int:
        """Decode steps in a dispatch, as preble_jax.engine.Engine has them."""
        if not self._decode_step_s or self._decode_steps == 1:
            return 1
        return max(1, min(self._decode_steps, int(self._max_dispatch_s / (2 * self._decode_step_s))))

    def busy_s(self, plan: StepPlan, cache: PrefixCache) -> float:
        """Seconds of all steps of a dispatch that was just planned."""
        decode = plan.decode
        unique = (cache.pool.num_pages - cache.num_available) * cache.page_size
        chunks = [(num_tokens, start + num_tokens) for _, start, num_tokens, _ in plan.prefill]
        context = sum([start for _, start, _, _ in decode]) + len(decode)
        seconds = self.cost.step_s(StepWork(len(decode), context, chunks, unique))
        for step in range(1, plan.num_steps):
            rows = [row for row in decode if row.num_made > step]
            context = sum([row.start for row in rows]) + (step + 1) * len(rows)
            seconds += self.cost.step_s(StepWork(len(rows), context, (), unique))
        return seconds

    def count(self, plan: StepPlan, busy_s: float) -> None:
        """A dispatch has ended."""
        record = self.record
        num_extend = plan.num_prefill_tokens
        num_decoded = len(plan.decode) if plan.num_steps == 1 else sum([row.num_tokens for row in plan.decode])
        record.busy_s += busy_s
        record.num_steps += plan.num_steps
        record.extend_tokens += num_extend
        record.output_tokens += num_decoded + sum([row.num_made for row in plan.prefill])
        self._steps += plan.num_steps
        self._extended += num_extend
        self._decoded += num_decoded
        self._seconds += busy_s
        if not plan.prefill:
            self._note_decode_step(busy_s / plan.num_steps)

    def count_decode(self, num_rows: int, busy_s: float) -> None:
        """As `count`, of one step that only decodes."""
        record = self.record
        record.busy_s += busy_s
        record.num_steps += 1
        record.output_tokens += num_rows
        self._steps += 1
        self._decoded += num_rows
        self._seconds += busy_s
        self._note_decode_step(busy_s)

    def book(self, scheduler: LocalScheduler) -> None:
        """Moves what the scheduler of this process has counted into the record."""
        record, cache = self.record, scheduler.cache
        record.num_preemptions += scheduler.num_preemptions
        record.num_evicted += cache.num_evicted
        record.cached_tokens += scheduler.num_cached_tokens
        scheduler.num_preemptions = cache.num_evicted = scheduler.num_cached_tokens = 0

    def _note_decode_step(self, step_s: float) -> None:
        mean = self._decode_step_s
        self._decode_step_s = 0.9 * mean + 0.1 * step_s if mean else step_s
