"""Who was served how much: Jain's index over max-min fair shares, and the largest service gap between tenants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from preble_jax.config import TenantSettings
from preble_jax.sim.record import RequestRecord, SimResult

# The gap is looked at between so many tenants, those that asked for the most, and at so many times.
MAX_TENANTS = 48
MAX_TIMES = 4_000


def max_min_shares(demands: Mapping[str, float], weights: Mapping[str, float], total: float) -> dict[str, float]:
    """Divides `total` by water-filling: each gets its demand or the water level times its weight, whichever is less.

    The shares add up to min(total, sum of demands). A weight is above 0.
    """
    shares: dict[str, float] = {}
    left = total
    weight_left = sum(weights[tenant] for tenant in demands)
    for tenant in sorted(demands, key=lambda tenant: demands[tenant] / weights[tenant]):
        share = min(demands[tenant], left * weights[tenant] / weight_left)
        shares[tenant] = share
        left -= share
        weight_left -= weights[tenant]
    return shares


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything; 1 for none."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def was_sent(record: RequestRecord) -> bool:
    """Not so when the run ended before a conversation's next turn."""
    return record.status != "unfinished" or record.num_placements > 0


def demand(records: Sequence[RequestRecord], tenants: TenantSettings) -> dict[str, float]:
    """Service units each tenant asked for, in what was sent. What a request that was never admitted would have had to
    compute is taken from its tenant's others: their share of uncached prompt tokens, all of it where there are none."""
    prompt: dict[str, int] = {}
    extend: dict[str, int] = {}
    for record in records:
        if record.status == "finished":
            prompt[record.tenant] = prompt.get(record.tenant, 0) + record.num_prompt
            extend[record.tenant] = extend.get(record.tenant, 0) + record.num_prompt - record.cached_tokens
    asked: dict[str, float] = {}
    for record in filter(was_sent, records):
        if record.status == "finished":
            tokens = float(record.num_prompt - record.cached_tokens)
        else:
            tokens = record.num_prompt * extend.get(record.tenant, 1) / prompt.get(record.tenant, 1)
        units = tenants.extend_weight * tokens + tenants.output_weight * record.num_output
        asked[record.tenant] = asked.get(record.tenant, 0.0) + units
    return asked


def fair_share_ratios(result: SimResult, tenants: TenantSettings) -> dict[str, float]:
    """For each tenant: service received between the first and the last arrival, over its max-min fair share (by
    weight and demand) of all that was given in that time. Without overload everybody has about 1.

    Where all came at one instant, or nothing was served before the last arrival, the time goes on to the run's end.
    """
    sent = [record for record in result.requests if was_sent(record)]
    if not sent:
        return {}
    begin_s = min(record.sent_s for record in sent)
    end_s = max(record.sent_s for record in sent)
    received = _received(result, tenants, begin_s, end_s)
    if begin_s == end_s or not any(received.values()):
        received = _received(result, tenants, begin_s, max(end_s, result.end_s))
    asked = demand(sent, tenants)
    weights = {tenant: tenants.weight(tenant) for tenant in asked}
    shares = max_min_shares(asked, weights, sum(received.values()))
    return {tenant: received[tenant] / share for tenant, share in shares.items() if share > 0}


def _received(result: SimResult, tenants: TenantSettings, begin_s: float, end_s: float) -> dict[str, float]:
    """Service units of every tenant in that time, both ends included."""
    received = {record.tenant: 0.0 for record in result.requests}
    for at_s, tenant, extend_tokens, output_tokens in result.served:
        if begin_s <= at_s <= end_s:
            received[tenant] += tenants.service(extend_tokens, output_tokens)
    return received


def largest_service_gap(result: SimResult, tenants: TenantSettings) -> float:
    """Service units: the most by which one tenant got ahead of another (each over its weight) in any stretch of time
    through which both had requests waiting. 0 when no two ever waited together.

    Looked at on a grid of MAX_TIMES, between the MAX_TENANTS that asked for the most.
    """
    asked = demand(result.requests, tenants)
    names = sorted(asked, key=lambda tenant: (-asked[tenant], tenant))[:MAX_TENANTS]
    if len(names) < 2 or result.end_s <= 0:
        return 0.0
    times = np.linspace(0.0, result.end_s, MAX_TIMES)
    waits = _waiting(result, names, times)
    served = _cumulated(result, names, times, tenants)
    largest = 0.0
    for first in range(len(names)):
        for second in range(first):
            both = waits[first] & waits[second]
            if both.any():
                largest = max(largest, _largest_swing(served[first] - served[second], both))
    return largest


def _largest_swing(values: NDArray[np.float64], inside: NDArray[np.bool_]) -> float:
    """Greatest max - min of the values over any unbroken stretch of `inside`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], inside, [False]))))
    stretches = edges.reshape(-1, 2)
    # reduceat takes [begin, next begin): handed begin and end in turn, every second answer is a stretch.
    padded = np.append(values, values[-1])
    highest = np.maximum.reduceat(padded, stretches.ravel())[::2]
    lowest = np.minimum.reduceat(padded, stretches.ravel())[::2]
    return float((highest - lowest).max())


def _waiting(result: SimResult, names: Sequence[str], times: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[tenant, time]: whether a request of the tenant had been sent and not been admitted."""
    row_of = {tenant: row for row, tenant in enumerate(names)}
    records = [
        record
        for record in result.requests
        if record.tenant in row_of and record.status != "rejected" and was_sent(record)
    ]
    rows = np.array([row_of[record.tenant] for record in records], dtype=np.int64)
    sent = np.searchsorted(times, [record.sent_s for record in records])
    admitted = np.searchsorted(times, [_admitted_s(record, result.end_s) for record in records])
    changes = np.zeros((len(names), len(times) + 1), dtype=np.int64)
    np.add.at(changes, (rows, sent), 1)
    np.add.at(changes, (rows, np.maximum(sent, admitted)), -1)
    return np.asarray(np.cumsum(changes[:, :-1], axis=1) > 0)


def _admitted_s(record: RequestRecord, end_s: float) -> float:
    if record.num_placements <= 1 and record.queue_s is not None:
        return record.sent_s + record.queue_s
    if record.first_token_s is not None:
        return record.first_token_s
    return end_s if record.finished_s is None else record.finished_s


def _cumulated(
    result: SimResult, names: Sequence[str], times: NDArray[np.float64], tenants: TenantSettings
) -> NDArray[np.float64]:
    """[tenant, time]: service units received until then, over the tenant's weight."""
    row_of = {tenant: row for row, tenant in enumerate(names)}
    pieces = [piece for piece in result.served if piece[1] in row_of]
    rows = np.array([row_of[tenant] for _, tenant, _, _ in pieces], dtype=np.int64)
    columns = np.minimum(np.searchsorted(times, [piece[0] for piece in pieces]), len(times) - 1)
    units = [tenants.service(extend, output) / tenants.weight(tenant) for _, tenant, extend, output in pieces]
    served = np.zeros((len(names), len(times)))
    np.add.at(served, (rows, columns), units)
    return np.asarray(np.cumsum(served, axis=1))


def service_over_time(
    result: SimResult, tenants: TenantSettings, num_points: int = 200
) -> tuple[list[float], dict[str, list[float]]]:
    """(times, units that each tenant had received by then), for a plot; tenants by name."""
    names = sorted({record.tenant for record in result.requests})
    times = np.linspace(0.0, result.end_s, num_points)
    equal = TenantSettings(extend_weight=tenants.extend_weight, output_weight=tenants.output_weight)
    served = _cumulated(result, names, times, equal)
    return times.tolist(), {tenant: row.tolist() for tenant, row in zip(names, served, strict=True)}
