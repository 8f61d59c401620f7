"""A request that was placed: what the scheduler remembers of it until it ends and until it leaves the window H."""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.sched.forest_nodes import Node
from preble_jax.sched.groups import Group


@dataclass(slots=True)
class Assignment:
    """prefill_ns: what its missed tokens were expected to cost. node: where its chain ends.

    missed_tokens: prompt tokens it was expected to compute. queued_tokens: the same until its first token is reported,
    then 0. num_blocks: pages of its prompt and expected output; own_blocks: of these, what was not there yet.
    generation: the process of the group it was sent to.
    queue_known: its queueing time was reported.
    """

    group: Group
    num_tokens: int
    prefill_ns: int
    node: Node
    placed_at: float
    tenant: str
    missed_tokens: int
    queued_tokens: int
    num_blocks: int
    own_blocks: int
    generation: int
    queue_known: bool = False
