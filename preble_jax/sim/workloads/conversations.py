"""The requests of one client as columns: who follows whom, and how prompts grow from turn to turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preble_jax.sim.workloads.arrivals import Times
from preble_jax.sim.workloads.pool import Pool
from preble_jax.sim.workloads.shape import Shape

Ints = NDArray[np.int64]
Stream = Callable[[int], np.random.Generator]  # random numbers by purpose


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Requests, the turns of a conversation next to each other. previous: position here of the turn before, or -1."""

    arrival: Times
    num_prompt: Ints
    num_output: Ints
    prefix: Ints
    previous: Ints
    think: Times


@dataclass(frozen=True, kw_only=True)
class _Turns:
    """session: number of each request's conversation. first: position of its first turn. skipped: turns that each
    conversation had before the run began."""

    arrival: Times
    session: Ints
    first: Ints
    skipped: Ints
    think: Times


def draw_columns(shape: Shape, arrivals: Times, pool: Pool, *, run_s: float, num_lanes: int, stream: Stream) -> Columns:
    """arrivals: of conversations, or of requests where the shape has lanes. run_s: expected length of the run, over
    which popularity changes. Requests before time 0 are left out: they were before the run."""
    turns = _in_lanes(shape, arrivals, num_lanes, stream) if shape.num_lanes else _apart(shape, arrivals, stream)
    count, num_sessions = len(turns.session), len(turns.skipped)
    born = np.zeros(num_sessions)
    born[turns.session[::-1]] = turns.arrival[::-1]  # of the first turn: it is written last
    prefix = pool.choose(stream(4), np.clip(born / run_s, 0.0, 1.0))[turns.session]
    question = shape.question.draw(stream(5), count)
    output = shape.output.draw(stream(6), count)
    opening = np.rint(turns.skipped * (shape.question.mean + shape.output.mean)).astype(np.int64)
    if shape.opening:
        opening += shape.opening.draw(stream(7), num_sessions)
    said = _since(question, turns.first) + _since(output, turns.first) - output
    num_prompt = pool.num_tokens(prefix) + opening[turns.session] + said
    kept = turns.arrival >= 0
    if shape.max_prompt:
        kept &= num_prompt <= shape.max_prompt
    position = np.cumsum(kept) - 1
    follows = np.arange(count) > turns.first
    follows[1:] &= kept[:-1]
    return Columns(
        arrival=turns.arrival[kept],
        num_prompt=num_prompt[kept],
        num_output=output[kept],
        prefix=prefix[kept],
        previous=np.where(follows, position - 1, -1)[kept],
        think=np.where(follows, turns.think, 0.0)[kept],
    )


def _apart(shape: Shape, starts: Times, stream: Stream) -> _Turns:
    """Every start begins a conversation; its turns come one think time after the other, at the earliest."""
    count = len(starts)
    turns = shape.turns.draw(stream(2), count) if shape.turns else np.ones(count, np.int64)
    first = np.repeat(np.cumsum(turns) - turns, turns)
    think = stream(3).standard_exponential(len(first)) * shape.think_s
    think[np.arange(len(first)) == first] = 0.0
    session = np.repeat(np.arange(count), turns)
    return _Turns(
        arrival=starts[session] + _since(think, first),
        session=session,
        first=first,
        skipped=np.zeros(count, np.int64),
        think=think,
    )


def _in_lanes(shape: Shape, arrivals: Times, num_lanes: int, stream: Stream) -> _Turns:
    """Lanes take the arrivals in turn, in a new order every round. In each lane, conversations follow each other
    without a gap; the first ones are somewhere in their middle, so that the run begins as it goes on."""
    count = len(arrivals)
    rounds = -(-count // num_lanes)
    lanes = stream(2).permuted(np.tile(np.arange(num_lanes), (rounds, 1)), axis=1).ravel()[:count]
    order = np.argsort(lanes, kind="stable")
    lane = lanes[order]
    ends, skipped = _lane_sessions(shape, num_lanes, rounds, stream)
    turn = np.arange(count) - np.searchsorted(lane, lane)  # how many the lane had before
    beyond = ends.max() + rounds + 1
    keys = (ends + beyond * np.arange(num_lanes)[:, None]).ravel()
    session = np.searchsorted(keys, turn + beyond * lane, side="right")
    first = np.searchsorted(session, session)
    return _Turns(arrival=arrivals[order], session=session, first=first, skipped=skipped, think=np.zeros(count))


def _lane_sessions(shape: Shape, num_lanes: int, num_turns: int, stream: Stream) -> tuple[Ints, Ints]:
    """Turn of its lane at which each conversation has ended [lanes, conversations], past num_turns; turns of each that
    were before the run [lanes * conversations]."""
    assert shape.turns is not None
    rng = stream(3)
    columns = [shape.turns.draw(rng, num_lanes)]
    gone = (columns[0] * stream(8).random(num_lanes)).astype(np.int64)
    ends = columns[0] - gone
    all_ends = [ends]
    while ends.min() <= num_turns:
        ends = ends + shape.turns.draw(rng, num_lanes)
        all_ends.append(ends)
    skipped = np.zeros((num_lanes, len(all_ends)), np.int64)
    skipped[:, 0] = gone
    return np.stack(all_ends, axis=1), skipped.ravel()


def _since(values: NDArray[Any], first: Ints) -> NDArray[Any]:
    """Sums within each conversation, up to and with each turn."""
    sums: NDArray[Any] = np.cumsum(values)
    within: NDArray[Any] = sums - (sums - values)[first]
    return within
