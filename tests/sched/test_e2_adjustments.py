"""E2's adjustments: each fires when its signal crosses the threshold, not before, and stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from oracles.naive_forest import chain
from preble_jax.config import SchedSettings
from preble_jax.errors import ConfigError, InvalidRequestError, NotFoundError
from preble_jax.kv.events import BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler, Placement, PlaceRequest
from preble_jax.sched.cost import LinearCostModel

PAGE_SIZE = 4
HOT = (1,) * 10


def scheduler(num_groups: int = 2, **kwargs) -> GlobalScheduler:
    defaults = {"prefill_base_s": 0.0, "prefill_token_s": 0.01, "decode_token_s": 0.0, "group_timeout_s": 1e9}
    made = GlobalScheduler(SchedSettings(placement="e2", **defaults | kwargs), PAGE_SIZE)
    for group in range(num_groups):
        made.add_group(str(group), 1_000, 0, 0.0)
    return made


def place(made: GlobalScheduler, name: str, path: Sequence[int], now: float = 0.0, **kwargs) -> Placement:
    request = PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1, **kwargs)
    return made.place(request, now)


def load_s(made: GlobalScheduler) -> dict[str, float]:
    return {name: row.load_s for name, row in made.stats().items()}


# --- rebalancing


def fill(made: GlobalScheduler, group: str, name: str, num_pages: int) -> None:
    others = frozenset(made.stats()) - {group}
    place(made, name, [7, *name.encode()[:20], *[8] * num_pages][:num_pages], excluded=others)


def test_rebalancing_fires_on_the_heaviest_and_stops_when_loads_are_alike() -> None:
    made = scheduler(3, rebalance_ratio=1.5, autoscale=False)
    home = place(made, "first", HOT).group
    light, middle = sorted(set(made.stats()) - {home})
    fill(made, home, "much", 200)
    fill(made, middle, "some", 100)
    decisions, groups = [], []
    for i in range(60):
        before = load_s(made)
        placement = place(made, f"r{i}", (*HOT, 50 + i))
        decisions.append(placement.decision)
        groups.append(placement.group)
        if placement.decision == "rebalance":
            assert (placement.group, home) == (min(before, key=before.get), max(before, key=before.get))
            assert before[home] > 1.5 * before[placement.group]
    assert decisions[0] == "rebalance" and groups[0] == light
    assert "exploit" in decisions, "the prefix is on the light group now: what comes after it goes there by itself"
    for i in range(300):
        decisions.append(place(made, f"s{i}", (*HOT, 120, i // 250, i % 250)).decision)
    assert set(decisions[-100:]) == {"exploit"}, "balanced: nothing to redirect"
    assert max(load_s(made).values()) <= 1.6 * min(load_s(made).values())


def test_no_rebalancing_below_the_ratio_off_the_heaviest_or_switched_off() -> None:
    for ratio, heavy, on, decision in [
        (3.0, 20, True, "exploit"),  # 2 s against 1 s
        (1.5, 20, True, "rebalance"),
        (1.5, 20, False, "exploit"),
        (1.5, 5, True, "exploit"),  # the home is not the heaviest
    ]:
        made = scheduler(2, rebalance_ratio=ratio, rebalance=on)
        home = place(made, "first", (1,) * 25).group
        (other,) = set(made.stats()) - {home}
        fill(made, home, "heavy", 10 * heavy)
        fill(made, other, "other", 100)
        placement = place(made, "x", (1,) * 25)
        assert placement.decision == decision, (ratio, heavy, on)
        assert (placement.group == other) == (decision == "rebalance")


def test_history_alone_moves_nothing() -> None:
    """One after the other: no request ever waits for another, however much one group has done."""
    made = scheduler(2)
    home = place(made, "first", HOT).group
    made.finished("first", 10, 0, 0.0)
    for i in range(50):
        placement = place(made, f"r{i}", (*HOT, *[i] * 20))
        if placement.decision == "exploit":
            assert placement.group == home
        made.finished(f"r{i}", 10, 0, 0.0)
        again = place(made, f"again{i}", (*HOT, 9))
        assert again.decision == "exploit"
        made.finished(f"again{i}", 10, 0, 0.0)


def test_next_to_no_load_is_not_out_of_balance() -> None:
    """One request against none is infinitely more; the cost of the request itself says that it is not worth it."""
    made = scheduler(2)
    home = place(made, "first", HOT).group
    again = place(made, "again", HOT)
    assert (again.decision, again.group) == ("exploit", home)


# --- groups that cost differently


def test_a_slow_group_that_has_least_to_do_is_not_the_cheapest() -> None:
    """L grows from group to group, and P makes up for it on the last one only."""
    for num_groups in (6, 40):  # few are looked at one by one, many in order of load
        made = scheduler(num_groups)
        for i in range(num_groups):
            fill(made, str(i), f"{i:03}", 10 + i)
        slow = LinearCostModel(prefill_base_s=0.0, prefill_token_s=1.0, decode_token_s=0.0)
        for i in range(num_groups - 1):
            made._state.set_cost(made._groups.get(str(i)), slow)
        assert place(made, "x", (3,) * 50).group == str(num_groups - 1)


# --- autoscaling


class Hot:
    """A prefix that everybody wants, on one group of several, and its requests' queueing times."""

    def __init__(self, **kwargs) -> None:
        self.made = scheduler(3, window_s=100.0, rebalance=False, optimistic_ttl_s=50.0, **kwargs)
        self.now = 0.0
        self.num = 0
        self.home = self.send(0.0).group
        self.made.kv_events(self.home, EventBatch(0, 0, (BlocksStored(chain(HOT), None),)), 0.0)

    def send(self, queue_s: float | None, *own: int, early: bool = False) -> Placement:
        self.num += 1
        name = f"hot{self.num}"
        own = own or (100 + self.num % 100, self.num // 100)
        placement = place(self.made, name, (*HOT, *own), self.now)
        if early:
            self.made.first_token(name, self.now, queue_s)
        self.made.finished(name, 1, 0, self.now, queue_s=None if early else queue_s)
        self.now += 1.0
        return placement

    def burst(self, num: int, queue_s: float | None, **kwargs) -> Counter[str]:
        groups: Counter[str] = Counter()
        for _ in range(num):
            groups[self.send(queue_s, **kwargs).group] += 1
            self.made.tick(self.now)
        return groups

    @property
    def counters(self) -> dict[str, float]:
        return dict(self.made.policy_stats().counters)


@pytest.mark.parametrize("early", [False, True])
def test_a_replica_is_made_when_queueing_doubles_and_no_second_one_for_the_same_level(early: bool) -> None:
    hot = Hot()
    assert hot.burst(200, 0.6, early=early) == {hot.home: 200}
    assert hot.counters["replicated"] == 0, "0.6 s all along"
    decisions = [hot.send(1.3, early=early).decision for _ in range(10)]
    hot.made.tick(hot.now)
    assert hot.counters["replicated"] == 0 and set(decisions) == {"exploit"}, "the average has not doubled yet"
    groups = hot.burst(100, 1.3, early=early)
    assert hot.counters == {"replicas": 1, "replicated": 1, "retired": 0} and len(groups) == 2
    hot.burst(200, 1.3, early=early)
    assert hot.counters["replicated"] == 1, "as long as before, and not twice as long"
    hot.burst(200, 3.0, early=early)
    assert hot.counters["replicated"] == 2, "doubled again"


def test_queueing_that_does_not_double_makes_no_replica() -> None:
    hot = Hot()
    assert hot.burst(30, 0.7) == {hot.home: 30}, "0.7 s is less than twice the 0.4 s that computing the prefix takes"
    hot = Hot()
    assert hot.burst(300, 0.75)[hot.home] == 300
    assert hot.burst(300, 1.4) == {hot.home: 300}, "less than twice 0.75 s"
    assert hot.counters == {"replicas": 0, "replicated": 0, "retired": 0}


@pytest.mark.parametrize("kwargs", [{"autoscale": False}, {"autoscale_ratio": 20.0}])
def test_no_replica_when_switched_off_or_nobody_tells(kwargs: dict) -> None:
    hot = Hot(**kwargs)
    assert hot.burst(50, 5.0) == {hot.home: 50}
    hot = Hot()
    assert hot.burst(50, None) == {hot.home: 50}


def test_no_replica_where_every_group_has_as_much_to_do() -> None:
    hot = Hot()
    for group in set(hot.made.stats()) - {hot.home}:
        fill(hot.made, group, f"busy{group}", 900)
    assert hot.burst(50, 5.0) == {hot.home: 50} and hot.counters["replicated"] == 0


def replicated(**kwargs) -> tuple[Hot, str]:
    """(a prefix with a replica that is in use and confirmed, the replica's group). 5, 6 and 7 go on from it."""
    hot = Hot(**kwargs)
    for own, num in ((5, 10), (6, 8), (7, 3)):
        for _ in range(num):
            hot.send(2.0, own)
    assert hot.counters["replicated"] == 0, "it is the tick that looks"
    hot.made.tick(hot.now)
    assert hot.counters["replicas"] == 1
    first = hot.send(0.1)
    assert first.decision == "replicate" and first.group != hot.home
    hot.made.kv_events(first.group, EventBatch(0, 0, (BlocksStored(chain(HOT), None),)), hot.now)
    return hot, first.group


def test_a_replica_gets_its_share_of_the_subtree_and_of_what_is_new() -> None:
    hot, replica = replicated()
    assert [hot.send(0.1, own).group for own in (5, 6, 7)] == [hot.home, replica, replica], "10 requests against 8 + 3"
    again = hot.send(0.1, 6)
    assert (again.group, again.decision) == (replica, "exploit"), "it holds the continuation now"
    new = hot.burst(40, 0.1)
    assert set(new) == {hot.home, replica} and min(new.values()) >= 10


def test_replicas_retire_when_the_load_falls() -> None:
    hot, replica = replicated()
    hot.burst(20, 0.1)
    assert hot.counters["retired"] == 0
    hot.now += 95.0  # of 22 requests at the time, fewer than 11 are in the window from now on
    groups = Counter[str]()
    for _ in range(8):
        hot.made.tick(hot.now)
        groups[hot.send(0.1).group] += 1
        hot.now += 10.0
    assert hot.counters == {"replicas": 0, "replicated": 1, "retired": 1}
    assert groups == {hot.home: 8}, "the copy is still there, and avoided"
    hot.made.remove_group(hot.home, hot.now)
    assert hot.send(0.1).group == replica, "better a retired copy than none"
    hot.made.validate()


def test_a_group_that_goes_takes_its_replicas_along() -> None:
    hot, replica = replicated()
    hot.made.remove_group(replica, hot.now)
    assert hot.counters["replicas"] == 0
    assert hot.send(0.1, 6).group == hot.home
    hot, replica = replicated()
    hot.made.add_group(replica, 1_000, 7, hot.now)
    assert hot.counters["replicas"] == 0, "another process: its tree is empty"
    hot.made.drain_group(hot.home)
    assert hot.send(0.1, 5).group != hot.home


def test_first_tokens_and_queueing_times_are_told_once() -> None:
    made = scheduler(1)
    place(made, "a", HOT)
    place(made, "b", HOT)
    group = made._groups.get("0")
    assert (group.queued_tokens, group.decode_blocks, group.num_outstanding) == (41 + 1, 11 + 11, 2)
    made.first_token("a", 1.0, 0.5)
    assert (group.queued_tokens, group.num_outstanding) == (1, 2)
    made.validate()
    with pytest.raises(InvalidRequestError, match="once"):
        made.first_token("a", 1.0, 0.5)
    made.finished("a", 10, 0, 2.0, queue_s=9.0)
    with pytest.raises(NotFoundError):
        made.first_token("a", 2.0, 0.5)
    place(made, "c", HOT, max_tokens=4)
    place(made, "d", HOT, max_tokens=100)
    assert group.decode_blocks == 11 + 12 + 13, "41 tokens and nothing, 4, and the average of 10 expected"
    made.finished("b", 1, 0, 3.0)
    assert (group.queued_tokens, group.num_outstanding) == (2, 2)
    made.validate()


@pytest.mark.parametrize("bad", [{"rebalance_ratio": 0.9}, {"autoscale_ratio": 0.0}, {"rebalance_ratio": float("nan")}])
def test_ratios_below_one_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError):
        SchedSettings(**bad)
