"""E2, exploitation and exploration, of Preble (ICLR 2025, arXiv 2407.00023, section 3.2 and algorithm 1).

A request whose prompt is cached for the greater part goes to the groups that hold the longest match, to the one of
lowest load cost among them (exploit). Another goes first to a group that mostly decodes, because prefill work fills the
compute that decoding leaves idle (balance), else to the group of lowest load cost of all (explore).

Load cost of group i, in nanoseconds of its device: L_i + M_i + P_i.
- L_i: over requests assigned within the window H, prefill_time(missed tokens) + decode_time(average output on i in H).
- M_i: over the nodes LRU would evict on i to make room, prefill_time(tokens) * N_j, N_j = the share of i's requests in
  H that used node j.
- P_i: prefill_time(tokens of this prompt that i does not hold).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from preble_jax.sched.cost import CostModel
from preble_jax.sched.placement.base import Cluster, Proposal, Query, slots_of

NUM_RANKED = 3  # the choice and two runners-up


class E2:
    """imbalance_ratio: IMBAL_R, the share of decoding in a group's L above which it is sent prefill work.

    The adjustments after assignment (redirecting exploits of an overloaded group, replicating a hot prefix) change
    the candidates: they come between `query.levels` and `_cheapest`, and feed on the same window sums.
    """

    def __init__(self, cost: CostModel, imbalance_ratio: float) -> None:
        self._cost = cost
        self._imbalance_ratio = imbalance_ratio

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        cached = query.levels[0][1] if query.levels else 0
        if query.request.num_tokens - cached < cached:
            return Proposal(self._cheapest(query.levels[:1], query, cluster), "exploit")
        decoding = self._mostly_decoding(query, cluster)
        if decoding is not None:
            return Proposal([decoding], "balance")
        unmatched = query.eligible
        for mask, _ in query.levels:
            unmatched ^= mask
        return Proposal(self._cheapest([*query.levels, (unmatched, 0)], query, cluster), "explore")

    def _cheapest(self, levels: Iterable[tuple[int, int]], query: Query, cluster: Cluster) -> list[int]:
        """Slots by cost, the cheapest NUM_RANKED. M is worked out only where L + P leaves a chance."""
        ranked: list[tuple[int, float, int]] = []
        for mask, tokens in levels:
            missed = query.request.num_tokens - tokens
            prefill_ns = self._cost.prefill_ns(missed)
            num_pages = -(-missed // query.page_size)
            for slot in slots_of(mask):
                group = cluster.at(slot)
                cost_ns = group.load_ns + prefill_ns
                if len(ranked) == NUM_RANKED and cost_ns > ranked[-1][0]:
                    continue
                cost_ns += cluster.eviction_ns(group, num_pages, query)
                insort(ranked, (cost_ns, group.rank, slot))
                del ranked[NUM_RANKED:]
        return [slot for _, _, slot in ranked]

    def _mostly_decoding(self, query: Query, cluster: Cluster) -> int | None:
        """The group with the greatest share of decoding in L, if that exceeds the ratio."""
        best: tuple[float, float, int] | None = None
        for slot in slots_of(query.eligible):
            group = cluster.at(slot)
            if group.decode_ns > self._imbalance_ratio * group.load_ns:
                candidate = (-group.decode_ns / group.load_ns, group.rank, slot)
                best = candidate if best is None else min(best, candidate)
        return None if best is None else best[2]
