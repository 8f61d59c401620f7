"""What a device group has done since it started: steps, tokens, waiting, by tenant and in all.

The scheduler reads differences of these totals: step times for its cost model, waiting times for its load, service for
fairness. Written by the engine's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from preble_jax.request import RequestOutput
from preble_jax.sched.sequence import StepPlan

MAX_TENANTS = 1_000


@dataclass(kw_only=True)
class Work:
    """extend_tokens: prompt tokens computed, those computed again after a preemption included.

    admitted: requests that left the queue for the first time; queue_s: seconds they had waited in it, together.
    """

    extend_tokens: int = 0
    output_tokens: int = 0
    admitted: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TenantLoad:
    """One tenant on one device group: totals as in `Work`. deficit: service units, where the queue policy keeps any."""

    tenant: str
    extend_tokens: int
    output_tokens: int
    admitted: int
    queue_s: float
    deficit: float | None = None


class Ledger:
    """steps, decode_rows, step_s: of all steps, how many, single-token rows in them, seconds they took.

    finished: requests that ended in a step. step_s_recent: exponential mean. total: of all tenants. The MAX_TENANTS
    that were active last are kept apart; one that returns later starts from zero.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.decode_rows = 0
        self.step_s = 0.0
        self.step_s_recent = 0.0
        self.finished = 0
        self.total = Work()
        self._tenants: OrderedDict[str, Work] = OrderedDict()

    def planned(self, plan: StepPlan, now: float) -> None:
        """Call before the step runs. Notes on each sequence that was just admitted how long it waited."""
        for row in plan.rows:
            sequence = row.sequence
            if sequence.queue_s is None:
                sequence.queue_s = max(0.0, now - sequence.arrival_s)
                for work in (self.total, self._work(sequence.request.tenant)):
                    work.admitted += 1
                    work.queue_s += sequence.queue_s

    def ran(self, plan: StepPlan, outputs: Iterable[RequestOutput], seconds: float) -> None:
        """Call after the step was settled. outputs: what it made, and requests that ended meanwhile."""
        self.steps += 1
        self.decode_rows += len(plan.decode)
        self.step_s += seconds
        self.step_s_recent = seconds if self.steps == 1 else 0.9 * self.step_s_recent + 0.1 * seconds
        for row in plan.prefill:
            for work in (self.total, self._work(row.sequence.request.tenant)):
                work.extend_tokens += row.num_tokens
        tenant_of = {row.sequence.request.request_id: row.sequence.request.tenant for row in plan.rows}
        for output in outputs:
            self.finished += output.finished
            num_tokens = len(output.token_ids)
            if num_tokens:
                for work in (self.total, self._work(tenant_of[output.request_id])):
                    work.output_tokens += num_tokens

    def tenants(self, deficits: Mapping[str, float]) -> tuple[TenantLoad, ...]:
        """Least recently active first."""
        return tuple(
            TenantLoad(
                tenant=tenant,
                extend_tokens=work.extend_tokens,
                output_tokens=work.output_tokens,
                admitted=work.admitted,
                queue_s=work.queue_s,
                deficit=deficits.get(tenant),
            )
            for tenant, work in self._tenants.items()
        )

    def _work(self, tenant: str) -> Work:
        work = self._tenants.get(tenant)
        if work is None:
            work = self._tenants[tenant] = Work()
            if len(self._tenants) > MAX_TENANTS:
                self._tenants.popitem(last=False)
        else:
            self._tenants.move_to_end(tenant)
        return work
