"""One try at serving a simulated request on a device group."""

from __future__ import annotations

from preble_jax.request import Request
from preble_jax.sched.messages import PlaceRequest
from preble_jax.sim.record import RequestRecord


class Attempt:
    """request: as the group takes it; placed: as the global scheduler does. delivered_s: when it reached the group.

    num_served: output tokens that were counted as service so far. generation: of the group's process when it was
    placed. failed: processes, as (group, generation), that nothing came of before.
    served_at: where its prompt's computation stands in what was served; None before admission.
    """

    __slots__ = ("delivered_s", "failed", "generation", "num_served", "placed", "record", "request", "served_at")

    def __init__(
        self,
        record: RequestRecord,
        request: Request,
        placed: PlaceRequest,
        failed: frozenset[tuple[str, int]] = frozenset(),
    ) -> None:
        self.record = record
        self.request = request
        self.placed = placed
        self.failed = failed
        self.generation = 0
        self.delivered_s = 0.0
        self.num_served = 0
        self.served_at: int | None = None
