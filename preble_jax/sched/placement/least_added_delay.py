"""Least added delay: the group where a request costs the least time, its own and that of others.

    added delay on group i = wait_i + own_i + others * n * dear_i + decoding * n_i * rows      (seconds)

- wait_i: time to compute what is queued on i and will go first. Queued: prompt tokens of requests sent there whose
  first token has not come. The groups' queues are fair between tenants: a tenant waits for what it has queued itself
  and for as much of each other tenant's, not for a flood of somebody else's; so at most (its own queue and this
  request) * tenants that have something queued.
- own_i: time to compute the tokens of its prompt that i does not hold. Every length of match is a candidate: a shorter
  one on an idle group is weighed against the longest one behind a queue.
- others * n * dear_i: while a group computes what another one holds already, those that come after it wait. n: requests
  outstanding for each group of the cluster, which stands for how many that will be. dear_i: time to compute the tokens
  that i lacks and another group holds, without those of prefixes that want more copies than there are.
  A prefix wants as many copies as its share of the window's requests makes of the groups (a half of the requests: half
  of the groups); a copy that is wanted is no waste, and costs its own time only. With h holders, of c copies wanted,
  min(max(h + 1 - c, 0), 1) of its tokens are dear. Where nothing is shared nothing is dear, and the shortest wait
  decides.
- decoding * n_i * rows: its output tokens lengthen the steps of the n_i requests that are on i, as theirs do its own.
  rows: what the output expected of it adds to steps that are run in any case.

So at low load, where n is 0, a prompt goes where its first token comes soonest, and hot prefixes spread over idle
groups by themselves; the fuller the cluster, the more an uncached token weighs, and the more prefixes stay where they
are, in as many copies as their traffic needs. There is no threshold: nothing is heavy or balanced, and what has ended
counts for a prefix's share only. Between equal costs the group with less work in the window wins, then `rank`: on an
idle cluster new prefixes go where the fewest were sent.

Prices are those of one group, the others' fitted costs differ from it by noise, which n would multiply; how long a
group needs itself is told by its own. Prompt work weighed by the number of requests it delays is LMetric's idea (arXiv
2603.15202); there it is a product with the group's own number.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from itertools import islice, pairwise

from preble_jax.config import SchedSettings
from preble_jax.sched.cost import CostModel
from preble_jax.sched.groups import Group
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Prefix, Proposal, Query, all_levels, slots_of

NUM_RANKED = 3  # the choice and two runners-up
NUM_LOOKED_AT = 64  # groups of one level, those with the fewest requests outstanding
LEAST_REQUESTS = 32  # of the window, for each group: with fewer, nothing is known of a prefix's share of them

Ranked = list[tuple[float, int, float, int]]
Levels = list[tuple[int, int]]


class LeastAddedDelay(PlacementPolicy):
    """The settings' delay_others and delay_decoding are the two weights."""

    def __init__(self, settings: SchedSettings) -> None:
        self._others = settings.delay_others
        self._decoding = settings.delay_decoding

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        ranked: Ranked = []
        price = cluster.at((query.eligible & -query.eligible).bit_length() - 1).cost
        others = self._others * cluster.num_outstanding / cluster.up.bit_count()
        levels = all_levels(query)
        for (mask, tokens), dear in zip(levels, _dear_tokens(levels, query, cluster), strict=True):
            if mask:
                missed = query.request.num_tokens - tokens
                others_ns = others * price.prefill_ns(dear)
                # What all groups of this level cost at least; there may be a thousand of them.
                least_ns = price.prefill_ns(missed) + others_ns
                if cluster.uniform_cost and len(ranked) == NUM_RANKED and least_ns > ranked[-1][0]:
                    break
                self._rank(ranked, _worth_a_look(cluster, mask), missed, others_ns, query, price)
        slots = [slot for _, _, _, slot in ranked]
        matched = next((tokens for mask, tokens in query.levels if mask >> slots[0] & 1), 0)
        return Proposal(slots, "exploit" if 2 * matched > query.request.num_tokens else "explore")

    def _rank(
        self, ranked: Ranked, groups: Iterable[Group], missed: int, others_ns: float, query: Query, price: CostModel
    ) -> None:
        """Inserts the best of a level, in which every group has to compute `missed` tokens, which costs others_ns.

        A group is left out as soon as what is known of its delay is too much; an idle one has no queue and delays
        nobody that is there."""
        tenant, max_tokens = query.request.tenant, query.request.max_tokens
        own_ns = price.prefill_ns(missed)
        worst_ns = ranked[-1][0] if len(ranked) == NUM_RANKED else math.inf
        for group in groups:
            cost = group.cost
            delay_ns = (own_ns if cost is price else cost.prefill_ns(missed)) + others_ns
            if delay_ns > worst_ns:
                continue
            if group.num_outstanding:
                rows_ns = price.row_ns(group.expected_output(max_tokens))
                delay_ns += self._decoding * group.num_outstanding * rows_ns
                if delay_ns > worst_ns:
                    continue
                delay_ns += cost.prefill_ns(_tokens_ahead(group, tenant, missed))
            if delay_ns <= worst_ns:
                insort(ranked, (delay_ns, group.load_ns, group.rank, group.slot))
                if len(ranked) >= NUM_RANKED:
                    del ranked[NUM_RANKED:]
                    worst_ns = ranked[-1][0]


def _dear_tokens(levels: Levels, query: Query, cluster: Cluster) -> list[int]:
    """Of each level, how many tokens its groups compute although others hold them, without those of prefixes that want
    more copies than there are. In integers, rounded down for each length of match."""
    num_groups = query.eligible.bit_count()
    num_requests = max(cluster.num_assigned, LEAST_REQUESTS * num_groups)
    dear, found, holders = 0, [], 0
    for (mask, tokens), (_, fewer) in pairwise(levels):
        found.append(dear)
        holders |= mask
        num_blocks = tokens // query.page_size
        uses = cluster.requests_of(Prefix(query.request.block_hashes[num_blocks - 1], num_blocks))
        too_many = (holders.bit_count() + 1) * num_requests - num_groups * sum(uses.values())  # times num_requests
        dear += (tokens - fewer) * min(max(too_many, 0), num_requests) // num_requests
    return [*found, dear]


def _worth_a_look(cluster: Cluster, mask: int) -> Iterable[Group]:
    """Those with the fewest requests outstanding, of a level that has too many groups; else all, in any order."""
    if mask.bit_count() <= NUM_LOOKED_AT:
        return map(cluster.at, slots_of(mask))
    return islice(cluster.by_queue(mask), NUM_LOOKED_AT)


def _tokens_ahead(group: Group, tenant: str, missed: int) -> int:
    """Queued tokens that are computed before a request of the tenant, at most."""
    by_tenant = group.queued_by_tenant
    if len(by_tenant) < 2 and tenant in by_tenant:
        return group.queued_tokens
    num_tenants = len(by_tenant) + (tenant not in by_tenant)
    return min(group.queued_tokens, (by_tenant.get(tenant, 0) + missed) * num_tenants)
