"""From a recipe to requests. Draws are vectors, and each purpose has random numbers of its own: with one seed, the same
requests come at another rate, and more of them come after the same ones."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from preble_jax.sim.request import SimRequest, Workload
from preble_jax.sim.workloads.arrivals import Arrivals, Times, until
from preble_jax.sim.workloads.conversations import Columns, Ints, Stream, draw_columns
from preble_jax.sim.workloads.pool import Pool
from preble_jax.sim.workloads.shape import Client, Recipe

_SETTLING = 3.0  # conversations that last so many times the mean have begun when the run does


def build(
    recipe: Recipe, *, rate: float, num_requests: int | None, duration_s: float | None, num_groups: int, seed: int
) -> Workload:
    """The first `num_requests` of the recipe's requests, or those of `duration_s` seconds, whichever are fewer."""
    if duration_s is None and num_requests is None:
        duration_s = recipe.duration_s
    end_s = duration_s if duration_s is not None else float("inf")
    limit = num_requests if num_requests is not None else np.iinfo(np.int64).max
    run_s = min(end_s, limit / rate)
    builder = _Builder(recipe, rate, num_groups, run_s, seed)
    span_s = min(end_s, run_s * (1.1 + 8 / (run_s * rate) ** 0.5))
    while True:
        columns = builder.columns(span_s)
        arrivals = np.concatenate([column.arrival for column in columns])
        order = np.argsort(arrivals, kind="stable")
        order = order[arrivals[order] <= span_s][:limit]
        if len(order) == limit or span_s >= end_s:
            return Workload(name=recipe.name, block_size=recipe.block_size, requests=builder.requests(columns, order))
        span_s = min(end_s, 2 * span_s)


class _Builder:
    """One workload in the making. Pure: asked twice, it draws the same."""

    def __init__(self, recipe: Recipe, rate: float, num_groups: int, run_s: float, seed: int) -> None:
        root = np.random.SeedSequence([seed, zlib.crc32(recipe.name.encode())])
        self._recipe = recipe
        self._run_s = run_s
        self._scale = num_groups / 2
        self._together, *self._seeds = root.spawn(1 + len(recipe.clients))
        self._pools = self._make_pools()
        shares = np.array([client.share / client.shape.turns_per_arrival for client in recipe.clients])
        self._rates: Times = rate * shares / sum(client.share for client in recipe.clients)

    def _make_pools(self) -> list[Pool]:
        """One for each client; clients of one pool get the same."""
        shared: dict[str, Pool] = {}
        pools: list[Pool] = []
        next_id = 0
        for client, seed in zip(self._recipe.clients, self._seeds, strict=True):
            pool = shared.get(client.pool)
            if pool is None:
                pool = Pool(
                    client.shape,
                    scale=self._scale,
                    block_size=self._recipe.block_size,
                    first_id=next_id,
                    rng=_streams(seed)(0),
                )
                next_id = pool.next_id
                if client.pool:
                    shared[client.pool] = pool
            pools.append(pool)
        return pools

    def columns(self, span_s: float) -> list[Columns]:
        """All clients' requests up to span_s, and some beyond."""
        return [
            draw_columns(
                client.shape,
                starts,
                pool,
                run_s=self._run_s,
                num_lanes=max(1, round(client.shape.num_lanes * self._scale)),
                stream=_streams(seed),
            )
            for client, starts, pool, seed in zip(
                self._recipe.clients, self._starts(span_s), self._pools, self._seeds, strict=True
            )
        ]

    def _starts(self, span_s: float) -> list[Times]:
        """Each client's arrivals; of conversations, they begin before the run does, so that it is settled."""
        clients = self._recipe.clients
        if self._recipe.together is None:
            return [
                _settled(client.arrivals, _child(seed, 1), float(rate), span_s, _settling_s(client))
                for client, seed, rate in zip(clients, self._seeds, self._rates, strict=True)
            ]
        early_s = max(map(_settling_s, clients))
        times = _settled(self._recipe.together, _child(self._together, 0), float(self._rates.sum()), span_s, early_s)
        draws = _streams(self._together)(1).random(len(times))
        owners = np.searchsorted(np.cumsum(self._rates) / self._rates.sum(), draws, side="right")
        return [times[owners == index] for index in range(len(clients))]

    def requests(self, columns: Sequence[Columns], order: Ints) -> list[SimRequest]:
        """The requests at these positions of all columns one after the other, in this order."""
        place = np.full(sum(len(column.arrival) for column in columns), -1, np.int64)
        place[order] = np.arange(len(order))
        found: list[SimRequest | None] = [None] * len(order)
        next_id = max(pool.next_id for pool in self._pools)
        offset = 0
        for client, column, pool in zip(self._recipe.clients, columns, self._pools, strict=True):
            places = place[offset : offset + len(column.arrival)]
            next_id = _fill(found, client, column, pool, places, self._recipe.block_size, next_id)
            offset += len(places)
        return [request for request in found if request is not None]


def _fill(
    found: list[SimRequest | None],
    client: Client,
    column: Columns,
    pool: Pool,
    places: Ints,
    block_size: int,
    next_id: int,
) -> int:
    """Put a client's requests where they belong (-1: nowhere). Returns the first block id that is free."""
    talks = client.shape.turns is not None
    own: tuple[int, ...] = ()
    rows = zip(
        places.tolist(),
        column.arrival.tolist(),
        column.num_prompt.tolist(),
        column.num_output.tolist(),
        column.prefix.tolist(),
        column.previous.tolist(),
        column.think.tolist(),
        strict=True,
    )
    for place, arrival_s, num_prompt, num_output, prefix, previous, think_s in rows:
        blocks = pool.blocks(prefix)
        if talks:  # what a turn adds, the later ones have, too
            if previous < 0:
                own = ()
            num_new = num_prompt // block_size - len(blocks) - len(own)
            own += tuple(range(next_id, next_id + num_new))
            next_id += num_new
            blocks += own
        if place >= 0:
            found[place] = SimRequest(
                arrival_s=arrival_s,
                num_prompt=num_prompt,
                num_output=num_output,
                blocks=blocks,
                tenant=client.tenant,
                follows=int(places[previous]) if previous >= 0 else None,
                think_s=think_s,
            )
    return next_id


def _settling_s(client: Client) -> float:
    """How long before the run conversations begin."""
    shape = client.shape
    return _SETTLING * shape.turns.mean * shape.think_s if shape.turns and not shape.num_lanes else 0.0


def _settled(arrivals: Arrivals, seed: np.random.SeedSequence, rate: float, span_s: float, early_s: float) -> Times:
    return until(arrivals, seed, rate, span_s + early_s) - early_s


def _streams(seed: np.random.SeedSequence) -> Stream:
    return lambda purpose: np.random.default_rng(_child(seed, purpose))


def _child(seed: np.random.SeedSequence, purpose: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(entropy=seed.entropy, spawn_key=(*seed.spawn_key, purpose))
