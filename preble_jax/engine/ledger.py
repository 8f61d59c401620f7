"""What a device group has done since it started: steps, tokens, waiting, by tenant and in all.

The scheduler reads differences of these totals: step times for its cost model, waiting times for its load, service for
fairness. Written by the engine's thread alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

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


@dataclass(kw_only=True)
class StepTimes:
    """Seconds of one dispatch, or of all of them. The host's work, by part:

    plan_s:     deciding who runs, on which pages.
    arrays_s:   the plan as arrays.
    dispatch_s: handing them, and the program, to the device.
    settle_s:   booking the results.

    wait_s:     that the host stood still for results.
    device_s:   from the dispatch, or from the results before it if they came later, to the results.
    step_s:     the same with the host's work that no earlier step hid: these add up to the time the engine was busy.
    """

    plan_s: float = 0.0
    arrays_s: float = 0.0
    dispatch_s: float = 0.0
    settle_s: float = 0.0
    wait_s: float = 0.0
    device_s: float = 0.0
    step_s: float = 0.0

    @property
    def host_s(self) -> float:
        return self.plan_s + self.arrays_s + self.dispatch_s + self.settle_s

    def add(self, other: StepTimes) -> None:
        for name in _TIME_NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_TIME_NAMES = tuple(field.name for field in fields(StepTimes))


class Ledger:
    """steps, decode_rows: of all dispatches, how many steps, and single-token rows in them. A dispatch is one step, or
    several decode steps. times: of all of them together.

    finished: requests that ended in a step. step_s_recent, decode_step_s: exponential means of seconds a step, and a
    step that only decodes (0: none yet). total: of all tenants. The MAX_TENANTS that were active last are kept apart;
    one that returns later starts from zero.
    """

    def __init__(self) -> None:
        self.dispatches = 0
        self.steps = 0
        self.decode_rows = 0
        self.times = StepTimes()
        self.step_s_recent = 0.0
        self.decode_step_s = 0.0
        self.finished = 0
        self.total = Work()
        self._tenants: OrderedDict[str, Work] = OrderedDict()

    @property
    def step_s(self) -> float:
        return self.times.step_s

    @property
    def host_s(self) -> float:
        return self.times.host_s

    @property
    def device_s(self) -> float:
        return self.times.device_s

    def planned(self, plan: StepPlan, now: float) -> None:
        """Call before the step runs. Notes on each sequence that was just admitted how long it waited."""
        for row in plan.rows:
            sequence = row.sequence
            if sequence.queue_s is None:
                sequence.queue_s = max(0.0, now - sequence.arrival_s)
                for work in (self.total, self._work(sequence.request.tenant)):
                    work.admitted += 1
                    work.queue_s += sequence.queue_s

    def ran(self, plan: StepPlan, outputs: Iterable[RequestOutput], num_steps: int, times: StepTimes) -> None:
        """Call after a dispatch was settled. outputs: what it made, and requests that ended meanwhile. num_steps: that
        the device ran; it leaves off when all rows have stopped."""
        self.dispatches += 1
        self.steps += num_steps
        self.decode_rows += sum([min(row.num_tokens, num_steps) for row in plan.decode])
        self.times.add(times)
        if num_steps:
            self.step_s_recent = _mean(self.step_s_recent, times.step_s / num_steps)
            if not plan.prefill:
                self.decode_step_s = _mean(self.decode_step_s, times.device_s / num_steps)
        for row in plan.prefill:
            for work in (self.total, self._work(row.sequence.request.tenant)):
                work.extend_tokens += row.num_tokens
        requests = [row.sequence.request for row in plan.rows]
        tenant_of = {request.request_id: request.tenant for request in requests}
        tokens_of: dict[str, int] = {}  # tenants, the one seen last at the end
        for output in outputs:
            self.finished += output.finish_reason is not None
            if num_tokens := len(output.token_ids):
                tenant = tenant_of[output.request_id]
                tokens_of[tenant] = tokens_of.pop(tenant, 0) + num_tokens
        for tenant, num_tokens in tokens_of.items():
            for work in (self.total, self._work(tenant)):
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


def _mean(mean: float, value: float) -> float:
    """The exponential mean after one more value; 0 is none yet."""
    return 0.9 * mean + 0.1 * value if mean else value
