"""Jain's index, fair shares and the service gap, on cases that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.config import TenantSettings
from preble_jax.sim.fairness import (
    fair_share_ratios,
    jain_index,
    largest_service_gap,
    max_min_shares,
    service_over_time,
)
from preble_jax.sim.record import RequestRecord, SimResult

UNITS = TenantSettings(extend_weight=1.0, output_weight=2.0)


def record(index: int, tenant: str, sent_s: float, *, waits_s: float, num_prompt: int = 100, ends: bool = True):
    return RequestRecord(
        index=index,
        tenant=tenant,
        num_prompt=num_prompt,
        num_output=10,
        sent_s=sent_s,
        queue_s=waits_s if ends else None,
        first_token_s=sent_s + waits_s if ends else None,
        finished_s=sent_s + waits_s + 1 if ends else None,
        made_tokens=10 if ends else 0,
        num_placements=1,
        status="finished" if ends else "unfinished",
    )


def result(records, served, end_s: float) -> SimResult:
    return SimResult(requests=records, groups=[], served=served, end_s=end_s, wall_s=1.0, place_s=0.0)


def test_jains_index() -> None:
    assert jain_index([]) == jain_index([0.0, 0.0]) == jain_index([3.0]) == jain_index([2.0, 2.0, 2.0]) == 1.0
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == 0.25
    assert jain_index([1.0, 3.0]) == pytest.approx(16 / 20)


def test_water_filling() -> None:
    equal = dict.fromkeys("abc", 1.0)
    assert max_min_shares({"a": 1.0, "b": 9.0, "c": 9.0}, equal, 11.0) == {"a": 1.0, "b": 5.0, "c": 5.0}
    assert max_min_shares({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 1.0}, 9.0) == {"a": 1.0, "b": 2.0}
    weighted = max_min_shares({"a": 9.0, "b": 9.0}, {"a": 1.0, "b": 3.0}, 8.0)
    assert weighted == {"a": 2.0, "b": 6.0}
    assert max_min_shares({}, {}, 5.0) == {}


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0.1, 10)), min_size=1, max_size=8),
    st.floats(0, 300),
)
def test_shares_are_max_min(rows: list[tuple[float, float]], total: float) -> None:
    """All is given out, nobody gets more than they ask for, and who gets less is at the highest level per weight."""
    demands = {str(index): demand for index, (demand, _) in enumerate(rows)}
    weights = {str(index): weight for index, (_, weight) in enumerate(rows)}
    shares = max_min_shares(demands, weights, total)
    assert math.isclose(sum(shares.values()), min(total, sum(demands.values())), abs_tol=1e-6)
    level = max(share / weights[tenant] for tenant, share in shares.items())
    for tenant, share in shares.items():
        assert share <= demands[tenant] + 1e-9
        assert share >= demands[tenant] - 1e-6 or share / weights[tenant] >= level - 1e-6


def test_a_greedy_tenant_that_is_served_by_what_it_sends_is_unfair() -> None:
    """Both could have had 600 units each of the 1,200 that were given; one got 900, the other 300."""
    records = [record(index, "greedy", 0.0, waits_s=1.0) for index in range(20)]
    records += [record(index, "modest", 0.0, waits_s=1.0) for index in range(20, 27)]
    records += [record(27, "modest", 10.0, waits_s=1.0, ends=False)]
    served = [(1.0, "greedy", 300, 0), (5.0, "greedy", 400, 100), (4.0, "modest", 300, 0), (11.0, "greedy", 500, 0)]
    ratios = fair_share_ratios(result(records, served, 20.0), UNITS)
    assert ratios == {"greedy": 1.5, "modest": 0.5}, "what came after the last arrival does not count"


def test_who_asks_for_little_and_gets_it_is_served_fairly() -> None:
    records = [record(index, "greedy", 0.0, waits_s=1.0) for index in range(20)]
    records += [record(20, "modest", 10.0, waits_s=0.0)]
    served = [(1.0, "greedy", 1000, 0), (10.0, "modest", 100, 10)]
    assert fair_share_ratios(result(records, served, 20.0), UNITS) == {"greedy": 1.0, "modest": 1.0}


def test_cached_tokens_are_no_demand() -> None:
    """An admitted request asks for what it had to compute; one that never was, for its tenant's usual share."""
    cached = record(0, "a", 0.0, waits_s=0.0)
    cached.cached_tokens = 90
    records = [cached, record(1, "a", 1.0, waits_s=0.0, ends=False), record(2, "b", 1.0, waits_s=0.0)]
    served = [(0.0, "a", 10, 10), (1.0, "b", 100, 10)]
    ratios = fair_share_ratios(result(records, served, 5.0), UNITS)
    assert ratios == {"a": pytest.approx(30 / 60), "b": pytest.approx(120 / 90)}


def test_turns_that_were_never_sent_are_no_demand() -> None:
    """The run was over before them."""
    never = record(2, "b", 50.0, waits_s=0.0, ends=False)
    never.num_placements = 0
    records = [record(0, "a", 0.0, waits_s=0.0), record(1, "b", 5.0, waits_s=0.0)]
    served = [(0.0, "a", 100, 10), (5.0, "b", 100, 10), (20.0, "a", 500, 0)]
    assert fair_share_ratios(result([*records, never], served, 30.0), UNITS) == {"a": 1.0, "b": 1.0}


def test_all_that_came_at_one_instant_counts_until_the_end() -> None:
    records = [record(index, "ab"[index % 2], 3.0, waits_s=1.0) for index in range(20)]
    served = [(3.0, "a", 100, 0), (4.0, "a", 500, 0), (9.0, "b", 100, 50), (20.0, "a", 0, 100)]
    ratios = fair_share_ratios(result(records, served, 20.0), UNITS)
    assert ratios == {"a": 800 / 500, "b": 200 / 500}, "at 3.0 only a was served"


def test_where_nothing_was_served_before_the_last_arrival_all_counts() -> None:
    records = [record(index, "ab"[index % 2], 0.1 * index, waits_s=5.0) for index in range(20)]
    served = [(5.0, "a", 300, 0), (6.0, "b", 100, 0)]
    assert fair_share_ratios(result(records, served, 7.0), UNITS) == {"a": 1.5, "b": 0.5}
    served = [(1.9, "a", 0, 1), *served]
    assert fair_share_ratios(result(records, served, 7.0), UNITS) == {"a": 2.0, "b": 0.0}, "as soon as something was"


def test_one_tenant_or_nothing_at_all() -> None:
    assert fair_share_ratios(result([], [], 0.0), UNITS) == {}
    assert largest_service_gap(result([], [], 0.0), UNITS) == 0.0
    alone = result([record(0, "a", 0.0, waits_s=9.0)], [(5.0, "a", 100, 0)], 10.0)
    assert largest_service_gap(alone, UNITS) == 0.0


def test_the_gap_counts_only_while_both_wait() -> None:
    records = [record(0, "a", 0.0, waits_s=60.0), record(1, "b", 20.0, waits_s=20.0), record(2, "b", 50.0, waits_s=8.0)]
    served = [
        (10.0, "a", 10_000, 0),  # b does not wait yet
        (25.0, "a", 300, 0),
        (30.0, "b", 100, 100),  # the other direction: 300 behind, now level
        (35.0, "a", 0, 250),
        (45.0, "a", 10_000, 0),  # b does not wait
        (55.0, "b", 400, 0),
        (90.0, "a", 10_000, 0),  # nobody does
    ]
    assert largest_service_gap(result(records, served, 100.0), UNITS) == 500.0
    heavier = TenantSettings(weights=(("a", 2.0),))
    assert largest_service_gap(result(records, served, 100.0), heavier) == 400.0


def test_service_over_time() -> None:
    records = [record(0, "b", 0.0, waits_s=1.0), record(1, "a", 0.0, waits_s=1.0)]
    times, served = service_over_time(result(records, [(2.5, "b", 100, 0), (10.0, "a", 0, 5)], 10.0), UNITS, 5)
    assert times == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert list(served.items()) == [("a", [0, 0, 0, 0, 10]), ("b", [0, 100, 100, 100, 100])]
