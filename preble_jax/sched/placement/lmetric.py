"""LMetric (OSDI'26, arXiv 2603.15202): the group of least (queued + own uncached prompt tokens) * batch size.

Two indicators multiplied need no weight between them. Queued: prompt tokens still to be computed for requests sent
before. Batch size: requests sent and not ended, the new one not counted; so an idle group's score is 0 whatever it
holds. Between equal scores, and so between idle groups, fewer own uncached tokens win, then `rank`.
"""

from __future__ import annotations

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, affinity, all_levels, slots_of


class LMetric(PlacementPolicy):
    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        best: tuple[int, int, float, int] | None = None
        for mask, tokens in all_levels(query):
            own = query.request.num_tokens - tokens
            for slot in slots_of(mask):
                group = cluster.at(slot)
                score = ((group.queued_tokens + own) * group.num_outstanding, own, group.rank, slot)
                if best is None or score < best:
                    best = score
        assert best is not None
        return Proposal([best[3]], affinity(best[3], query))
