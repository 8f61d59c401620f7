"""When the requests of a trace are sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preble_jax.errors import ConfigError
from preble_jax.sim.request import SimRequest
from preble_jax.sim.traces.entry import Entry

_LONGEST_S = 1e8  # three years: whatever is longer was not meant so


def check_uniform(entries: Sequence[Entry]) -> None:
    """All rows have timestamps, or none; all have sessions, or none. Raises InvalidRequestError."""
    first = entries[0]
    for entry in entries:
        for name, has, expected in (
            ("timestamp", entry.at_s is not None, first.at_s is not None),
            ("session", bool(entry.session), bool(first.session)),
            ("turn", entry.turn is not None, first.turn is not None),
        ):
            if has != expected:
                want, got = ("none", "one") if has else ("one", "none")
                entry.row.refuse(
                    f"{name}: expected {want}, as in line {first.row.line}, got {got}; give it to every row or to none"
                )


def at_given_times(entries: Sequence[Entry], rate: float | None) -> list[SimRequest]:
    """By timestamp, the first at 0, stretched to the rate if there is one; turns of a session wait for the one before.

    Raises InvalidRequestError where times run backwards.
    """
    previous = _predecessors(entries)
    times = [entry.at_s or 0.0 for entry in entries]
    for entry, before, earlier, later in zip(entries[1:], entries, times, times[1:], strict=False):
        if later < earlier:
            entry.row.refuse(
                f"expected {earlier - times[0]:.3f} s after the first or more, as in line {before.row.line}, got"
                f" {later - times[0]:.3f} s; times must not run backwards, sort the rows"
            )
    span_s = times[-1] - times[0]
    if span_s > _LONGEST_S:
        entries[-1].row.refuse(
            f"expected at most {_LONGEST_S:.0f} s after the first, in line {entries[0].row.line}, got {span_s:.10g} s;"
            " correct the times, or convert them to the format's unit"
        )
    if rate is not None and len(times) > 1 and not span_s:
        raise ConfigError(
            f"rate: expected timestamps that advance, got {len(times)} requests at one time, which cannot be stretched"
            f" to {rate} a second; leave the rate out, or take the timestamps out of the trace for Poisson arrivals"
        )
    factor = (len(times) - 1) / (span_s * rate) if rate is not None and span_s else 1.0
    return [
        _request(entry, (at_s - times[0]) * factor, follows)
        for entry, at_s, follows in zip(entries, times, previous, strict=True)
    ]


def at_random_times(entries: Sequence[Entry], rate: float, seed: int) -> list[SimRequest]:
    """In the order of the file, independent exponential gaps (Poisson)."""
    gaps = np.random.default_rng(seed).standard_exponential(len(entries)) / rate
    return [_request(entry, at_s, None) for entry, at_s in zip(entries, np.cumsum(gaps).tolist(), strict=True)]


def in_sessions(entries: Sequence[Entry], rate: float, seed: int) -> list[SimRequest]:
    """Sessions in random order at Poisson times, so often that `rate` requests a second come in the long run; in each,
    a turn is sent when the one before it has ended, and not before its timestamp, if there is one."""
    previous = _predecessors(entries)
    rng = np.random.default_rng(seed)
    session = [0] * len(entries)
    num_sessions = 0
    for index, before in enumerate(previous):
        session[index] = num_sessions if before is None else session[before]
        num_sessions += before is None
    starts = np.cumsum(rng.standard_exponential(num_sessions)) * (len(entries) / num_sessions / rate)
    rank = rng.permutation(num_sessions)
    begins = starts[rank].tolist()
    times = [begins[number] + (entry.at_s or 0.0) for number, entry in zip(session, entries, strict=True)]
    order = sorted(range(len(entries)), key=lambda index: (times[index], begins[session[index]], index))
    place = {index: at for at, index in enumerate(order)}
    return [
        _request(entries[index], times[index], None if (before := previous[index]) is None else place[before])
        for index in order
    ]


def _predecessors(entries: Sequence[Entry]) -> list[int | None]:
    """Index of the turn before each, in its session. Raises InvalidRequestError where turns or times run backwards."""
    last: dict[str, int] = {}
    found: list[int | None] = []
    for index, entry in enumerate(entries):
        before = last.get(entry.session) if entry.session else None
        found.append(before)
        last[entry.session] = index
        if before is None:
            continue
        earlier = entries[before]
        if entry.turn is not None and earlier.turn is not None and entry.turn <= earlier.turn:
            entry.row.refuse(
                f"turn: expected more than {earlier.turn} of line {earlier.row.line} in session {entry.session!r}, got"
                f" {entry.turn}; sort each session by turn"
            )
        if entry.at_s is not None and earlier.at_s is not None and entry.at_s < earlier.at_s:
            entry.row.refuse(
                f"timestamp: expected {earlier.at_s:.3f} s of line {earlier.row.line} or more in session"
                f" {entry.session!r}, got {entry.at_s:.3f}; times must not run backwards, sort each session"
            )
    return found


def _request(entry: Entry, arrival_s: float, follows: int | None) -> SimRequest:
    return SimRequest(
        arrival_s=arrival_s,
        num_prompt=entry.num_prompt,
        num_output=entry.num_output,
        blocks=entry.blocks,
        tenant=entry.tenant,
        follows=follows,
    )
