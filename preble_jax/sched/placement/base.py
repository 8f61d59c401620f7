"""The one interface of placement policies. Policies propose; the global scheduler disposes: it has already left out
groups that are down, draining, excluded or too small, and it does all recording.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from preble_jax.sched.assignment import Assignment
from preble_jax.sched.cost import CostModel
from preble_jax.sched.groups import Group
from preble_jax.sched.messages import Decision, PlaceRequest, PolicyStats
from preble_jax.sched.slots import slots_of

__all__ = [
    "Cluster",
    "PlacementPolicy",
    "Prefix",
    "Proposal",
    "Query",
    "affinity",
    "all_levels",
    "runners_up",
    "slots_of",
]


class Query(NamedTuple):
    """What a policy may look at, besides the cluster.

    levels: [(mask, tokens)], longest match first: which eligible groups hold how many prompt tokens; each group at most
    once, groups that hold nothing not at all. eligible: mask of the groups that may be proposed, never 0. now: seconds,
    never less than at the request before.
    """

    request: PlaceRequest
    levels: list[tuple[int, int]]
    eligible: int
    page_size: int
    now: float


class Prefix(NamedTuple):
    """A beginning of prompts. last_block: hash of its last page. num_blocks: its length in pages."""

    last_block: bytes
    num_blocks: int


class Proposal(NamedTuple):
    """slots: best first, at least one; the rest are the policy's runners-up, as far as it ranked any."""

    slots: list[int]
    decision: Decision


class Cluster(Protocol):
    """The state policies decide on. What it says holds until the next change of it.

    up: mask of the groups that may be given requests at all. uniform_cost: all groups have the same cost model.
    mean_cost: the mean of their models.
    On all groups: num_outstanding: requests placed and not ended; of these num_queued without a first token so far,
    with queued_tokens prompt tokens to be computed. num_assigned: requests of the window.
    """

    @property
    def num_assigned(self) -> int: ...

    @property
    def num_outstanding(self) -> int: ...

    @property
    def num_queued(self) -> int: ...

    @property
    def queued_tokens(self) -> int: ...

    @property
    def up(self) -> int: ...

    @property
    def uniform_cost(self) -> bool: ...

    @property
    def mean_cost(self) -> CostModel: ...

    @property
    def page_size(self) -> int: ...

    def at(self, slot: int) -> Group: ...

    def expected_output(self, max_tokens: int) -> int:
        """Output tokens of a request with that budget (0: none), from the window's outputs of all groups."""
        ...

    def by_load(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by L, the least first (equal ones by rank)."""
        ...

    def heaviest(self, mask: int) -> Group:
        """The group of greatest L in a mask that is not 0 (of equal ones the last by rank)."""
        ...

    def by_decode_share(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by the share of decoding in L, the greatest first (equal ones by rank)."""
        ...

    def by_queue(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by the number of requests outstanding, the fewest first (equal ones by rank)."""
        ...

    def eviction_ns(self, group: Group, num_pages: int, query: Query, *, large_only: bool = False) -> int:
        """M of E2: see preble_jax.sched.cluster."""
        ...

    def key_prefix(self, assignment: Assignment) -> Prefix | None:
        """The part of a placed prompt that its cost hangs on and that other requests of the window share: see
        preble_jax.sched.cluster. None when there is none."""
        ...

    def requests_of(self, prefix: Prefix) -> Mapping[int, int]:
        """Slot -> requests of the window placed there with this prefix."""
        ...

    def holders_of(self, prefix: Prefix) -> int:
        """Mask of the groups that hold the prefix to its end."""
        ...

    def continuations(self, prefix: Prefix, slot: int) -> dict[bytes, int]:
        """First block after the prefix -> requests of the window placed on `slot` with both."""
        ...


class PlacementPolicy(ABC):
    """Base of the policies: `choose`, and hooks that do nothing unless a policy has a use for them.

    Deterministic for a seed, and without a clock. A policy that keeps its own state (deficits, rings, replicas) may
    change it in `choose`: every proposal that `choose` returns is carried out.
    """

    @abstractmethod
    def choose(self, query: Query, cluster: Cluster) -> Proposal: ...

    def group_added(self, slot: int) -> None:  # noqa: B027
        """A group came up, or came back as another process: its tree is empty. Its slot may have been another's."""

    def group_removed(self, slot: int) -> None:  # noqa: B027
        """It is gone, and will not be proposed until it is added again."""

    def queued(self, assignment: Assignment, queue_s: float, cluster: Cluster, now: float) -> None:  # noqa: B027
        """The group said how long the request waited before its first prompt chunk was computed."""

    def finished(  # noqa: B027
        self, assignment: Assignment, output_tokens: int, cached_tokens: int, failed: bool, now: float
    ) -> None:
        """The request ended, or was given up (then failed, with 0 tokens). Its group may be gone since."""

    def tick(self, cluster: Cluster, now: float) -> None:  # noqa: B027
        """Time passes; called a few times a second."""

    def stats(self, cluster: Cluster) -> PolicyStats:
        return PolicyStats()


def all_levels(query: Query) -> list[tuple[int, int]]:
    """`query.levels`, and the groups that hold nothing as the last level: every eligible group exactly once."""
    rest = query.eligible
    for mask, _ in query.levels:
        rest ^= mask
    return [*query.levels, (rest, 0)]


def affinity(slot: int, query: Query) -> Decision:
    """What to call the choice of a policy that does not decide between exploring and exploiting: exploit when the group
    is one that holds the longest match."""
    return "exploit" if query.levels and query.levels[0][0] >> slot & 1 else "explore"


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
