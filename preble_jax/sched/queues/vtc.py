"""VTC: the virtual token counter, fair shares of service between tenants (OSDI 2024, arXiv 2401.00588, algorithm 2).

Every tenant has a counter of the service it has received over its weight. The tenant with the least counter is admitted
next, its earliest request first. A tenant that comes to an empty-handed queue (nothing of its own waits) is lifted to
the least counter of those that have requests waiting, or when nobody does, to that of the tenant whose request left the
queue last: credit is not saved up while idle.

Service is computed prompt tokens (so a cached prefix is free to whoever did not compute it) and output tokens, priced
by the tenants section; the paper prices whole prompts. Between two tenants with requests waiting all along,
|W_f / w_f - W_g / w_g| <= 2 U, where U = (extend_weight * longest prompt + output_weight * M) / least weight and M is
the number of output tokens that the requests of one running batch can make: a tenant is admitted only while its counter
is the least, so that it gets ahead by one prompt, and after that by no more than what already runs still makes.

If all that waits of the least-served tenant needs a page which a running sequence is computing, the walk ends: nobody
overtakes. Budget can be left over then, but only in the step in which that page is finished.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from preble_jax.config import TenantSettings
from preble_jax.sched.queues.base import CachedTokens, QueuePolicy
from preble_jax.sched.queues.ordered import Ordered
from preble_jax.sched.sequence import Sequence

_MAX_FORGOTTEN = 8  # idle tenants that one arrival forgets, at most: arrivals bring one at a time


class _Tenant:
    """counter: service received, over weight. rank: its place among those with requests waiting, None if it has none:
    of equal counters, the one whose earliest request came first goes first."""

    __slots__ = ("counter", "idle_at", "name", "rank", "unfinished", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.waiting: Ordered[int, Sequence] = Ordered()  # by order
        self.unfinished: set[int] = set()  # orders of requests that wait or run
        self.rank: tuple[float, int] | None = None
        self.idle_at: float | None = None  # the counter under which it was last put among the idle


class VTC(QueuePolicy):
    def __init__(self, settings: TenantSettings) -> None:
        self._settings = settings
        self._tenants: dict[str, _Tenant] = {}
        self._queued: Ordered[tuple[float, int], _Tenant] = Ordered()  # those with requests waiting, by rank
        self._last_to_leave: _Tenant | None = None
        self._idle: list[tuple[float, str]] = []  # heap of (counter, name); those that came back are skipped
        self._num_waiting = 0

    # -- the queue ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        tenant.unfinished.add(sequence.order)
        if tenant.rank is None:
            tenant.counter = max(tenant.counter, self._floor())
        tenant.waiting.insert(sequence.order, sequence)
        self._num_waiting += 1
        self._rerank(tenant)
        self._forget_idle()

    def remove(self, sequence: Sequence) -> None:
        tenant = self._tenants.get(sequence.request.tenant)
        if tenant is None or sequence.order not in tenant.waiting or tenant.waiting[sequence.order] is not sequence:
            raise KeyError(f"request {sequence.request.request_id!r} is not waiting")
        tenant.waiting.pop(sequence.order)
        self._num_waiting -= 1
        self._rerank(tenant)
        if tenant.rank is None:
            self._last_to_leave = tenant

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        passed: dict[str, int] = {}  # tenant -> the last of its requests that was proposed
        while (rank := self._queued.first()) is not None:
            tenant = self._queued[rank]
            order = tenant.waiting.after(passed.get(tenant.name))
            if order is None:
                return
            passed[tenant.name] = order
            yield tenant.waiting[order]

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for tenant in self._queued for sequence in tenant.waiting)

    # -- accounts ----------------------------------------------------------------------------------

    def served(self, sequence: Sequence, extend_tokens: int, output_tokens: int) -> None:
        tenant = self._tenant(sequence)
        tenant.counter += self._settings.service(extend_tokens, output_tokens) / tenant.weight
        self._rerank(tenant)

    def finished(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        tenant.unfinished.discard(sequence.order)
        if not tenant.unfinished and tenant.idle_at != tenant.counter:
            tenant.idle_at = tenant.counter
            heapq.heappush(self._idle, (tenant.counter, tenant.name))

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """The latest arrival of the tenant that has received most."""
        return max(running, key=lambda sequence: (self._tenant(sequence).counter, sequence.order))

    def deficits(self) -> Mapping[str, float]:
        """How far each tenant's counter is below (negative: above) the least one of those with requests waiting."""
        floor = self._floor()
        return {name: (floor - tenant.counter) * tenant.weight for name, tenant in self._tenants.items()}

    def _tenant(self, sequence: Sequence) -> _Tenant:
        name = sequence.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, self._settings.weight(name))
        return tenant

    def _rerank(self, tenant: _Tenant) -> None:
        """Its counter or its earliest request has changed."""
        if tenant.rank is not None:
            self._queued.pop(tenant.rank)
            tenant.rank = None
        earliest = tenant.waiting.first()
        if earliest is not None:
            tenant.rank = (tenant.counter, earliest)
            self._queued.insert(tenant.rank, tenant)

    def _floor(self) -> float:
        """What a tenant that comes to an empty-handed queue is lifted to."""
        rank = self._queued.first()
        if rank is not None:
            return rank[0]
        return self._last_to_leave.counter if self._last_to_leave else 0.0

    def _forget_idle(self) -> None:
        """An idle tenant at or below the floor would be lifted to it on its return: its counter says nothing more."""
        floor = self._floor()
        for _ in range(_MAX_FORGOTTEN):
            if not self._idle or self._idle[0][0] > floor:
                return
            counter, name = heapq.heappop(self._idle)
            tenant = self._tenants.get(name)
            if tenant is None or tenant.idle_at != counter:
                continue
            tenant.idle_at = None
            if not tenant.unfinished and tenant.counter == counter:
                del self._tenants[name]
