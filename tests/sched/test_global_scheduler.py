"""Requests and groups come and go; what is refused changes nothing."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_forest import chain
from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.errors import (
    ConfigError,
    GroupUnavailableError,
    InvalidRequestError,
    InvariantError,
    NotFoundError,
    OverloadedError,
    PrebleError,
    PromptTooLongError,
)
from preble_jax.kv.events import BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler, GroupLost, Placement, PlaceRequest, RequestSnapshot
from preble_jax.sched.cost import PROFILED_ROWS, LinearCostModel
from preble_jax.sched.groups import Group, GroupTable
from preble_jax.sched.placement import LeastAddedDelay, make_policy
from preble_jax.sched.placement.base import slots_of
from preble_jax.sched.step_fit import StepTotals
from preble_jax.sched.window import Window

PAGE_SIZE = 4
COST = LinearCostModel.from_settings(SchedSettings())


@dataclass
class Report:
    num_waiting: int = 3
    num_running: int = 2


def make(num_groups: int = 3, **kwargs) -> GlobalScheduler:
    scheduler = GlobalScheduler(SchedSettings(**kwargs), PAGE_SIZE)
    for group in range(num_groups):
        scheduler.add_group(str(group), 50, 1, 0.0)
    return scheduler


def request(name: str, path: tuple[int, ...] = (1, 2, 3), **kwargs) -> PlaceRequest:
    return PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1, **kwargs)


def picture(scheduler: GlobalScheduler) -> object:
    """Everything that shows from outside."""
    stats = scheduler.stats()
    return stats, scheduler.num_outstanding, scheduler.num_blocks, {group: scheduler.blocks(group) for group in stats}


REFUSED: list[tuple[type[PrebleError], Callable[[GlobalScheduler], object]]] = [
    (InvalidRequestError, lambda s: s.place(request(""), 1.0)),
    (InvalidRequestError, lambda s: s.place(request("busy"), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), num_tokens=0), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), num_tokens=-5, block_hashes=()), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), num_tokens=11), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), max_tokens=-1), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), tenant=""), 1.0)),
    (InvalidRequestError, lambda s: s.place(replace(request("n"), block_hashes=chain((7,)) * 2), 1.0)),
    (InvalidRequestError, lambda s: s.place(request("n"), math.nan)),
    (InvalidRequestError, lambda s: s.place(request("n"), math.inf)),
    (PromptTooLongError, lambda s: s.place(replace(request("n"), num_tokens=201), 1.0)),
    (GroupUnavailableError, lambda s: s.place(request("n", excluded=frozenset("012")), 1.0)),
    (NotFoundError, lambda s: s.finished("never", 1, 1, 1.0)),
    (InvalidRequestError, lambda s: s.finished("busy", -1, 1, 1.0)),
    (InvalidRequestError, lambda s: s.finished("busy", 1, -1, 1.0)),
    (InvalidRequestError, lambda s: s.finished("busy", 1, 14, 1.0)),
    (InvalidRequestError, lambda s: s.finished("busy", 1, 1, math.nan)),
    (InvalidRequestError, lambda s: s.finished("busy", 1, 1, 1.0, queue_s=-1.0)),
    (InvalidRequestError, lambda s: s.finished("busy", 1, 1, 1.0, queue_s=math.nan)),
    (NotFoundError, lambda s: s.first_token("never", 1.0)),
    (InvalidRequestError, lambda s: s.first_token("busy", 1.0, math.inf)),
    (InvalidRequestError, lambda s: s.first_token("busy", math.nan)),
    (InvalidRequestError, lambda s: s.add_group("", 50, 1, 1.0)),
    (InvalidRequestError, lambda s: s.add_group("9", 0, 1, 1.0)),
    (InvalidRequestError, lambda s: s.add_group("9", 50, -1, 1.0)),
    (InvalidRequestError, lambda s: s.add_group("0", 70, 0, 1.0)),
    (NotFoundError, lambda s: s.remove_group("9", 1.0)),
    (NotFoundError, lambda s: s.drain_group("9")),
    (NotFoundError, lambda s: s.load_report("9", Report(), 1.0)),
    (InvalidRequestError, lambda s: s.tick(math.nan)),
    (InvalidRequestError, lambda s: s.load_report("0", Report(-5), 1.0)),
    (InvalidRequestError, lambda s: s.load_report("0", Report(), 1.0, next_seq=-1)),
    (InvalidRequestError, lambda s: s.load_report("0", Report(), 1.0, steps=StepTotals(1, 1, 1, math.nan))),
    (InvalidRequestError, lambda s: s.load_report("0", Report(), 1.0, steps=StepTotals(1, -1, 1, 1.0))),
    (InvalidRequestError, lambda s: s.finished("busy", 10**400, 0, 1.0)),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_is_refused_changes_nothing(case: int) -> None:
    error, call = REFUSED[case]
    scheduler, untouched = make(), make()
    for each in (scheduler, untouched):
        each.place(request("busy"), 0.5)
    before = picture(scheduler)
    with pytest.raises(error):
        call(scheduler)
    assert picture(scheduler) == before
    scheduler.validate()
    for i in range(5):
        assert scheduler.place(request(f"r{i}", (i,)), 1.0) == untouched.place(request(f"r{i}", (i,)), 1.0)


def test_a_request_ends_once_and_may_be_placed_again() -> None:
    scheduler = make()
    group = scheduler.place(request("a"), 0.0).group
    assert scheduler.stats()[group].num_outstanding == 1
    scheduler.finished("a", 0, 0, 1.0, failed=True)
    with pytest.raises(NotFoundError):
        scheduler.finished("a", 1, 0, 1.0)
    again = scheduler.place(request("a", excluded=frozenset({group})), 1.0)
    assert again.group != group and group not in again.alternatives
    scheduler.finished("a", 7, 8, 2.0)
    row = scheduler.stats()[again.group]
    assert (row.num_outstanding, row.output_tokens, row.prompt_tokens, row.cached_tokens) == (0, 7, 13, 8)
    assert row.hit_ratio == 8 / 13
    failed = scheduler.stats()[group]
    assert (failed.num_failed, failed.prompt_tokens, failed.hit_ratio) == (1, 0, 0.0)
    scheduler.validate()


def test_a_request_nobody_finishes_is_forgotten() -> None:
    scheduler = make(request_timeout_s=30.0, group_timeout_s=1e6)
    scheduler.place(request("a"), 0.0)
    scheduler.place(request("b"), 20.0)
    scheduler.tick(35.0)
    assert scheduler.num_outstanding == 1
    with pytest.raises(NotFoundError):
        scheduler.finished("a", 1, 0, 35.0)
    scheduler.finished("b", 1, 0, 35.0)
    scheduler.validate()


def test_silent_groups_are_lost_and_come_back() -> None:
    scheduler = make(2, group_timeout_s=5.0)
    scheduler.load_report("1", Report(), 4.0)
    assert scheduler.tick(5.0) == []
    assert scheduler.tick(5.5) == [GroupLost("0")]
    assert scheduler.tick(5.6) == []
    assert list(scheduler.stats()) == ["1"] and scheduler.stats()["1"].num_waiting == 3
    assert scheduler.place(request("a"), 6.0).group == "1"
    with pytest.raises(NotFoundError):
        scheduler.load_report("0", Report(), 6.0)
    assert scheduler.add_group("0", 50, 1, 6.0) == [RequestSnapshot("0")]
    assert scheduler.place(request("b", excluded=frozenset("1")), 6.0).group == "0"
    scheduler.validate()


def test_draining_groups_get_nothing_new_but_are_heard() -> None:
    scheduler = make(2)
    scheduler.drain_group("0")
    assert {scheduler.place(request(f"r{i}", (i,)), 0.0).group for i in range(5)} == {"1"}
    scheduler.kv_events("0", EventBatch(1, 0, (BlocksStored(chain((1,)), None),)), 0.0)
    scheduler.add_group("0", 50, 1, 0.0)
    assert scheduler.stats()["0"].draining, "the same process registers again: it still drains"
    scheduler.add_group("0", 50, 2, 0.0)
    assert not scheduler.stats()["0"].draining
    scheduler.drain_group("0")
    scheduler.drain_group("1")
    with pytest.raises(GroupUnavailableError):
        scheduler.place(request("x"), 0.0)


def test_a_removed_groups_requests_can_still_be_finished() -> None:
    scheduler = make(2)
    group = scheduler.place(request("a"), 0.0).group
    scheduler.remove_group(group, 1.0)
    other = scheduler.place(request("b"), 1.0)
    assert other.group != group and other.matched_tokens == 0
    scheduler.finished("a", 5, 0, 2.0, failed=True)
    scheduler.finished("b", 5, 0, 2.0)
    scheduler.validate()


def test_slots_are_used_again_after_the_window_only() -> None:
    scheduler = make(1, window_s=10.0, optimistic_ttl_s=30.0, group_timeout_s=1e6)
    scheduler.place(request("a"), 0.0)
    scheduler.remove_group("0", 1.0)
    scheduler.add_group("new", 50, 1, 1.0)
    assert len(scheduler._forest.num_held) == 2
    scheduler.place(request("b"), 2.0)
    for name in "ab":
        scheduler.finished(name, 5, 0, 3.0)
    scheduler.remove_group("new", 20.0)
    scheduler.tick(20.0)
    for i in range(5):
        scheduler.add_group(f"later{i}", 50, 1, 21.0 + 20 * i)
        placement = scheduler.place(request(f"c{i}"), 22.0 + 20 * i)
        assert placement.matched_tokens == 0, "nothing of the slot's former group"
        scheduler.validate()
        scheduler.finished(f"c{i}", 5, 0, 23.0 + 20 * i)
        scheduler.remove_group(f"later{i}", 23.0 + 20 * i)
        scheduler.tick(40.0 + 20 * i)
    assert len(scheduler._forest.num_held) == 2


def test_a_slot_is_not_used_again_while_a_request_of_its_group_has_not_ended() -> None:
    scheduler = make(1, window_s=10.0, optimistic_ttl_s=10.0, group_timeout_s=1e6)
    scheduler.place(request("slow"), 0.0)
    scheduler.remove_group("0", 1.0)
    scheduler.tick(20.0)
    scheduler.add_group("new", 50, 1, 21.0)
    scheduler.place(request("a"), 21.0)
    scheduler.validate()
    scheduler.finished("slow", 5, 0, 22.0)
    scheduler.validate()
    assert list(scheduler._groups._by_queue.ascending(0b11)) == [1], "who is gone is in no order"
    scheduler.add_group("next", 50, 1, 23.0)
    assert [scheduler._groups.get(name).slot for name in ("new", "next")] == [1, 0]
    scheduler.validate()


def test_optimistic_pages_settle_or_expire() -> None:
    scheduler = make(2, placement="e2", optimistic_ttl_s=10.0, window_s=10.0, group_timeout_s=1e6, rebalance=False)
    first = scheduler.place(request("a", (1, 2, 3, 4)), 0.0)
    assert scheduler.place(request("b", (1, 2, 3, 4)), 5.0).matched_tokens == 16
    scheduler.kv_events(first.group, EventBatch(1, 0, (BlocksStored(chain((1, 2)), None),)), 6.0)
    scheduler.tick(15.1)
    assert scheduler.blocks(first.group) == set(chain((1, 2)))
    assert scheduler.num_blocks == 2
    scheduler.validate()


def test_the_last_token_is_never_matched() -> None:
    scheduler = make(1)
    whole = PlaceRequest(request_id="a", block_hashes=chain((1, 2, 3)), num_tokens=12)
    scheduler.place(whole, 0.0)
    assert scheduler.place(replace(whole, request_id="b"), 0.0).matched_tokens == 8


def test_prompts_without_a_full_page() -> None:
    scheduler = make(2)
    placed = [scheduler.place(PlaceRequest(request_id=str(i), block_hashes=(), num_tokens=3), 0.0) for i in range(4)]
    assert {p.decision for p in placed} == {"explore"} and {p.group for p in placed} == {"0", "1"}
    scheduler.validate()


def test_small_groups_get_no_large_prompts() -> None:
    scheduler = make(1)
    scheduler.add_group("large", 500, 1, 0.0)
    assert {scheduler.place(request(f"r{i}", (i,) * 60), 0.0).group for i in range(3)} == {"large"}
    scheduler.add_group("0", 500, 1, 0.0)
    assert "0" in {scheduler.place(request(f"s{i}", (5 + i,) * 60), 0.0).group for i in range(5)}


def test_time_that_runs_backwards_counts_as_the_latest() -> None:
    scheduler = make(1, window_s=10.0)
    scheduler.place(request("a"), 100.0)
    scheduler.place(request("b"), 50.0)
    scheduler.validate()
    scheduler.load_report("0", Report(), 60.0)
    assert scheduler.tick(104.0) == []


def test_round_robin_takes_turns_among_the_eligible() -> None:
    scheduler = make(3, placement="round_robin")
    placed = [scheduler.place(request(str(i)), 0.0) for i in range(6)]
    assert [p.group for p in placed] == ["0", "1", "2"] * 2
    assert placed[0].alternatives == ("1", "2") and placed[1].alternatives == ("0", "2")
    assert {p.decision for p in placed} == {"round_robin"}
    assert placed[3].matched_tokens == 12, "what it knows is told, though not used"
    assert scheduler.place(request("x", excluded=frozenset("0")), 0.0).group == "1"
    scheduler.drain_group("2")
    assert [scheduler.place(request(f"y{i}"), 0.0).group for i in range(3)] == ["0", "1", "0"]


def test_alternatives_prefer_who_holds_the_prompt() -> None:
    scheduler = make(4, group_timeout_s=1e6)
    path = (1,) * 10
    for group in "13":
        scheduler.kv_events(group, EventBatch(1, 0, (BlocksStored(chain(path), None),)), 0.0)
    scheduler.kv_events("2", EventBatch(1, 0, (BlocksStored(chain(path[:5]), None),)), 0.0)
    placement = scheduler.place(request("a", path), 0.0)
    assert placement.decision == "exploit"
    assert {placement.group, placement.alternatives[0]} == {"1", "3"}
    assert placement.alternatives[1] == "2"


@pytest.mark.parametrize(
    "bad",
    [
        {"window_s": 0.0},
        {"window_s": math.nan},
        {"max_forest_blocks": 0},
        {"optimistic_ttl_s": -1.0},
        {"imbalance_ratio": math.nan},
        {"prefill_token_s": -1.0},
        {"decode_token_s": math.inf},
        {"placement": "e3"},
    ],
)
def test_settings_that_cannot_work(bad: dict) -> None:
    with pytest.raises(ConfigError):
        GlobalScheduler(replace(SchedSettings(), **bad), PAGE_SIZE)
    with pytest.raises(ConfigError):
        GlobalScheduler(SchedSettings(), 0)


def test_validate_sees_a_wrong_sum() -> None:
    scheduler = make(1)
    scheduler.place(request("a"), 0.0)
    scheduler._groups.at(0).prefill_ns += 1
    with pytest.raises(InvariantError, match="sums kept"):
        scheduler.validate()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda groups: groups.by_slot.reverse(), "groups by slot"),
        (lambda groups: groups._free_slots.append(0), "free slots"),
        (lambda groups: groups._by_queue.remove(groups.at(0)), "order of groups"),
        (
            lambda groups: groups._by_load.changed.add(Group("ghost", 0, 0.5, 1, 1, groups.at(0).cost)),
            "order of groups",
        ),
    ],
)
def test_validate_sees_wrong_books_of_groups(damage: Callable[[GroupTable], object], said: str) -> None:
    scheduler = make(2)
    scheduler.validate()
    damage(scheduler._groups)
    with pytest.raises(InvariantError, match=said):
        scheduler.validate()


def test_validate_sees_wrong_books_of_what_is_queued() -> None:
    def damaged(damage: Callable[[GlobalScheduler], object]) -> GlobalScheduler:
        scheduler = make(1)
        scheduler.place(replace(request("a"), tenant="one"), 0.0)
        scheduler.place(replace(request("b", (7, 8)), tenant="other"), 0.0)
        scheduler.validate()
        assert scheduler._groups.at(0).queued_by_tenant == {"one": 13, "other": 9}
        damage(scheduler)
        return scheduler

    with pytest.raises(InvariantError, match="22 queued tokens kept"):
        damaged(lambda s: s._groups.at(0).queued_by_tenant.pop("one")).validate()
    with pytest.raises(InvariantError, match="queued tokens by tenant"):
        damaged(lambda s: s._groups.at(0).queued_by_tenant.update(one=12, other=10)).validate()
    with pytest.raises(InvariantError, match="queued tokens by tenant"):
        damaged(lambda s: s._groups.at(0).queued_by_tenant.update(third=0)).validate()
    with pytest.raises(InvariantError, match="own blocks kept"):
        damaged(lambda s: setattr(s._groups.at(0), "own_blocks", 0)).validate()
    with pytest.raises(InvariantError, match="outstanding requests: kept 3 != found 2"):
        damaged(lambda s: setattr(s._state, "num_outstanding", 3)).validate()


def test_what_is_queued_by_tenant_follows_every_request() -> None:
    scheduler = make(1, request_timeout_s=50.0, group_timeout_s=1e6)
    group = scheduler._groups.at(0)
    for name, tenant in (("a", "one"), ("b", "one"), ("c", "other"), ("lost", "other"), ("failed", "third")):
        scheduler.place(replace(request(name, (9, *name.encode())), tenant=tenant), 0.0)
    size = {
        "one": 9 + 5,
        "other": 5 + 17,
        "third": 7 * 4 - 3,
    }  # the first page is the same, the last token always counts
    assert group.queued_by_tenant == size
    scheduler.first_token("a", 1.0)
    scheduler.finished("a", 3, 0, 2.0)
    assert group.queued_by_tenant == size | {"one": 5}
    scheduler.finished("failed", 0, 0, 2.0, failed=True)
    assert group.queued_by_tenant == {"one": 5, "other": 22}
    scheduler.finished("c", 3, 0, 2.0)
    scheduler.add_group("0", 50, 2, 3.0)  # another process: what was sent to the old one counts until it is reported
    assert group.queued_by_tenant == {"one": 5, "other": 17}
    scheduler.validate()
    scheduler.finished("b", 0, 0, 4.0, failed=True)
    scheduler.remove_group("0", 5.0)
    scheduler.validate()
    scheduler.tick(60.0)  # the last one was lost
    assert (group.queued_by_tenant, group.queued_tokens, scheduler.num_outstanding) == ({}, 0, 0)
    assert scheduler._state.num_outstanding == 0
    scheduler.validate()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["default", "e2", "round_robin"]), st.integers(5, 60))
def test_books_add_up_whatever_happens(seed: int, placement: str, max_blocks: int) -> None:
    """Groups restart, vanish and drain under traffic, with a forest that is too small."""
    random_ = random.Random(seed)
    scheduler = make(
        3, placement=placement, window_s=8.0, optimistic_ttl_s=3.0, group_timeout_s=6.0, max_forest_blocks=max_blocks
    )
    now, generation, running = 0.0, 1, list[tuple[str, Placement, tuple[int, ...]]]()
    begun: set[str] = set()
    for i in range(60):
        now += random_.choice((0.0, 0.1, 2.0))
        group = str(random_.randrange(4))
        match random_.randrange(8):
            case 0:
                generation += 1
                scheduler.add_group(group, 50, generation, now)
            case 1 if group in scheduler.stats():
                if random_.random() < 0.5:
                    scheduler.remove_group(group, now)
                else:
                    scheduler.drain_group(group)
            case 2 if running:
                name, placed, path = running.pop(random_.randrange(len(running)))
                if placed.group in scheduler.stats():
                    cursor = scheduler._groups.get(placed.group).cursor
                    event = BlocksStored(chain((*path, 9, 9)), None)
                    scheduler.kv_events(placed.group, EventBatch(cursor.generation, cursor.next_seq, (event,)), now)
                scheduler.finished(name, 5, 0, now, failed=random_.random() < 0.3)
            case 3:
                scheduler.tick(now)
            case 4 if running and running[-1][0] not in begun:
                begun.add(running[-1][0])
                scheduler.first_token(running[-1][0], now)
            case _ if any(not row.draining for row in scheduler.stats().values()):
                path = tuple(random_.randrange(2) for _ in range(random_.randrange(8)))
                asked = replace(request(str(i), path), tenant=random_.choice(("one", "other")))
                running.append((str(i), scheduler.place(asked, now), path))
        scheduler.validate()
        assert scheduler.num_blocks <= max_blocks
    for name, *_ in running:
        scheduler.finished(name, 0, 0, now, failed=True)
    scheduler.tick(now + 100.0)
    scheduler.validate()
    assert (scheduler.stats(), scheduler.num_outstanding, scheduler.num_blocks) == ({}, 0, 0)
    assert scheduler._groups.by_name == {}
    if isinstance(scheduler._policy, LeastAddedDelay):
        assert scheduler._policy._service._counts == {}, "no tenant has anything outstanding"


def test_window_hands_back_what_leaves() -> None:
    window: Window[str] = Window(10.0)
    assert [window.add(t, name) for t, name in [(0.0, "a"), (1.0, "b"), (1.0, "c")]] == [10.0, 11.0, 11.0]
    assert list(window.expire(9.9)) == [] and len(window) == 3
    assert list(window.expire(10.0)) == ["a"] and list(window) == ["b", "c"]
    assert list(window.expire(99.0)) == ["b", "c"] and not len(window)


def test_linear_cost() -> None:
    cost = LinearCostModel(prefill_base_s=0.01, prefill_token_s=0.001, decode_token_s=0.002)
    assert (cost.prefill_ns(0), cost.prefill_ns(1), cost.prefill_ns(100)) == (0, 11_000_000, 110_000_000)
    assert cost.decode_ns(2.5) == 5_000_000


def test_what_a_decode_row_costs() -> None:
    def row_s(decode_token_s: float, **kwargs: float) -> float:
        cost = LinearCostModel(prefill_base_s=0.016, prefill_token_s=0.001, decode_token_s=decode_token_s, **kwargs)
        assert cost.row_ns(2.5) == round(2.5e9 * cost.decode_row_s)
        return cost.decode_row_s

    assert row_s(0.005) == pytest.approx(0.005 - 0.016 / PROFILED_ROWS), "without its share of the step's base"
    assert row_s(0.002) == pytest.approx(0.0002), "a tenth at least"
    assert row_s(0.005, decode_row_s=0.0007) == 0.0007
    assert row_s(0.005, decode_row_s=0.0) == 0.0


def test_slots_of_a_mask() -> None:
    assert list(slots_of(0)) == []
    assert list(slots_of(1 << 1000 | 0b1010)) == [1, 3, 1000]


def test_every_named_policy_is_made() -> None:
    names = ("default", "least_added_delay", "e2", "round_robin")
    made = [make_policy(SchedSettings(placement=name), COST) for name in names]
    assert [type(policy).__name__ for policy in made] == ["LeastAddedDelay", "LeastAddedDelay", "E2", "RoundRobin"]


def test_the_default_has_a_name_of_its_own() -> None:
    assert SchedSettings().placement == "default"
    assert SchedSettings().policy == SchedSettings(placement="least_added_delay").policy == "least_added_delay"
    assert SchedSettings(placement="e2").policy == "e2"


def test_a_tenant_has_no_more_outstanding_than_it_may() -> None:
    scheduler = GlobalScheduler(SchedSettings(), PAGE_SIZE, tenants=TenantSettings(max_outstanding=2))
    scheduler.add_group("0", 50, 1, 0.0)
    for name in "ab":
        scheduler.place(request(name), 0.0)
    before = picture(scheduler)
    with pytest.raises(OverloadedError, match="'default': expected at most 2 requests") as refused:
        scheduler.place(request("c"), 0.0)
    assert refused.value.retry_after_s > 0
    assert picture(scheduler) == before
    scheduler.place(replace(request("d"), tenant="other"), 0.0)
    scheduler.finished("a", 1, 0, 1.0)
    scheduler.place(request("c"), 1.0)
    scheduler.validate()
