"""A set of workers that serve by DLPM's pseudo-code (arXiv 2501.14312, algorithm 1), step by step: just enough of a
device group to see how much service each tenant receives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class Job:
    """prompt: blocks of `page_size` tokens. num_outputs: tokens it will produce, at least 1."""

    name: str
    tenant: str
    prompt: tuple[bytes, ...]
    num_tokens: int
    num_outputs: int
    cached: int = 0
    produced: int = 0


class DLPMWorker:
    """weight: of a tenant. max_running: requests that decode at a time. fair: False serves first come, first served."""

    def __init__(
        self,
        *,
        quantum: float,
        extend_weight: float,
        output_weight: float,
        weight: Callable[[str], float],
        max_running: int,
        page_size: int,
        fair: bool = True,
    ) -> None:
        self.quantum = quantum
        self.extend_weight = extend_weight
        self.output_weight = output_weight
        self.weight = weight
        self.max_running = max_running
        self.page_size = page_size
        self.fair = fair
        self.queue: list[Job] = []
        self.running: list[Job] = []
        self.cache: set[bytes] = set()
        self.q: dict[str, float] = {}
        self.service: Counter[str] = Counter()

    def submit(self, job: Job) -> None:
        self.q.setdefault(job.tenant, 0.0)
        self.queue.append(job)

    def step(self) -> list[Job]:
        """Returns the jobs that ended."""
        if self.fair:
            for job in sorted(self.queue, key=lambda job: -self.matched(job)):
                if self.q[job.tenant] <= 0:
                    self.try_refill()
                if self.q[job.tenant] > 0 and len(self.running) < self.max_running:
                    self.admit(job)
        else:
            for job in self.queue[: self.max_running - len(self.running)]:
                self.admit(job)
        for job in self.running:
            job.produced += 1
            self.charge(job.tenant, self.output_weight)
        ended = [job for job in self.running if job.produced == job.num_outputs]
        self.running = [job for job in self.running if job.produced < job.num_outputs]
        return ended

    def try_refill(self) -> None:
        if all(self.q[job.tenant] <= 0 for job in self.queue):
            for tenant in self.q:
                if self.q[tenant] <= 0:
                    self.q[tenant] += self.quantum * self.weight(tenant)

    def admit(self, job: Job) -> None:
        self.queue.remove(job)
        self.running.append(job)
        job.cached = self.matched(job)
        self.cache.update(job.prompt)
        self.charge(job.tenant, self.extend_weight * (job.num_tokens - job.cached))

    def charge(self, tenant: str, units: float) -> None:
        self.q[tenant] -= units
        self.service[tenant] += units

    def matched(self, job: Job) -> int:
        blocks = next((k for k, block in enumerate(job.prompt) if block not in self.cache), len(job.prompt))
        return min(blocks, (job.num_tokens - 1) // self.page_size) * self.page_size
