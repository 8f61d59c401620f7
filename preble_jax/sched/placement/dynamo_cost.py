"""The cost of NVIDIA Dynamo's KV router (its public documentation, "routing concepts"), in pages:

    prefill_scale * max(prefill tokens in flight + prompt tokens - credit * cached tokens, 0) / page size + decode pages

Prefill in flight: tokens still to be computed for requests sent before. Decode pages: those of all outstanding requests
(the new request's own pages are the same for every group and left out). The least cost wins; with a temperature, one is
drawn by softmax over the negated costs, scaled so that they span 1/temperature.

Dynamo credits pages in host memory 0.75 as well; the forest knows of no host tier yet, so that term is absent.
"""

from __future__ import annotations

import math
import random

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, affinity, all_levels, slots_of


class DynamoCost(PlacementPolicy):
    """credit: share of a cached token that is saved, 0..1. prefill_scale: weight of prefill pages, >= 0. temperature: 0
    decides by cost (then `rank`), more makes it more random; one number is drawn from `seed`'s sequence a decision."""

    def __init__(self, *, credit: float, prefill_scale: float, temperature: float, seed: int) -> None:
        self._credit = credit
        self._prefill_scale = prefill_scale
        self._temperature = temperature
        self._random = random.Random(seed)

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        costs = []
        for mask, tokens in all_levels(query):
            own = query.request.num_tokens - self._credit * tokens
            for slot in slots_of(mask):
                group = cluster.at(slot)
                prefill = max(group.queued_tokens + own, 0) / query.page_size
                costs.append((self._prefill_scale * prefill + group.decode_blocks, group.rank, slot))
        slot = self._draw(costs) if self._temperature else min(costs)[2]
        return Proposal([slot], affinity(slot, query))

    def _draw(self, costs: list[tuple[float, float, int]]) -> int:
        costs.sort(key=lambda entry: entry[2])  # so that what is drawn depends on the groups alone
        least, most = min(costs)[0], max(costs)[0]
        span = (most - least) * self._temperature or 1.0
        weights = [math.exp((least - cost) / span) for cost, _, _ in costs]
        return self._random.choices(costs, weights)[0][2]
