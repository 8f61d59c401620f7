"""Round robin: every eligible group in turn. The baseline; knows nothing of prefixes."""

from __future__ import annotations

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query


class RoundRobin(PlacementPolicy):
    def __init__(self) -> None:
        self._last = -1

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        later = query.eligible >> (self._last + 1) << (self._last + 1)
        mask = later or query.eligible
        self._last = (mask & -mask).bit_length() - 1
        return Proposal([self._last], "round_robin")
