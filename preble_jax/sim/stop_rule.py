"""Who may end a simulation early."""

from __future__ import annotations

from typing import Protocol

from preble_jax.sim.record import RequestRecord


class StopRule(Protocol):
    """Told of what happens, as it happens; each call answers whether the simulation is to stop now.

    now: simulated seconds. A request is sent once, gets its first token at most once, and ends at most once (finished,
    failed or rejected: `record.status`); a record's times are those of `RequestRecord`. `passed` comes a few times a
    simulated second.
    """

    def sent(self, record: RequestRecord, now: float) -> bool: ...

    def first_token(self, record: RequestRecord, now: float) -> bool: ...

    def ended(self, record: RequestRecord, now: float) -> bool: ...

    def passed(self, now: float) -> bool: ...
