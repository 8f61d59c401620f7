"""Least added delay: the group where a request costs the least time, its own and that of others.

    added delay on group i = wait_i + own_i + overtaken_i + others * n * dear_i + decoding * n_i * rows      (seconds)

- wait_i: time until its turn comes. Queued on i are requests sent there whose first token has not come, and their
  prompt tokens have to be computed first. The groups' queues are fair between tenants: a tenant waits for what it has
  queued itself and for as much of each other tenant's, by their weights, not for a flood of somebody else's; so at most
  (its own queue and this request) * weights of tenants that have something queued / its own: `ahead`, of all queued
  tokens. And a group runs a number of sequences at a time, for which it has slots, and pages (of prompts only what was
  not there when they were sent): when as many are outstanding, one of them has to end first, and one more for each
  request that waits for the same and goes first, which is the share of ahead in what is queued. They end one per
  output's time in a full batch over their number.
- own_i: time to compute the tokens of its prompt that i does not hold. Every length of match is a candidate: a shorter
  one on an idle group is weighed against the longest one behind a queue.
- overtaken_i: what a tenant does not wait for waits for it instead. Each request that goes later for its sake is
  delayed by its tokens: the queued tokens that are not ahead, over what requests have queued on average.
- others * n * dear_i: while a group computes what another one holds already, those that come after it wait. n: requests
  outstanding for each group of the cluster, which stands for how many that will be. dear_i: time to compute the tokens
  that i lacks and another group holds, without those of prefixes that want more copies than there are.
  A prefix wants as many copies as its share of the window's requests makes of the groups (a half of the requests: half
  of the groups); a copy that is wanted is no waste, and costs its own time only. With h holders, of c copies wanted,
  min(max(h + 1 - c, 0), 1) of its tokens are dear. Where nothing is shared nothing is dear, and the shortest wait
  decides.
- decoding * n_i * rows: its output tokens lengthen the steps of the n_i requests that are on i, as theirs do its own.
  rows: what the output expected of it adds to steps that are run in any case. The average of all groups' outputs, not
  of i's: what is multiplied by n_i must not differ by chance. Its budget is one more of these outputs: until others are
  known it is all there is to tell how long slots will be taken.

Groups' queues are fair on each group; who waits on four of them gets more than who waits on one. So tenants count by
what they were given on all groups (`tenant_service`), where one has had more than another by more than a quantum a
group (that of `d2lpm`): what falls on tenants that had more than the request's is no cost (what it overtakes of them,
and of the price of work the share that they have queued on i); and its own wait weighs as much as the share of
outstanding requests that are of tenants that had no less. Who had more waits where its prefix is; who had less takes
the place of who had more.

So at low load, where n is 0, a prompt goes where its first token comes soonest, and hot prefixes spread over idle
groups by themselves; the fuller the cluster, the more an uncached token weighs, and the more prefixes stay where they
are, in as many copies as their traffic needs. There is no threshold: nothing is heavy or balanced, and what has ended
counts for a prefix's share only. Between equal costs the group with less work in the window wins, then `rank`: on an
idle cluster new prefixes go where the fewest were sent.

Prices are the same for all groups, the mean of what work costs on each: their fitted costs differ by noise, which n
would multiply. How long a group needs itself is told by its own. Prompt work weighed by the number of requests it
delays is LMetric's idea (arXiv 2603.15202); there it is a product with the group's own number.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable, Mapping
from itertools import islice, pairwise

from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.sched.assignment import Assignment
from preble_jax.sched.cost import CostModel
from preble_jax.sched.groups import Group
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Prefix, Proposal, Query, all_levels, slots_of
from preble_jax.sched.placement.tenant_service import Standing, TenantService

NUM_RANKED = 3  # the choice and two runners-up
NUM_LOOKED_AT = 64  # groups of one level, those with the fewest requests outstanding
LEAST_REQUESTS = 32  # of the window, for each group: with fewer, nothing is known of a prefix's share of them

Ranked = list[tuple[float, int, float, int]]
Levels = list[tuple[int, int]]


class LeastAddedDelay(PlacementPolicy):
    """The settings' delay_others and delay_decoding are the two weights; delay_without leaves terms out."""

    def __init__(self, settings: SchedSettings, tenants: TenantSettings) -> None:
        self._tenants = tenants
        self._service = TenantService(tenants)
        self._quantum = settings.d2lpm_quantum_tokens
        self._others = settings.delay_others
        self._decoding = settings.delay_decoding
        left_out = settings.terms_left_out
        self._slots, self._overtaken = "slots" not in left_out, "overtaken" not in left_out
        self._fair_queues = "tenants" not in left_out
        self._standing = "standing" not in left_out
        self._copies, self._shorter = "copies" not in left_out, "shorter" not in left_out

    def finished(
        self, assignment: Assignment, output_tokens: int, cached_tokens: int, failed: bool, now: float
    ) -> None:
        self._service.ended(assignment, output_tokens, cached_tokens, failed)

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        tenant = query.request.tenant
        tolerance = self._quantum * cluster.up.bit_count() if self._standing else math.inf
        standing = self._service.standing(tenant, tolerance)
        ranked: Ranked = []
        price = cluster.mean_cost
        others = self._others * cluster.num_outstanding / cluster.up.bit_count()
        levels = all_levels(query) if self._shorter else _longest_or_nothing(query)
        dear_tokens = _dear_tokens(levels, query, cluster) if self._copies else [levels[0][1] - n for _, n in levels]
        for (mask, tokens), dear in zip(levels, dear_tokens, strict=True):
            if mask:
                missed = query.request.num_tokens - tokens
                others_ns = others * price.prefill_ns(dear)
                # What all groups of this level cost at least; there may be a thousand of them.
                least_ns = price.prefill_ns(missed) + (0 if standing.ahead else others_ns)
                if cluster.uniform_cost and len(ranked) == NUM_RANKED and least_ns > ranked[-1][0]:
                    break
                self._rank(ranked, _worth_a_look(cluster, mask), missed, others_ns, query, cluster, price, standing)
        slots = [slot for _, _, _, slot in ranked]
        matched = next((tokens for mask, tokens in query.levels if mask >> slots[0] & 1), 0)
        self._service.placed(tenant, query.request.num_tokens - matched)
        return Proposal(slots, "exploit" if 2 * matched > query.request.num_tokens else "explore")

    def _rank(
        self,
        ranked: Ranked,
        groups: Iterable[Group],
        missed: int,
        others_ns: float,
        query: Query,
        cluster: Cluster,
        price: CostModel,
        standing: Standing,
    ) -> None:
        """Inserts the best of a level, in which every group has to compute `missed` tokens, which costs others_ns.

        A group is left out as soon as what is known of its delay is too much; an idle one has no queue and delays
        nobody that is there."""
        tenant = query.request.tenant
        own_ns = price.prefill_ns(missed)
        output = cluster.expected_output(query.request.max_tokens)
        rows_ns = self._decoding * price.row_ns(output)
        worst_ns = ranked[-1][0] if len(ranked) == NUM_RANKED else math.inf
        for group in groups:
            cost = group.cost
            delay_ns: float = own_ns if cost is price else cost.prefill_ns(missed)
            delay_ns += _due(others_ns, group, standing.ahead, cluster) if standing.ahead else others_ns
            if delay_ns > worst_ns:
                continue
            if group.num_outstanding:
                delay_ns += group.num_outstanding * rows_ns
                if delay_ns > worst_ns:
                    continue
                queued = group.queued_tokens
                ahead = self._tokens_ahead(group, tenant, missed) if self._fair_queues else queued
                wait_ns = cost.prefill_ns(ahead)
                if ahead < queued and self._overtaken:
                    later_ns = price.prefill_ns(queued + missed) - price.prefill_ns(queued)
                    better = standing.ahead
                    behind = self._tokens_behind(group, tenant, ahead, better) if better else queued - ahead
                    delay_ns += later_ns * behind * cluster.num_queued // cluster.queued_tokens
                if self._slots and 0 < (slots := group.num_slots) <= group.num_outstanding:
                    wait_ns += _wait_for_slot_ns(group, slots, ahead, cost.slot_ns(output, slots))
                delay_ns += wait_ns * standing.num_due // standing.num_requests
            if delay_ns <= worst_ns:
                insort(ranked, (delay_ns, group.load_ns, group.rank, group.slot))
                if len(ranked) >= NUM_RANKED:
                    del ranked[NUM_RANKED:]
                    worst_ns = ranked[-1][0]

    def _tokens_ahead(self, group: Group, tenant: str, missed: int) -> int:
        """Queued tokens that are computed before a request of the tenant, at most."""
        by_tenant = group.queued_by_tenant
        if len(by_tenant) < 2 and tenant in by_tenant:
            return group.queued_tokens
        own = by_tenant.get(tenant, 0) + missed
        return min(group.queued_tokens, int(own * self._total_weight(by_tenant, tenant) / self._tenants.weight(tenant)))

    def _tokens_behind(self, group: Group, tenant: str, ahead: int, better_served: frozenset[str]) -> int:
        """Queued tokens that are computed later for the sake of a request with so many ahead of it, without those of
        tenants that were given more than its own. Each tenant has a share ahead, by its weight."""
        by_tenant, weight = group.queued_by_tenant, self._tenants.weight
        total = self._total_weight(by_tenant, tenant)
        behind = sum(
            max(tokens - int(ahead * weight(name) / total), 0)
            for name, tokens in by_tenant.items()
            if name not in better_served
        )
        return min(behind, group.queued_tokens - ahead)

    def _total_weight(self, by_tenant: Mapping[str, int], tenant: str) -> float:
        """Of those that have something queued, and of the tenant."""
        if not self._tenants.weights:
            return len(by_tenant) + (tenant not in by_tenant)
        weight = self._tenants.weight
        return sum(map(weight, by_tenant)) + (0.0 if tenant in by_tenant else weight(tenant))


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


def _longest_or_nothing(query: Query) -> Levels:
    """Who holds less than the longest match counts as holding nothing."""
    longest = query.levels[:1]
    return [*longest, (query.eligible & ~sum(mask for mask, _ in longest), 0)]


def _worth_a_look(cluster: Cluster, mask: int) -> Iterable[Group]:
    """Those with the fewest requests outstanding, of a level that has too many groups; else all, in any order."""
    if mask.bit_count() <= NUM_LOOKED_AT:
        return map(cluster.at, slots_of(mask))
    return islice(cluster.by_queue(mask), NUM_LOOKED_AT)


def _due(others_ns: float, group: Group, better_served: frozenset[str], cluster: Cluster) -> float:
    """The price of work that others wait for, less the share that falls on tenants that were given more: what they have
    queued on the group, over what a group has queued on average."""
    by_tenant = group.queued_by_tenant
    theirs = sum(by_tenant.get(name, 0) for name in better_served) * cluster.up.bit_count()
    return others_ns * (1 - min(theirs / cluster.queued_tokens, 1.0)) if theirs else others_ns


def _wait_for_slot_ns(group: Group, slots: int, ahead: int, slot_ns: int) -> int:
    """Of a request that has so many queued tokens ahead of it, on a full group that frees a slot every slot_ns."""
    waiting = group.num_outstanding - slots
    return slot_ns + (waiting * slot_ns * ahead // group.queued_tokens if group.queued_tokens else 0)
