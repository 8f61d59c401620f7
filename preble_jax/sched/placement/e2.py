"""E2, exploitation and exploration, of Preble (ICLR 2025, arXiv 2407.00023, section 3.2 and algorithm 1).

A request whose prompt is cached for the greater part goes to the groups that hold the longest match, to the one of
lowest load cost among them (exploit). Another goes first to a group that mostly decodes, because prefill work fills the
compute that decoding leaves idle (balance), else to the group of lowest load cost of all (explore).

Load cost of group i, in nanoseconds of its device: L_i + M_i + P_i.
- L_i: over requests assigned within the window H, prefill_time(missed tokens) + decode_time(average output on i in H).
- M_i: over the nodes LRU would evict on i to make room, prefill_time(tokens) * N_j, N_j = the share of i's requests in
  H that used node j.
- P_i: prefill_time(tokens of this prompt that i does not hold).

Two adjustments keep exploits from drowning a group:
- Rebalance: an exploit that would go to the group of greatest L goes to the group of least L instead, while the load
  cost of the first exceeds Th_bal times that of the second and more requests are outstanding there. The cost counts
  the request itself, and L is history: a cluster with next to nothing to do is not out of balance, and where nobody
  waits there is nothing to gain from leaving the prefix. (The paper's condition is on loads alone.)
- Autoscale: see preble_jax.sched.placement.autoscale.
"""

from __future__ import annotations

from bisect import insort

from preble_jax.config import SchedSettings
from preble_jax.sched.assignment import Assignment
from preble_jax.sched.groups import Group
from preble_jax.sched.messages import PolicyStats
from preble_jax.sched.placement.autoscale import Autoscaler
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query

NUM_RANKED = 3  # the choice and two runners-up

Levels = list[tuple[int, int]]


class E2(PlacementPolicy):
    """The settings' imbalance_ratio is IMBAL_R, its rebalance_ratio Th_bal."""

    def __init__(self, settings: SchedSettings) -> None:
        self._imbalance_ratio = settings.imbalance_ratio
        self._rebalance_ratio = settings.rebalance_ratio if settings.rebalance else None
        self._autoscaler = Autoscaler(settings.window_s, settings.autoscale_ratio) if settings.autoscale else None
        self._heavy = 0  # a slot that was the heaviest lately; saves looking for it

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        cached = query.levels[0][1] if query.levels else 0
        if query.request.num_tokens - cached < cached:
            return self._exploit(query, cluster)
        decoding = self._mostly_decoding(query, cluster)
        if decoding is not None:
            return Proposal([decoding], "balance")
        unmatched = query.eligible
        for mask, _ in query.levels:
            unmatched ^= mask
        return Proposal(self._cheapest([*query.levels, (unmatched, 0)], query, cluster), "explore")

    def queued(self, assignment: Assignment, queue_s: float, cluster: Cluster, now: float) -> None:
        if self._autoscaler is not None:
            self._autoscaler.queued(assignment, queue_s, cluster, now)

    def tick(self, cluster: Cluster, now: float) -> None:
        if self._autoscaler is not None:
            self._autoscaler.tick(cluster, now)

    def group_added(self, slot: int) -> None:
        self.group_removed(slot)

    def group_removed(self, slot: int) -> None:
        if self._autoscaler is not None:
            self._autoscaler.forget_group(slot)

    def stats(self, cluster: Cluster) -> PolicyStats:
        scaler = self._autoscaler
        if scaler is None:
            return PolicyStats()
        counters = {"replicas": len(scaler), "replicated": scaler.num_replicated, "retired": scaler.num_retired}
        return PolicyStats(counters=counters)

    # --- inside

    def _exploit(self, query: Query, cluster: Cluster) -> Proposal:
        levels = query.levels[:1]
        hashes = query.request.block_hashes
        replicated = self._autoscaler.find(hashes) if self._autoscaler is not None else None
        if replicated is not None:
            slot = replicated.take(hashes, query.eligible)
            if slot is not None:
                return Proposal([slot], "exploit" if levels[0][0] >> slot & 1 else "replicate")
            levels = _without(replicated.retired, query) or levels
        mask = levels[0][0]
        alone = not mask & (mask - 1)
        slots = [mask.bit_length() - 1] if alone else self._cheapest(levels, query, cluster)
        if self._rebalance_ratio is not None:
            lightest = self._lightest_instead(slots[0], query, cluster, self._rebalance_ratio)
            if lightest is not None:
                return Proposal([lightest, *slots[: NUM_RANKED - 1]], "rebalance")
        return Proposal(slots, "exploit")

    def _cheapest(self, levels: Levels, query: Query, cluster: Cluster) -> list[int]:
        """Slots by cost, the cheapest NUM_RANKED of all groups in `levels`. Those of a level are looked at by L, until
        L leaves no chance; M is worked out only where L + P leaves one."""
        ranked: list[tuple[int, float, int]] = []
        for mask, tokens in levels:
            missed = query.request.num_tokens - tokens
            num_pages = -(-missed // query.page_size)
            for group in cluster.by_load(mask):
                cost_ns = group.load_ns + group.cost.prefill_ns(missed)
                if len(ranked) == NUM_RANKED and (cost_ns, group.rank) > ranked[-1]:
                    # P is the same in the level if the cost model is; those that follow have more L, or a later rank.
                    if cluster.uniform_cost or group.load_ns > ranked[-1][0]:
                        break
                    continue
                cost_ns += cluster.eviction_ns(group, num_pages, query)
                insort(ranked, (cost_ns, group.rank, group.slot))
                del ranked[NUM_RANKED:]
        return [slot for _, _, slot in ranked]

    def _mostly_decoding(self, query: Query, cluster: Cluster) -> int | None:
        """The group with the greatest share of decoding in L, if that exceeds the ratio."""
        first = next(iter(cluster.by_decode_share(query.eligible)))
        return first.slot if first.decode_share > self._imbalance_ratio else None

    def _lightest_instead(self, slot: int, query: Query, cluster: Cluster, ratio: float) -> int | None:
        """The group to redirect an exploit of `slot` to; None when it is not the heaviest, or not by so much."""
        group, known = cluster.at(slot), self._heavy
        if not group.num_outstanding:
            return None
        if known != slot and query.eligible >> known & 1 and cluster.at(known).load_ns > group.load_ns:
            return None
        heaviest = cluster.heaviest(query.eligible)
        self._heavy = heaviest.slot
        if heaviest is not group:
            return None
        lightest = next(iter(cluster.by_load(query.eligible)))
        if lightest.num_outstanding >= group.num_outstanding:
            return None
        if _cost_ns(group, query, cluster) <= ratio * _cost_ns(lightest, query, cluster):
            return None
        return lightest.slot


def _cost_ns(group: Group, query: Query, cluster: Cluster) -> int:
    """L + M + P."""
    cached = next((tokens for mask, tokens in query.levels if mask >> group.slot & 1), 0)
    missed = query.request.num_tokens - cached
    eviction_ns = cluster.eviction_ns(group, -(-missed // query.page_size), query)
    return group.load_ns + eviction_ns + group.cost.prefill_ns(missed)


def _without(retired: int, query: Query) -> Levels:
    """The longest match on groups that are not retired, if it is still the greater part of the prompt."""
    for mask, tokens in query.levels if retired else ():
        if mask & ~retired and query.request.num_tokens - tokens < tokens:
            return [(mask & ~retired, tokens)]
    return []
