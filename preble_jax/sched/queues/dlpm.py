"""DLPM: longest prefix match among the tenants that still have a deficit to spend (arXiv 2501.14312, algorithm 1).

Every tenant has a deficit q, 0 when first seen. The queue is walked by longest match; a request may go if its tenant's
q is positive, and costs it the request's extend tokens at once and each output token as it comes. When nobody who waits
has a positive q, everybody known with q <= 0 gets a quantum, again and again until somebody who waits may go.

Between two tenants of weights w with requests waiting all along, |W_f / w_f - W_g / w_g| <= 2 (U + Q), where
U = (extend_weight * longest prompt + output_weight * M) / least weight and M is the number of output tokens that the
requests of one running batch can make; a tenant with requests waiting falls no further behind one without. For a refill
finds every waiting tenant at q <= 0, so that all get the same number of quanta, and -U <= q / w <= Q at any time.

Where this goes beyond the paper:
- The refills until somebody may go are counted in closed form, and nobody is touched by them: a deficit is stated as of
  a round and brought up to date when it is next looked at. Tenants wait in a bucket for the round that makes them
  positive; a refill takes the next bucket. So a step costs the same with ten tenants or ten thousand.
- After a refill the walk begins again from the longest match. The paper's goes on from where it was, so that a longer
  match passed over a moment ago is left for the next step.
- A tenant's quantum is proportional to its weight.
- Who pays for a prefix that several tenants share: whoever's miss computed it. Those that wait for its pages, and all
  later ones, pay for their own extend tokens only.
- A tenant with nothing waiting or running is forgotten at the next refill if it owes nothing (at once if it has nothing
  either), else at the refill that pays its debt: leaving and coming back neither clears a debt nor saves up.
- What is given back for a prompt that ended half computed never lifts q above a quantum, which the bound rests on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq

from preble_jax.config import TenantSettings
from preble_jax.sched.queues.base import CachedTokens
from preble_jax.sched.queues.by_match import RankedByMatch, match_key
from preble_jax.sched.queues.ordered import Ordered
from preble_jax.sched.sequence import Sequence

_MAX_FORGOTTEN = 8  # idle tenants that one refill, or one new tenant, makes forget at most


class _Tenant:
    """deficit: in service units, as of refill round `round`. quantum: what a refill adds.

    home, head: the bucket it waits in, under the key of its best request; None while nothing of it waits.
    forget_at: the round at which it is to be forgotten if it is idle then; None: none is noted.
    """

    __slots__ = ("deficit", "forget_at", "head", "home", "name", "quantum", "round", "unfinished", "waiting")

    def __init__(self, name: str, quantum: float, round_: int) -> None:
        self.name = name
        self.quantum = quantum
        self.deficit = 0.0
        self.round = round_
        self.waiting: Ordered[int, Sequence] = Ordered()  # by DLPM._key
        self.unfinished: set[int] = set()  # orders of requests that wait or run
        self.home: Ordered[int, _Tenant] | None = None
        self.head = 0
        self.forget_at: int | None = None

    @property
    def num_refills_due(self) -> int:
        """Refills until the deficit is positive."""
        return 0 if self.deficit > 0 else int(-self.deficit // self.quantum) + 1

    def settle(self, round_: int) -> None:
        """Books the refills since the deficit was last stated: one a round for as long as it is not positive."""
        if self.deficit <= 0 and round_ != self.round:
            self.deficit += min(round_ - self.round, self.num_refills_due) * self.quantum
        self.round = round_


class DLPM(RankedByMatch):
    """quantum: service units a refill gives to a tenant of weight 1."""

    def __init__(self, settings: TenantSettings, quantum: float) -> None:
        super().__init__()
        self._settings = settings
        self._quantum = quantum
        self._tenants: dict[str, _Tenant] = {}
        self.num_refills = 0  # rounds so far; how fast it grows tells how hard tenants press
        self._ready: Ordered[int, _Tenant] = Ordered()  # tenants with requests waiting and q > 0, by their best request
        self._later: dict[int, Ordered[int, _Tenant]] = {}  # round -> those that it will make positive
        self._rounds: list[int] = []  # heap of the keys of _later
        self._idle: list[tuple[int, str]] = []  # heap of (forget_at, name)

    # -- the queue ---------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self._tenant(sequence).unfinished.add(sequence.order)
        super().add(sequence)

    def _place(self, sequence: Sequence, cached: int) -> None:
        tenant = self._tenant(sequence)
        tenant.waiting.insert(self._key(sequence, cached), sequence)
        self._rehome(tenant)

    def _displace(self, sequence: Sequence, cached: int) -> None:
        tenant = self._tenant(sequence)
        tenant.waiting.pop(self._key(sequence, cached))
        self._rehome(tenant)

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        self._rank_unsure(cached_tokens)
        while len(self):
            if not len(self._ready):
                self._refill()
            yield from self._walk()
            if len(self._ready):  # all that may go have been proposed, and what is left waits for pages
                return

    def _key(self, sequence: Sequence, cached: int) -> int:
        """What a waiting request is ordered by, the least first; equal keys never. Changes with `cached` alone."""
        return match_key(sequence, cached)

    def _walk(self) -> Iterator[Sequence]:
        """Requests of tenants with q > 0, longest match first, each once: a merge of the tenants' own orders.

        A tenant is found by its best request in `_ready`. One whose best request was passed over in this walk is found
        by its next one in `passed`.
        """
        last: int | None = None
        passed: list[tuple[int, _Tenant]] = []  # heap
        while True:
            key = self._ready.after(last)
            if passed and (key is None or passed[0][0] < key):
                key, tenant = heapq.heappop(passed)
            elif key is not None:
                tenant = self._ready[key]
            else:
                return
            yield tenant.waiting[key]
            last = key
            if tenant.home is self._ready and tenant.head <= key:
                following = tenant.waiting.after(key)
                if following is not None:
                    heapq.heappush(passed, (following, tenant))

    # -- accounts ----------------------------------------------------------------------------------

    def served(self, sequence: Sequence, extend_tokens: int, output_tokens: int) -> None:
        tenant = self._tenants.get(sequence.request.tenant) or self._tenant(sequence)
        if tenant.round != self.num_refills:
            tenant.settle(self.num_refills)
        deficit = tenant.deficit - self._settings.service(extend_tokens, output_tokens)
        tenant.deficit = deficit = deficit if deficit < tenant.quantum else tenant.quantum
        home = tenant.home
        if home is not None and (deficit <= 0 or home is not self._ready):  # mostly it stays where it is
            self._rehome(tenant)

    def finished(self, sequence: Sequence) -> None:
        tenant = self._tenant(sequence)
        tenant.unfinished.discard(sequence.order)
        if not tenant.unfinished:
            self._note_idle(tenant)

    def victim(self, running: Seq[Sequence]) -> Sequence:
        """The latest arrival of the tenant that has least left to spend, in quanta of its own."""
        return max(running, key=lambda sequence: (-self._quanta_left(self._tenant(sequence)), sequence.order))

    def deficits(self) -> Mapping[str, float]:
        """What each tenant may still spend before the next refill; negative: what it owes."""
        for tenant in self._tenants.values():
            tenant.settle(self.num_refills)
        return {name: tenant.deficit for name, tenant in self._tenants.items()}

    def _quanta_left(self, tenant: _Tenant) -> float:
        tenant.settle(self.num_refills)
        return tenant.deficit / tenant.quantum

    def _tenant(self, sequence: Sequence) -> _Tenant:
        name = sequence.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            self._forget_idle()
            quantum = self._quantum * self._settings.weight(name)
            tenant = self._tenants[name] = _Tenant(name, quantum, self.num_refills)
        return tenant

    # -- buckets and rounds ------------------------------------------------------------------------

    def _rehome(self, tenant: _Tenant) -> None:
        """Puts the tenant into the bucket of the round that makes it positive, under its best request."""
        head, home = tenant.waiting.first(), None
        if head is not None:
            tenant.settle(self.num_refills)
            home = self._bucket(tenant.num_refills_due)
            if home is tenant.home and head == tenant.head:
                return
        if tenant.home is not None:
            tenant.home.pop(tenant.head)
        tenant.home = home
        if home is not None and head is not None:
            tenant.head = head
            home.insert(head, tenant)

    def _bucket(self, num_refills_due: int) -> Ordered[int, _Tenant]:
        if num_refills_due == 0:
            return self._ready
        round_ = self.num_refills + num_refills_due
        bucket = self._later.get(round_)
        if bucket is None:
            bucket = self._later[round_] = Ordered()
            heapq.heappush(self._rounds, round_)
        return bucket

    def _refill(self) -> None:
        """As many refills as it takes until a tenant that waits may go. Nobody may, and somebody waits."""
        while True:
            self.num_refills = heapq.heappop(self._rounds)
            self._ready = self._later.pop(self.num_refills)
            if len(self._ready):  # else those it was made for have left
                break
        self._forget_idle()

    def _note_idle(self, tenant: _Tenant) -> None:
        tenant.settle(self.num_refills)
        if tenant.deficit == 0:  # as one that was never seen
            del self._tenants[tenant.name]
            return
        forget_at = self.num_refills + max(tenant.num_refills_due, 1)
        if tenant.forget_at is None or forget_at < tenant.forget_at:
            tenant.forget_at = forget_at
            heapq.heappush(self._idle, (forget_at, tenant.name))

    def _forget_idle(self) -> None:
        for _ in range(_MAX_FORGOTTEN):
            if not self._idle or self._idle[0][0] > self.num_refills:
                return
            forget_at, name = heapq.heappop(self._idle)
            tenant = self._tenants.get(name)
            if tenant is None or tenant.forget_at != forget_at:
                continue
            tenant.forget_at = None
            tenant.settle(self.num_refills)
            if tenant.unfinished:
                continue  # noted again when it is idle again
            if tenant.deficit > 0:
                del self._tenants[name]
            else:  # it came back in the meantime, and owes more now
                self._note_idle(tenant)
