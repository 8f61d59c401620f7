"""CacheRoute (arXiv 2608.19677): which groups keep which prefixes warm is planned per interval, from last interval's
rates, instead of decided request by request.

A request whose key (its first pages) is in the plan goes to the shortest queue of the key's destinations. Any other
goes to the shorter queue of two groups drawn at random (power of two choices). See cacheroute_plan for the plan.
"""

from __future__ import annotations

import random
from collections import Counter

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, slots_of
from preble_jax.sched.placement.cacheroute_plan import make_plan
from preble_jax.sched.placement.least_loaded import shortest_queue
from preble_jax.sched.placement.prefix_key import prefix_key


class CacheRoute(PlacementPolicy):
    """interval_s: seconds a plan stands. num_blocks: pages of a key. q_cap: requests a second of a key that one group
    takes. num_slots: W, keys a group is kept warm for.

    The plan is made by the first request after an interval's end, over the groups that some request of the interval
    could have been given to; O(keys * log groups).
    """

    def __init__(self, *, interval_s: float, num_blocks: int, q_cap: float, num_slots: int, seed: int) -> None:
        self._interval_s = interval_s
        self._num_blocks = num_blocks
        self._q_cap = q_cap
        self._num_slots = num_slots
        self._random = random.Random(seed)
        self._plan: dict[bytes, int] = {}  # key -> mask of destinations
        self._counts: Counter[bytes] = Counter()
        self._groups = 0
        self._since: float | None = None

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        self._pass_time(query.now)
        self._groups |= query.eligible
        key = prefix_key(query.request, self._num_blocks)
        if key is not None:
            self._counts[key] += 1
            warm = self._plan.get(key, 0) & query.eligible
            if warm:
                return Proposal([shortest_queue(warm, cluster)], "exploit")
        drawn = self._random.sample(list(slots_of(query.eligible)), min(2, query.eligible.bit_count()))
        return Proposal([shortest_queue(sum(1 << slot for slot in drawn), cluster)], "explore")

    def _pass_time(self, now: float) -> None:
        if self._since is None:
            self._since = now
        elapsed_s = now - self._since
        if elapsed_s < self._interval_s:
            return
        # A key requested once has nothing to share, and most are such: their number is the interval's traffic.
        rates = {key: count / elapsed_s for key, count in self._counts.items() if count > 1}
        self._plan = make_plan(rates, list(slots_of(self._groups)), self._q_cap, self._num_slots, self._plan)
        self._counts.clear()
        self._groups = 0
        self._since = now
