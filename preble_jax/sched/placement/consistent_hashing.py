"""Consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, SODA 2018, arXiv 1608.01350).

Groups have places on a ring, a request's key (its first pages) has one too, and the request goes to the next group
clockwise that is below its capacity, ceil((1 + epsilon) * requests / groups), the new request counted. So equal
beginnings meet on one group until it is full, and a group that comes or goes moves few keys. Some group is always below
capacity, because the capacities add up to more than the requests.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from hashlib import blake2b

from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query, slots_of
from preble_jax.sched.placement.prefix_key import prefix_key


class ConsistentHashing(PlacementPolicy):
    """epsilon > 0: room above the average load. num_blocks: pages of the key. num_points: places of a group.

    A group keeps its places when it drains or is excluded; requests walk past it.
    """

    def __init__(self, *, epsilon: float, num_blocks: int, num_points: int) -> None:
        self._epsilon = epsilon
        self._num_blocks = num_blocks
        self._num_points = num_points
        self._names: dict[int, str] = {}  # slot -> whose places it has on the ring
        self._ring: list[tuple[int, int]] = []  # (place, slot), ascending

    def choose(self, query: Query, cluster: Cluster) -> Proposal:
        num_requests, queues, newcomers = 1, {}, {}
        for slot in slots_of(query.eligible):
            group = cluster.at(slot)
            if self._names.get(slot) != group.name:
                newcomers[slot] = group.name
            queues[slot] = group.num_outstanding
            num_requests += group.num_outstanding
        if newcomers:
            self._join(newcomers)
        capacity = math.ceil((1 + self._epsilon) * num_requests / len(queues))
        key = prefix_key(query.request, self._num_blocks) or query.request.request_id.encode()
        home = bisect_left(self._ring, (place(key), 0))
        passed: set[int] = set()
        for i in range(len(self._ring)):
            slot = self._ring[(home + i) % len(self._ring)][1]
            if slot in passed or slot not in queues:
                continue
            if queues[slot] < capacity:
                return Proposal([slot], "explore" if passed else "exploit")
            passed.add(slot)
        raise AssertionError(f"{num_requests} requests on {len(queues)} groups, none below its capacity {capacity}")

    def _join(self, newcomers: dict[int, str]) -> None:
        """slot -> name. A slot that another group had before loses that group's places."""
        ring = [entry for entry in self._ring if entry[1] not in newcomers]
        for slot, name in newcomers.items():
            ring += ((place(f"{name}/{i}".encode()), slot) for i in range(self._num_points))
        ring.sort()
        self._ring = ring
        self._names |= newcomers


def place(key: bytes) -> int:
    """Where on the ring of 2^64 places a key, or a group, is."""
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big")
