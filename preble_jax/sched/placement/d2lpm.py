"""D2LPM: locality within what each tenant is due on each group (arXiv 2501.14312, algorithm 2).

G = the groups that hold the longest match; available = the groups on which the tenant's deficit is positive, all of its
deficits being refilled by a quantum while there is none. The request goes to the shortest queue in G ∩ available, else
in available. It is charged its prompt tokens at dispatch and its output tokens at the end. With DLPM in the groups'
queues, two tenants of weight 1 that have requests waiting in every group all along receive service that differs by at
most 2 |W| (U + Q), W the groups, U = extend_weight * longest prompt + output_weight * tokens of a running batch.

Where this goes beyond the paper:
- The refill loop is closed in one step (`Deficits.refill`); groups that may not take the request are not refilled.
- A tenant's quantum is proportional to its weight.
- Dispatch is charged with the *extend* tokens expected, corrected at the end by what the group says it computed. So a
  prefix that several tenants share is paid for by the one whose miss computed it. A failed request stays charged as it
  was: the group may have done the work, and cancelling must not be a way to be served for nothing.
- A tenant with nothing outstanding, and nothing placed for a window H, is forgotten. Nothing is gained by that: a debt
  here never makes anybody wait, it only says where the tenant goes.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.sched.assignment import Assignment
from preble_jax.sched.messages import PolicyStats, TenantStats
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, affinity, slots_of
from preble_jax.sched.placement.deficits import Deficits

MAX_ROWS = 1_000


class _Account:
    __slots__ = ("deficits", "num_outstanding", "num_placed", "placed_at", "weight")

    def __init__(self, weight: float, quantum: float) -> None:
        self.weight = weight
        self.deficits = Deficits(weight * quantum)
        self.num_placed = 0
        self.num_outstanding = 0
        self.placed_at = 0.0


class D2LPM(PlacementPolicy):
    def __init__(self, settings: SchedSettings, tenants: TenantSettings) -> None:
        self._quantum = float(settings.d2lpm_quantum_tokens)
        self._idle_s = settings.window_s
        self._tenants = tenants
        self._accounts: OrderedDict[str, _Account] = OrderedDict()  # those placed latest last

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        account = self._account(query.request.tenant)
        while not (available := account.deficits.available(query.eligible)):  # twice only if a sum was rounded
            account.deficits.refill(query.eligible)
        longest = query.levels[0][0] if query.levels else query.eligible
        slot = _shortest_queue(longest & available or available, cluster)
        cached = next((tokens for mask, tokens in query.levels if mask >> slot & 1), 0)
        account.deficits.add(slot, -self._tenants.service(query.request.num_tokens - cached, 0))
        account.num_placed += 1
        account.num_outstanding += 1
        account.placed_at = query.now
        return Proposal([slot], affinity(slot, query))

    def finished(
        self, assignment: Assignment, output_tokens: int, cached_tokens: int, failed: bool, now: float
    ) -> None:
        account = self._accounts[assignment.tenant]  # not forgotten while something is outstanding
        account.num_outstanding -= 1
        group = assignment.group
        if group.state == "gone" or group.cursor.generation != assignment.generation:
            return  # the process it was charged on has taken its deficits along
        computed = assignment.missed_tokens if failed else assignment.num_tokens - cached_tokens
        owed = self._tenants.service(computed - assignment.missed_tokens, output_tokens)
        account.deficits.add(assignment.group.slot, -owed)

    def group_added(self, slot: int) -> None:
        self.group_removed(slot)

    def group_removed(self, slot: int) -> None:
        for account in self._accounts.values():
            account.deficits.forget(slot)

    def tick(self, cluster: Cluster, now: float) -> None:
        """Forgets idle tenants. One that still has something outstanding is looked at again after those behind it."""
        while self._accounts:
            tenant, account = next(iter(self._accounts.items()))
            if account.placed_at + self._idle_s > now:
                break
            if account.num_outstanding:
                self._accounts.move_to_end(tenant)
                account.placed_at = now
            else:
                del self._accounts[tenant]

    def stats(self, cluster: Cluster) -> PolicyStats:
        """Rows of the MAX_ROWS tenants that placed last: names are the clients' to invent."""
        rows = {
            tenant: TenantStats(
                weight=account.weight,
                deficits={cluster.at(slot).name: account.deficits[slot] for slot in slots_of(cluster.up)},
                num_placed=account.num_placed,
                num_refills=account.deficits.num_refills,
                refill_pressure=account.deficits.num_refills / max(account.num_placed, 1),
            )
            for tenant, account in islice(reversed(self._accounts.items()), MAX_ROWS)
        }
        return PolicyStats(counters={"tenants": len(self._accounts)}, tenants=rows)

    def _account(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(self._tenants.weight(tenant), self._quantum)
        else:
            self._accounts.move_to_end(tenant)
        return account


def _shortest_queue(mask: int, cluster: Cluster) -> int:
    """Fewest requests sent and not ended."""
    queues = ((group.num_outstanding, group.rank, group.slot) for group in map(cluster.at, slots_of(mask)))
    return min(queues)[2]
