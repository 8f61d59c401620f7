"""The one interface of placement policies. Policies propose; the global scheduler disposes: it has already left out
groups that are down, draining, excluded or too small, and it does all recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from preble_jax.sched.groups import Group
from preble_jax.sched.messages import Decision, PlaceRequest


class Query(NamedTuple):
    """What a policy may look at, besides the cluster.

    levels: [(mask, tokens)], longest match first: which eligible groups hold how many prompt tokens; each group at most
    once, groups that hold nothing not at all. eligible: mask of the groups that may be proposed, never 0.
    """

    request: PlaceRequest
    levels: list[tuple[int, int]]
    eligible: int
    page_size: int


class Proposal(NamedTuple):
    """slots: best first, at least one; the rest are the policy's runners-up, as far as it ranked any."""

    slots: list[int]
    decision: Decision


class Cluster(Protocol):
    """The state policies decide on."""

    def at(self, slot: int) -> Group: ...

    def eviction_ns(self, group: Group, num_pages: int, query: Query) -> int:
        """M of E2: see preble_jax.sched.global_scheduler."""
        ...


class PlacementPolicy(Protocol):
    """Deterministic for a seed, and without a clock. A policy that keeps its own state (deficits, rings) changes it in
    `choose`; every proposal that `choose` returns is carried out."""

    def choose(self, query: Query, cluster: Cluster) -> Proposal: ...


def slots_of(mask: int) -> Iterator[int]:
    """The slots in a mask, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def runners_up(slots: list[int], query: Query, num: int) -> list[int]:
    """At most `num` groups to try after slots[0]: those the policy ranked, then whoever holds most of the prompt, then
    the next ones in turn. Costs nothing per group that is not named."""
    chosen = slots[: num + 1]
    rest = query.eligible
    for slot in chosen:
        rest ^= 1 << slot
    later = rest >> slots[0] << slots[0]
    for mask in (*(mask for mask, _ in query.levels), later, rest):
        if len(chosen) > num or not rest:
            break
        for slot in slots_of(mask & rest):
            chosen.append(slot)
            rest ^= 1 << slot
            if len(chosen) > num:
                break
    return chosen[1:]
