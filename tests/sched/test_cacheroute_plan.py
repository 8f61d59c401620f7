"""The plan of CacheRoute: its limits hold, and it is the one the steps describe."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from preble_jax.sched.placement.base import slots_of
from preble_jax.sched.placement.cacheroute_plan import make_plan

KEYS = [bytes([i]) for i in range(12)]
rates = st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0.25, 0.5, 1.0, 3.0, 8.0]))
groups = st.sets(st.integers(0, 6), min_size=1).map(sorted)


def literal(rate: dict[bytes, float], groups: list[int], q_cap: float, w: int, before: dict) -> dict[bytes, set[int]]:
    """The three steps of the module, with nothing but lists."""
    copies: dict[bytes, int] = {}
    for key in sorted(rate, key=lambda key: (-rate[key], key)):
        k = min(max(1, math.ceil(rate[key] / q_cap)), len(groups))
        if sum(copies.values()) + k > w * len(groups):
            break
        copies[key] = k
    mean = sum(rate[key] for key in copies) / len(groups)
    plan: dict[bytes, set[int]] = {}

    def load(i: int) -> float:
        return sum(rate[key] / copies[key] for key in plan if i in plan[key])

    def has_room(i: int) -> bool:
        return sum(i in there for there in plan.values()) < w

    for key in sorted(copies, key=lambda key: (-rate[key] / copies[key], key)):
        had = [i for i in groups if i in before.get(key, ()) and has_room(i) and load(i) <= mean]
        others = sorted((i for i in groups if has_room(i) and i not in had), key=lambda i: (load(i), i))
        plan[key] = set([*had, *others][: copies[key]])
    return plan


@given(first=rates, second=rates, one=groups, other=groups, q_cap=st.sampled_from([0.5, 1.0, 2.0]), w=st.integers(1, 3))
def test_two_plans_in_a_row(
    first: dict[bytes, float], second: dict[bytes, float], one: list[int], other: list[int], q_cap: float, w: int
) -> None:
    before = make_plan(first, one, q_cap, w, {})
    after = make_plan(second, other, q_cap, w, before)
    assert as_sets(before) == literal(first, one, q_cap, w, {})
    assert as_sets(after) == literal(second, other, q_cap, w, as_sets(before))
    for i in other:
        assert sum(mask >> i & 1 for mask in after.values()) <= w
    assert all(mask for mask in after.values())


@given(rates=rates, groups=groups, q_cap=st.sampled_from([0.5, 2.0]))
def test_no_group_gets_more_than_the_mean_and_one_share(
    rates: dict[bytes, float], groups: list[int], q_cap: float
) -> None:
    """Graham's bound, also for a plan that keeps what it can of another; where slots are no constraint."""
    before = make_plan(dict.fromkeys(KEYS, 1.0), groups, q_cap, 100, {})
    plan = make_plan(rates, groups, q_cap, 100, before)
    assert plan.keys() == rates.keys()
    shares = {key: rates[key] / mask.bit_count() for key, mask in plan.items()}
    loads = [sum(shares[key] for key, mask in plan.items() if mask >> i & 1) for i in groups]
    if all(mask.bit_count() == 1 for mask in plan.values()):  # the bound is for shares that may go anywhere
        assert max(loads) <= sum(rates.values()) / len(groups) + max(shares.values(), default=0.0) + 1e-9


@given(rates=rates, groups=groups)
def test_the_same_rates_keep_the_plan(rates: dict[bytes, float], groups: list[int]) -> None:
    plan = make_plan(rates, groups, 1.0, 3, {})
    assert make_plan(rates, groups, 1.0, 3, plan) == plan


def test_a_key_over_the_cap_gets_more_destinations() -> None:
    assert make_plan({b"hot": 3.0, b"cold": 0.5}, [0, 1, 2, 3], 1.0, 4, {}) == {b"hot": 0b0111, b"cold": 0b1000}


def test_a_group_is_kept_warm_for_so_many_keys_only() -> None:
    rates = {b"a": 1.0, b"b": 0.3, b"c": 0.2, b"d": 0.1}
    plan = make_plan(rates, [0, 1], 2.0, 2, {})
    assert plan == {b"a": 0b01, b"b": 0b10, b"c": 0b10, b"d": 0b01}, "group 1 is the lighter, but full"
    assert make_plan(rates | {b"e": 0.05}, [0, 1], 2.0, 2, {}) == plan, "the fifth is not admitted"


def as_sets(plan: dict[bytes, int]) -> dict[bytes, set[int]]:
    return {key: set(slots_of(mask)) for key, mask in plan.items()}
