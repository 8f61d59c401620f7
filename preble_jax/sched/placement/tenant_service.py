"""What tenants were given on all groups together, while they had requests there: who has had more than whom.

A tenant's count starts when it has a request outstanding and ends when it has none; who comes starts at the least
count of those that are there (as in VTC, arXiv 2401.00588): nothing is saved up, and nothing owed to who was not there.
Counts are service units over the tenant's weight: at dispatch the prompt tokens to be computed, corrected at the end,
and the output then. A group's own fair queue shares out that group; that one waits on one group and another on four
shows in the sum alone.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from preble_jax.config import TenantSettings
from preble_jax.sched.assignment import Assignment

NUM_LOOKED_AT = 64  # tenants a decision, those that have been there longest


class Standing(NamedTuple):
    """ahead: tenants that were given more than the one in question. Of requests outstanding (num_requests, its new one
    included), num_due are those of tenants that were given no less than it. Of NUM_LOOKED_AT tenants, if there are
    more."""

    ahead: frozenset[str]
    num_due: int
    num_requests: int


class _Count:
    __slots__ = ("given", "num_outstanding")

    def __init__(self, given: float) -> None:
        self.given = given
        self.num_outstanding = 0


class TenantService:
    def __init__(self, tenants: TenantSettings) -> None:
        self._tenants = tenants
        self._counts: dict[str, _Count] = {}

    def standing(self, tenant: str, tolerance: float) -> Standing:
        """tolerance: units by which counts may differ and still be taken for equal."""
        counts = self._counts
        if not counts or (len(counts) == 1 and tenant in counts):
            return Standing(frozenset(), 1, 1)
        mine = counts[tenant].given if tenant in counts else self._least()
        ahead, num_due, num_requests = [], 1, 1
        for name, count in islice(counts.items(), NUM_LOOKED_AT):
            num_requests += count.num_outstanding
            if count.given >= mine - tolerance:
                num_due += count.num_outstanding
            if count.given > mine + tolerance:
                ahead.append(name)
        return Standing(frozenset(ahead), num_due, num_requests)

    def placed(self, tenant: str, missed_tokens: int) -> None:
        count = self._counts.get(tenant)
        if count is None:
            count = self._counts[tenant] = _Count(self._least())
        count.num_outstanding += 1
        count.given += self._tenants.service(missed_tokens, 0) / self._tenants.weight(tenant)

    def ended(self, assignment: Assignment, output_tokens: int, cached_tokens: int, failed: bool) -> None:
        """A failed request stays charged as it was: the group may have done the work."""
        tenant = assignment.tenant
        count = self._counts[tenant]
        count.num_outstanding -= 1
        if not count.num_outstanding:
            del self._counts[tenant]
        elif not failed:
            extend = assignment.num_tokens - cached_tokens - assignment.missed_tokens
            count.given += self._tenants.service(extend, output_tokens) / self._tenants.weight(tenant)

    def _least(self) -> float:
        return min((count.given for count in islice(self._counts.values(), NUM_LOOKED_AT)), default=0.0)
