"""Traces of real requests: Mooncake's format and its relatives, Azure's and VTC's."""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from pathlib import Path

from preble_jax.errors import ConfigError, InvalidRequestError
from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.traces.blocks import find_block_size
from preble_jax.sim.traces.entry import Entry
from preble_jax.sim.traces.formats import DEFAULT_OUTPUT, FORMATS, TIME_UNITS, find_format, to_seconds
from preble_jax.sim.traces.rows import read_lines
from preble_jax.sim.traces.timing import at_given_times, at_random_times, check_uniform, check_unit, in_sessions
from preble_jax.sim.workloads.arrivals import Given

__all__ = ["DEFAULT_OUTPUT", "FORMATS", "TIME_UNITS", "read_arrivals", "read_trace"]

_NO_BLOCKS = 16  # block size of traces without blocks, where it has no effect
_MOST_ROUNDING = 0.1


def read_trace(
    path: str | Path,
    format: str | None,
    *,
    rate: float | None,
    block_size: int | None,
    seed: int,
    limit: int | None = None,
    length_scale: float = 1.0,
    time_unit: str | None = None,
) -> Workload:
    """The requests of a trace file, equal for equal arguments.

    format: of FORMATS; None: by the content. rate: requests a second; timestamps are stretched to it, and a trace
    without them has Poisson arrivals of that rate (then it must be given). Requests of one session follow each other;
    without timestamps of their own, the sessions come in random order. block_size: tokens a block, worked out of the
    lengths when None. limit: the first so many, whose timestamps are stretched so that these come at the rate.
    length_scale: all lengths times that. Blocks shrink or grow to a whole number of tokens, so that it is rounded where
    there are any: `Workload.length_scale` is what has been done. time_unit: of Mooncake's timestamps, of TIME_UNITS;
    None: milliseconds (seconds where they count from each session's begin), refused without a rate where more requests
    a second would come than is likely.
    Raises InvalidRequestError for a file that breaks the format, with file and line, and ConfigError for arguments out
    of range.
    """
    _check(rate, block_size, limit, length_scale, seed)
    path = Path(path)
    kind, entries = _read(path, format, time_unit)
    size = find_block_size(entries, block_size) if kind == "mooncake" else (block_size or _NO_BLOCKS)
    if kind == "mooncake" and time_unit is None and rate is None and not entries[0].in_session:
        check_unit(entries)
    requests = _timed(entries, path, rate, seed, limit)
    if length_scale == 1.0:
        return Workload(name=path.stem, block_size=size, requests=requests)
    if any(entry.blocks for entry in entries):
        return _scale_blocks(Workload(name=path.stem, block_size=size, requests=requests), length_scale)
    scaled = [_times(request, length_scale) for request in requests]
    return Workload(name=path.stem, block_size=size, requests=scaled, length_scale=length_scale)


def read_arrivals(path: str | Path, format: str | None = None) -> Given:
    """The times of a trace as arrivals for a workload (`make_workload`). Raises as read_trace does."""
    path = Path(path)
    _, entries = _read(path, format)
    first = entries[0]
    if first.at_s is None or first.in_session:
        first.row.refuse("expected timestamps that count from the trace's begin, got none; give a trace that has them")
    return Given(at_s=tuple(request.arrival_s for request in at_given_times(entries, None)))


def _read(path: Path, format: str | None, time_unit: str | None = None) -> tuple[str, list[Entry]]:
    if time_unit not in (None, *TIME_UNITS):
        raise ConfigError(f"time_unit: expected one of {', '.join(TIME_UNITS)}; got {time_unit!r}; correct or omit it")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1, cutoff=0.0)[0]
        raise ConfigError(f"trace format: expected one of {', '.join(FORMATS)}; got {format!r}, nearest is {near!r}")
    lines = read_lines(path)
    kind = format or find_format(path, lines)
    if time_unit is not None and kind != "mooncake":
        raise ConfigError(
            f"time_unit: expected with a trace of format mooncake only, got {time_unit!r} for {path} of format {kind},"
            " which has a unit of its own; leave it out"
        )
    entries = FORMATS[kind](path, lines)
    if not entries:
        raise InvalidRequestError(
            f"{path}, line {len(lines)}: expected rows after the header, got none; give a trace with requests"
        )
    check_uniform(entries)
    if kind == "mooncake":
        to_seconds(entries, time_unit)
    return kind, entries


def _timed(entries: list[Entry], path: Path, rate: float | None, seed: int, limit: int | None) -> list[SimRequest]:
    first = entries[0]
    if first.at_s is not None and not first.in_session:
        return at_given_times(entries, rate, limit)
    if rate is None:
        raise ConfigError(
            f"--rate: expected requests a second for {path}, which does not say when its requests came; for example"
            " --rate 8"
        )
    return (in_sessions if first.session else at_random_times)(entries, rate, seed)[:limit]


def _times(request: SimRequest, factor: float) -> SimRequest:
    num_prompt, num_output = max(round(request.num_prompt * factor), 1), max(round(request.num_output * factor), 1)
    return replace(request, num_prompt=num_prompt, num_output=num_output)


def _scale_blocks(workload: Workload, factor: float) -> Workload:
    """Blocks shrink or grow to a whole number of tokens, and what no full block covers in the same proportion."""
    size = workload.block_size
    scaled = round(size * factor)
    if abs(scaled - size * factor) > _MOST_ROUNDING * size * factor:
        raise ConfigError(
            f"--length-scale: expected one that leaves whole blocks, got {factor}, which makes {size * factor:.2f}"
            f" tokens of a block of {size}; give a multiple of 1/{size}"
        )
    exact = scaled / size
    shrunk = []
    for request in workload.requests:
        full, rest = divmod(request.num_prompt, size)
        over = max(min(round(rest * exact), scaled), 1) if rest else 0  # a partial block keeps a token
        shrunk.append(replace(_times(request, exact), num_prompt=full * scaled + over))
    return replace(workload, block_size=scaled, requests=shrunk, length_scale=exact)


def _check(rate: float | None, block_size: int | None, limit: int | None, length_scale: float, seed: int) -> None:
    for name, value in (("rate", rate), ("length_scale", length_scale)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: expected a number above 0, got {value}; give a positive one")
    for name, count in (("block_size", block_size), ("limit", limit)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: expected at least 1, got {count}; give a positive number or leave it out")
    if seed < 0:
        raise ConfigError(f"seed: expected at least 0, got {seed}; give a number from 0 up")
