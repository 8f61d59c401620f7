"""Local queues as their papers write them, slow and literal: at each step everything is looked at again.

Every oracle has the same face: `arrive`, `step`, `output`, `end`. `step` admits up to `slots` requests and returns them
in order; a request in `awaiting` needs a page that is being computed, and cannot be admitted in this step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from fractions import Fraction


@dataclass
class Job:
    """extend: tokens to charge at admission; 0 when it was admitted before and preempted."""

    order: int
    tenant: str
    num_tokens: int
    cached: int = 0
    extend: int = 0


class Tenants:
    """Weights and prices, and who has requests in the system."""

    def __init__(self, weight: Callable[[str], float], extend_weight: float, output_weight: float) -> None:
        self.weight = weight
        self.w_e = extend_weight
        self.w_q = output_weight


class PaperLPM:
    def __init__(self) -> None:
        self.queue: list[Job] = []

    def arrive(self, job: Job) -> None:
        self.queue.append(job)

    def step(self, slots: int, awaiting: Collection[int]) -> list[int]:
        order = sorted(self.queue, key=lambda r: (-r.cached, r.order))
        admitted = [r for r in order if r.order not in awaiting][:slots]
        self.queue = [r for r in self.queue if r not in admitted]
        return [r.order for r in admitted]

    def output(self, job: Job) -> None:
        pass

    def give_back(self, job: Job, tokens: int) -> None:
        pass

    def end(self, job: Job) -> None:
        self.queue = [r for r in self.queue if r is not job]


class PaperFCFS(PaperLPM):
    def step(self, slots: int, awaiting: Collection[int]) -> list[int]:
        order = sorted(self.queue, key=lambda r: r.order)
        admitted = [r for r in order if r.order not in awaiting][:slots]
        self.queue = [r for r in self.queue if r not in admitted]
        return [r.order for r in admitted]


class PaperPriorityGroups(PaperLPM):
    """Preble, section 3.3; the proportion is kept by start-time fair queueing of the groups."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.virtual = [0.0] * num_groups
        self.occupied_before = [False] * num_groups
        self.present = 0.0

    def group(self, job: Job) -> int:
        return min(int(self.num_groups * job.cached / job.num_tokens + 1e-9), self.num_groups - 1)

    def step(self, slots: int, awaiting: Collection[int]) -> list[int]:
        occupied = [any(self.group(r) == g for r in self.queue) for g in range(self.num_groups)]
        stayed = [
            v for v, now, before in zip(self.virtual, occupied, self.occupied_before, strict=True) if now and before
        ]
        for g in range(self.num_groups):
            if occupied[g] and not self.occupied_before[g]:
                self.virtual[g] = max(self.virtual[g], min(stayed) if stayed else self.present)
        self.occupied_before = occupied
        admitted: list[int] = []
        untried = sorted(self.queue, key=lambda r: r.order)
        while untried and len(admitted) < slots:
            group = min((self.virtual[self.group(r)], -self.group(r)) for r in untried)[1] * -1
            first = next(r for r in untried if self.group(r) == group)
            untried.remove(first)
            if first.order not in awaiting:
                self.queue.remove(first)
                self.present = self.virtual[group]
                self.virtual[group] += 1.0 / (group + 1)
                admitted.append(first.order)
        return admitted


class PaperVTC(PaperLPM):
    """arXiv 2401.00588, algorithm 2, with weights. The least-served tenant is never overtaken: if all it has waits for
    pages, the step ends."""

    def __init__(self, tenants: Tenants) -> None:
        super().__init__()
        self.tenants = tenants
        self.c: dict[str, float] = {}
        self.last_left: str | None = None

    def arrive(self, job: Job) -> None:
        u = job.tenant
        self.c.setdefault(u, 0.0)
        if not any(r.tenant == u for r in self.queue):
            if not self.queue:
                if self.last_left is not None:
                    self.c[u] = max(self.c[u], self.c[self.last_left])
            else:
                self.c[u] = max(self.c[u], min(self.c[r.tenant] for r in self.queue))
        self.queue.append(job)

    def leave(self, job: Job) -> None:
        self.queue.remove(job)
        if not any(r.tenant == job.tenant for r in self.queue):
            self.last_left = job.tenant

    def step(self, slots: int, awaiting: Collection[int]) -> list[int]:
        admitted: list[int] = []
        while self.queue and len(admitted) < slots:
            k = min(sorted(self.queue, key=lambda r: r.order), key=lambda r: self.c[r.tenant]).tenant
            mine = sorted((r for r in self.queue if r.tenant == k and r.order not in awaiting), key=lambda r: r.order)
            if not mine:
                break
            self.c[k] += self.tenants.w_e * mine[0].extend / self.tenants.weight(k)
            self.leave(mine[0])
            admitted.append(mine[0].order)
        return admitted

    def output(self, job: Job) -> None:
        self.c[job.tenant] += self.tenants.w_q / self.tenants.weight(job.tenant)

    def give_back(self, job: Job, tokens: int) -> None:
        self.c[job.tenant] -= self.tenants.w_e * tokens / self.tenants.weight(job.tenant)

    def end(self, job: Job) -> None:
        if job in self.queue:
            self.leave(job)


class PaperDLPM(PaperLPM):
    """arXiv 2501.14312, algorithm 1, with four changes: a refill, or a pass that admitted somebody, begins a new pass;
    the quantum goes by weight; what is given back lifts nobody above a quantum; idle tenants that owe nothing are
    forgotten at a refill."""

    def __init__(self, tenants: Tenants, quantum: float) -> None:
        super().__init__()
        self.tenants = tenants
        self.quantum = quantum
        self.q: dict[str, float] = {}
        self.present: list[Job] = []  # waiting and running

    def place(self, job: Job) -> tuple[Fraction | int, int]:
        return (-job.cached, job.order)

    def arrive(self, job: Job) -> None:
        self.q.setdefault(job.tenant, 0.0)
        self.queue.append(job)
        if job not in self.present:
            self.present.append(job)

    def refill(self) -> bool:
        if any(self.q[r.tenant] > 0 for r in self.queue):
            return False
        for i in self.q:
            if self.q[i] <= 0:
                self.q[i] += self.quantum * self.tenants.weight(i)
        busy = {r.tenant for r in self.present}
        self.q = {i: q for i, q in self.q.items() if i in busy or q <= 0}
        return True

    def step(self, slots: int, awaiting: Collection[int]) -> list[int]:
        admitted: list[int] = []
        again = True
        while again:
            again = False
            for r in sorted(self.queue, key=self.place):
                if len(admitted) == slots:
                    return admitted
                if self.q[r.tenant] <= 0 and self.refill():
                    again = True
                    break
                if self.q[r.tenant] > 0 and r.order not in awaiting:
                    self.admit(r)
                    admitted.append(r.order)
                    again = True
        return admitted

    def admit(self, job: Job) -> None:
        self.q[job.tenant] -= self.tenants.w_e * job.extend
        self.queue.remove(job)

    def output(self, job: Job) -> None:
        self.q[job.tenant] -= self.tenants.w_q

    def give_back(self, job: Job, tokens: int) -> None:
        quantum = self.quantum * self.tenants.weight(job.tenant)
        self.q[job.tenant] = min(self.q[job.tenant] + self.tenants.w_e * tokens, quantum)

    def end(self, job: Job) -> None:
        super().end(job)
        self.present = [r for r in self.present if r is not job]


class NaiveFair(PaperDLPM):
    """No paper's: DLPM, in the order of (the extend tokens of all admissions before the arrival, plus `head_start` for
    each token that is not cached, rounded down; order of arrival)."""

    def __init__(self, tenants: Tenants, quantum: float, head_start: float) -> None:
        super().__init__(tenants, quantum)
        self.head_start = Fraction(head_start)
        self.charged: list[int] = []  # by admission; what is given back is not taken out
        self.num_before: dict[int, int] = {}  # order -> admissions before its first arrival

    def place(self, job: Job) -> tuple[Fraction | int, int]:
        arrived = sum(self.charged[: self.num_before[job.order]])
        return (arrived + self.head_start * (job.num_tokens - job.cached) // 1, job.order)

    def arrive(self, job: Job) -> None:
        self.num_before.setdefault(job.order, len(self.charged))
        super().arrive(job)

    def admit(self, job: Job) -> None:
        super().admit(job)
        self.charged.append(job.extend)
