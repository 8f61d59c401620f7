"""D2LPM before groups that serve by DLPM: two tenants with requests waiting in every group all along receive service
that differs by at most 2 |W| (U + Q), whatever arrives when."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.dlpm_workers import DLPMWorker, Job
from oracles.naive_forest import chain
from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.sched import GlobalScheduler, PlaceRequest

PAGE_SIZE = 4
MAX_PAGES, MAX_OUTPUTS, MAX_RUNNING = 6, 4, 2
QUANTUM = 10.0

Arrival = tuple[str, int, int, int]  # tenant, which prefix, own pages, output tokens


class Cluster:
    """service: per step, each tenant's service so far over its weight. backlogged: who waits in every group."""

    def __init__(
        self, tenants: TenantSettings, num_groups: int, *, fair: bool = True, placement: str = "d2lpm"
    ) -> None:
        self.tenants = tenants
        self.scheduler = GlobalScheduler(
            SchedSettings(placement=placement, d2lpm_quantum_tokens=int(QUANTUM), group_timeout_s=1e9),
            PAGE_SIZE,
            tenants=tenants,
        )
        self.workers = {
            str(i): DLPMWorker(
                quantum=QUANTUM,
                extend_weight=tenants.extend_weight,
                output_weight=tenants.output_weight,
                weight=tenants.weight,
                max_running=MAX_RUNNING,
                page_size=PAGE_SIZE,
                fair=fair,
            )
            for i in range(num_groups)
        }
        for name in self.workers:
            self.scheduler.add_group(name, 10_000, 1, 0.0)
        self.now = 0.0
        self.num_jobs = 0
        self.service: list[dict[str, float]] = []
        self.backlogged: list[set[str]] = []

    @property
    def bound(self) -> float:
        """2 |W| (U + Q); U of the least weight."""
        least = min((weight for _, weight in self.tenants.weights), default=1.0)
        prompt, outputs = (MAX_PAGES + 1) * PAGE_SIZE, MAX_RUNNING * MAX_OUTPUTS
        return 2 * len(self.workers) * (self.tenants.service(prompt, outputs) / min(least, 1.0) + QUANTUM)

    def arrive(self, tenant: str, prefix: int, own: int, num_outputs: int) -> None:
        self.num_jobs += 1
        own_pages = [100 + self.num_jobs % 100, self.num_jobs // 100, *range(own)][:own]
        prompt = chain([prefix] * (MAX_PAGES - own) + own_pages)
        num_tokens = len(prompt) * PAGE_SIZE + 1
        job = Job(str(self.num_jobs), tenant, prompt, num_tokens, num_outputs)
        request = PlaceRequest(request_id=job.name, block_hashes=prompt, num_tokens=num_tokens, tenant=tenant)
        self.workers[self.scheduler.place(request, self.now).group].submit(job)

    def step(self) -> None:
        waiting = [{job.tenant for job in worker.queue} for worker in self.workers.values()]
        for worker in self.workers.values():
            for job in worker.step():
                self.scheduler.finished(job.name, job.produced, job.cached, self.now)
        self.now += 1.0
        names = {tenant for worker in self.workers.values() for tenant in worker.service}
        total = {t: sum(worker.service[t] for worker in self.workers.values()) for t in names}
        self.service.append({t: units / self.tenants.weight(t) for t, units in total.items()})
        still = [{job.tenant for job in worker.queue} for worker in self.workers.values()]
        self.backlogged.append(set.intersection(*waiting, *still))

    def gaps(self, one: str, other: str) -> Iterable[tuple[float, int]]:
        """(greatest difference of service within, steps) of each stretch in which both were backlogged."""
        ahead: list[float] = []
        before = 0.0
        for service, backlogged in zip(self.service, self.backlogged, strict=True):
            now = service.get(one, 0.0) - service.get(other, 0.0)
            if {one, other} <= backlogged:
                ahead = [*ahead, now] if ahead else [before, now]
            elif ahead:
                yield max(ahead) - min(ahead), len(ahead)
                ahead = []
            before = now
        if ahead:
            yield max(ahead) - min(ahead), len(ahead)


arrivals = st.lists(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.integers(0, MAX_PAGES), st.integers(1, MAX_OUTPUTS)),
        max_size=6,
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals,
    st.integers(1, 3),
    st.lists(st.integers(5, 60), min_size=3, max_size=3),
    st.sampled_from([(), (("b", 2.0),), (("a", 0.5), ("c", 3.0))]),
    st.integers(0, 2**16),
)
def test_service_of_backlogged_tenants_differs_by_no_more_than_the_bound(
    later: list[list[Arrival]], num_groups: int, first: list[int], weights: tuple, seed: int
) -> None:
    cluster = Cluster(TenantSettings(weights=weights), num_groups)
    random_ = random.Random(seed)
    for tenant, num in zip("abc", first, strict=True):
        for _ in range(num):
            cluster.arrive(tenant, random_.randrange(4), random_.randrange(MAX_PAGES + 1), 1 + random_.randrange(4))
    for arrived in [*later, *[[]] * 60]:
        for arrival in arrived:
            cluster.arrive(*arrival)
        cluster.step()
    for one, other in combinations("abc", 2):
        assert all(gap <= cluster.bound for gap, _ in cluster.gaps(one, other))
    cluster.scheduler.validate()


def greedy_and_modest(*, fair: bool, placement: str) -> tuple[float, int, float]:
    """(greatest gap, steps backlogged, bound): one tenant sends six times what the other does."""
    cluster = Cluster(TenantSettings(), 2, fair=fair, placement=placement)
    random_ = random.Random(1)
    for _ in range(200):
        for tenant, num in (("greedy", 12), ("modest", 2)):
            for _ in range(num):
                cluster.arrive(tenant, 0 if tenant == "greedy" else 1, 1 + random_.randrange(5), MAX_OUTPUTS)
        cluster.step()
    gap, num_steps = max(cluster.gaps("greedy", "modest"))
    return gap, num_steps, cluster.bound


def test_a_greedy_tenant_gains_nothing() -> None:
    gap, num_steps, bound = greedy_and_modest(fair=True, placement="d2lpm")
    assert num_steps > 150 and gap <= bound


def test_the_bound_is_one_that_can_be_broken() -> None:
    """First come, first served gives each what it sends."""
    gap, num_steps, bound = greedy_and_modest(fair=False, placement="d2lpm")
    assert num_steps > 150 and gap > 2 * bound
