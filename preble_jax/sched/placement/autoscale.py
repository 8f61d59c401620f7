"""Prefix autoscaling of Preble (ICLR 2025, section 3.2): a prefix that one group cannot serve gets another group.

A prefix is the key portion of a prompt (`Cluster.key_prefix`). It is replicated when the average time that its requests
wait in their groups' queues doubles: it exceeds `ratio` times what it was in the window before, or, when that is more,
`ratio` times what computing the prefix takes - who waits less than that is better off where the prefix is. The replica
goes to the group of least L that does not hold the prefix, if even with the prefix still to be computed that group has
less to do than any holder; under a load that is high everywhere nothing is copied.

The prefix's subtree is split by load between the heaviest holder and the new group: its continuations, those that
several requests of the window used, are dealt out in descending order of requests, each to the side that has fewer.
New continuations go where the load is least, because both groups now hold the longest match.

A replica retires when the requests of the window that share the prefix are at most half of what they were when it was
made. Its copy is not erased; exploits avoid it, so that the group's LRU takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from preble_jax.sched.assignment import Assignment
from preble_jax.sched.cost import NS_PER_S
from preble_jax.sched.placement.base import Cluster, Prefix
from preble_jax.sched.queueing import QueueingTimes

MIN_CONTINUED = 2  # requests that make a continuation worth moving; one may never come again


@dataclass(slots=True)
class Replica:
    """num_requests: that shared the prefix in the window when the replica was made. fresh: none was sent here yet."""

    slot: int
    num_requests: int
    fresh: bool = True


@dataclass(slots=True)
class ReplicatedPrefix:
    """replicas: oldest first. homes: first block of a continuation -> the replica's slot it moved to. retired: mask of
    groups that still hold the prefix though their replica was retired."""

    prefix: Prefix
    replicas: list[Replica] = field(default_factory=list)
    homes: dict[bytes, int] = field(default_factory=dict)
    retired: int = 0

    def take(self, hashes: Sequence[bytes], eligible: int) -> int | None:
        """The slot a prompt with this prefix has to go to; None: wherever a holder is. The first one to go to a replica
        brings the prefix there."""
        depth = self.prefix.num_blocks
        slot = self.homes.get(hashes[depth]) if len(hashes) > depth else None
        if slot is None:
            slot = next((replica.slot for replica in self.replicas if replica.fresh), None)
        if slot is None or not eligible >> slot & 1:
            return None
        for replica in self.replicas:
            if replica.slot == slot:
                replica.fresh = False
        return slot

    def drop(self, slot: int) -> None:
        """Nothing is sent to a slot for this prefix's sake any more."""
        self.replicas = [replica for replica in self.replicas if replica.slot != slot]
        self.homes = {block: home for block, home in self.homes.items() if home != slot}


class Autoscaler:
    """ratio: how many times its former value the average queueing time must exceed. window_s: H."""

    def __init__(self, window_s: float, ratio: float) -> None:
        self._ratio = ratio
        self._times = QueueingTimes(window_s)
        self._by_block: dict[bytes, ReplicatedPrefix] = {}
        self._depths: list[int] = []  # of the replicated prefixes, the longest first
        self.num_replicated = 0
        self.num_retired = 0

    def __len__(self) -> int:
        """Replicas in use."""
        return sum(len(known.replicas) for known in self._by_block.values())

    def find(self, hashes: Sequence[bytes]) -> ReplicatedPrefix | None:
        """The longest replicated beginning of a prompt."""
        for depth in self._depths:
            if depth <= len(hashes):
                known = self._by_block.get(hashes[depth - 1])
                if known is not None:
                    return known
        return None

    def queued(self, assignment: Assignment, queue_s: float, cluster: Cluster, now: float) -> None:
        prefix = cluster.key_prefix(assignment)
        if prefix is not None:
            self._times.add(prefix, round(queue_s * NS_PER_S), now)

    def tick(self, cluster: Cluster, now: float) -> None:
        for prefix in self._times.changed(now):
            recent, before = self._times.averages(prefix, now)
            if recent > self._ratio * before:
                self._replicate(prefix, recent / self._ratio, cluster)
        for known in list(self._by_block.values()):
            self._retire(known, cluster)

    def forget_group(self, slot: int) -> None:
        """Its tree is gone, and replicas with it."""
        for known in list(self._by_block.values()):
            known.drop(slot)
            known.retired &= ~(1 << slot)
            self._drop_if_unused(known)

    def _replicate(self, prefix: Prefix, over_ns: float, cluster: Cluster) -> None:
        """If it helps. over_ns: the prefix is worth a replica if it takes less than this to compute."""
        known = self._by_block.get(prefix.last_block) or ReplicatedPrefix(prefix)
        holders = cluster.holders_of(prefix) & cluster.up & ~known.retired
        target = next(iter(cluster.by_load(cluster.up & ~holders)), None)
        if not holders or target is None:
            return
        prefill_ns = target.cost.prefill_ns(prefix.num_blocks * cluster.page_size)
        least = next(iter(cluster.by_load(holders)))
        if over_ns <= prefill_ns or target.load_ns + prefill_ns >= least.load_ns:
            return
        known.retired &= ~(1 << target.slot)
        known.replicas.append(Replica(target.slot, sum(cluster.requests_of(prefix).values())))
        self._split(known, cluster.heaviest(holders).slot, target.slot, cluster)
        self._times.restart(prefix)
        self._by_block[prefix.last_block] = known
        self._depths = sorted({known.prefix.num_blocks for known in self._by_block.values()}, reverse=True)
        self.num_replicated += 1

    def _split(self, known: ReplicatedPrefix, source: int, target: int, cluster: Cluster) -> None:
        """Longest processing time first, over what the source served; those that stay need no home."""
        continued = cluster.continuations(known.prefix, source).items()
        kept = moved = 0
        for num, block in sorted(((-num, block) for block, num in continued if num >= MIN_CONTINUED)):
            if moved < kept:
                known.homes[block] = target
                moved -= num
            else:
                kept -= num

    def _retire(self, known: ReplicatedPrefix, cluster: Cluster) -> None:
        """The youngest first, for as long as the load is at most half of what made it."""
        num_requests = sum(cluster.requests_of(known.prefix).values())
        while known.replicas and 2 * num_requests <= known.replicas[-1].num_requests:
            slot = known.replicas[-1].slot
            known.drop(slot)
            known.retired |= 1 << slot
            self.num_retired += 1
        known.retired &= cluster.holders_of(known.prefix)
        self._drop_if_unused(known)

    def _drop_if_unused(self, known: ReplicatedPrefix) -> None:
        if not known.replicas and not known.retired:
            del self._by_block[known.prefix.last_block]
            self._depths = sorted({known.prefix.num_blocks for known in self._by_block.values()}, reverse=True)
