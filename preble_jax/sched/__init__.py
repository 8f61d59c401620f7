"""Every decision of the stack, as machines of events: no JAX, no sockets, no threads, no clock (`now` is an argument).

Global: GlobalScheduler chooses a device group for each request. Local: a group's own queue, under `queues/`.
"""

from preble_jax.sched.global_scheduler import GlobalScheduler
from preble_jax.sched.messages import (
    Decision,
    GroupLost,
    GroupStats,
    Instruction,
    LoadReport,
    Placement,
    PlaceRequest,
    PolicyStats,
    RequestSnapshot,
    TenantStats,
)

__all__ = [
    "Decision",
    "GlobalScheduler",
    "GroupLost",
    "GroupStats",
    "Instruction",
    "LoadReport",
    "PlaceRequest",
    "Placement",
    "PolicyStats",
    "RequestSnapshot",
    "TenantStats",
]
