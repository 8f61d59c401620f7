"""What every format is read into, before the arrivals are worked out."""

from __future__ import annotations

from dataclasses import dataclass

from preble_jax.sim.traces.rows import Row


@dataclass(kw_only=True, slots=True)
class Entry:
    """One request of a trace. at_s: None without timestamps; in_session: counted from the session's begin.

    session: its requests are sent one after the other's end, in the order of `turn`; "" when it has none.
    """

    row: Row
    num_prompt: int
    num_output: int
    at_s: float | None
    blocks: tuple[int, ...] = ()
    tenant: str = "default"
    session: str = ""
    turn: int | None = None
    in_session: bool = False
