"""When the requests of a trace are sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from preble_jax.errors import ConfigError
from preble_jax.sim.request import SimRequest
from preble_jax.sim.traces.entry import Entry

_LONGEST_S = 1e8  # three years: whatever is longer was not meant so
_MOST_LIKELY_RATE = 1000.0  # requests a second that a trace is taken to have without being told


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


def at_given_times(entries: Sequence[Entry], rate: float | None, limit: int | None = None) -> list[SimRequest]:
    """The first `limit` by timestamp, the first one at 0, stretched to the rate if there is one, which is then the mean
    rate of these and not of the whole trace; turns of a session wait for the one before.

    Raises InvalidRequestError where times run backwards, and ConfigError where they cannot be stretched.
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
    kept = times[:limit]
    factor = 1.0 if rate is None else _stretch(kept, rate)
    return [
        _request(entry, (at_s - kept[0]) * factor, follows)
        for entry, at_s, follows in zip(entries, kept, previous, strict=False)
    ]


def _stretch(times: Sequence[float], rate: float) -> float:
    span_s = times[-1] - times[0]
    if len(times) > 1 and not span_s:
        raise ConfigError(
            f"--rate: expected timestamps that advance, got {len(times)} requests at one time, which cannot be"
            f" stretched to {rate} a second; take more of the trace, leave it out, or take the timestamps out"
            " of the trace for Poisson arrivals"
        )
    return (len(times) - 1) / (span_s * rate) if span_s else 1.0


def check_unit(entries: Sequence[Entry]) -> None:
    """For times whose unit nobody has named: a trace of seconds read as milliseconds would come a thousand times as
    fast, and everything measured on it would be of a cluster that is drowned. Raises ConfigError."""
    first, last = entries[0], entries[-1]
    span_s = (last.at_s or 0.0) - (first.at_s or 0.0)
    if span_s > 0 and (implied := (len(entries) - 1) / span_s) > _MOST_LIKELY_RATE:
        raise ConfigError(
            f"--time-unit: expected timestamps in milliseconds with at most {_MOST_LIKELY_RATE:g} requests a second on"
            f" average, got {implied:.6g} ({len(entries)} requests in {span_s:.6g} s); give --time-unit s if they are"
            " seconds, --time-unit ms if this is meant, or a --rate to stretch them to"
        )


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
