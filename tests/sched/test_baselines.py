"""The default policy decides as its text defines, and those that are there for comparison as their sources describe,
whatever the traffic."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_added_delay import LeastAddedDelay
from oracles.naive_cluster import NaiveCluster
from oracles.naive_forest import chain
from oracles.paper_routers import (
    CacheAware,
    CacheRoute,
    ConsistentHashing,
    DynamoCost,
    LeastLoaded,
    LMetric,
    Router,
)
from oracles.released_preble import ReleasedPreble
from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.errors import ConfigError, PrebleError
from preble_jax.sched import GlobalScheduler, Placement, PlaceRequest
from preble_jax.sched.cost import LinearCostModel
from preble_jax.sched.step_fit import StepTotals

PAGE_SIZE = 4
NUM_PAGES = (9, 14, 10, 12)
MAX_NUM_SEQS = 3
COST = LinearCostModel(prefill_base_s=0.001, prefill_token_s=0.001, decode_token_s=0.0003)


def released(cluster: NaiveCluster, sched: SchedSettings) -> Router:
    return ReleasedPreble(cluster, sched, COST.prefill_ns, COST.decode_ns)


ORACLES: dict[str, Callable[[NaiveCluster, SchedSettings], Router]] = {
    "least_loaded": LeastLoaded,
    "consistent_hashing": ConsistentHashing,
    "cache_aware": CacheAware,
    "dynamo_cost": DynamoCost,
    "lmetric": LMetric,
    "cacheroute": CacheRoute,
    "preble_released": released,
}


@dataclass
class Report:
    num_waiting: int = 0
    num_running: int = 0


class Side:
    """The scheduler and the oracle, given the same history."""

    def __init__(self, sched: SchedSettings, weights: Mapping[str, float] = MappingProxyType({})) -> None:
        self.real = GlobalScheduler(sched, PAGE_SIZE, cost=COST, tenants=TenantSettings(weights=tuple(weights.items())))
        ranks = random.Random(sched.seed)
        self.cluster = NaiveCluster(
            page_size=PAGE_SIZE,
            window_s=sched.window_s,
            ttl_s=sched.optimistic_ttl_s,
            ranks=[ranks.random() for _ in NUM_PAGES],
            num_pages=NUM_PAGES,
            max_num_seqs=MAX_NUM_SEQS,
        )
        if sched.policy == "least_added_delay":
            self.oracle: Router = LeastAddedDelay(self.cluster, sched, weights, self.cost_of)
        else:
            self.oracle = ORACLES[sched.policy](self.cluster, sched)
        self.now = 0.0
        self.running: list[str] = []
        self.started: set[str] = set()
        self.steps = [StepTotals(0, 0, 0, 0.0)] * len(NUM_PAGES)
        self.num_placed = 0
        self.decisions: Counter[str] = Counter()
        for group, num_pages in enumerate(NUM_PAGES):
            self.real.add_group(str(group), num_pages, 0, self.now, max_num_seqs=MAX_NUM_SEQS)

    def cost_of(self, group: int) -> LinearCostModel:
        cost = self.real.cost_of(str(group))
        assert isinstance(cost, LinearCostModel)
        return cost

    def place(
        self, path: Sequence[int], extra: int, max_tokens: int, excluded: frozenset[int], tenant: str = "default"
    ) -> None:
        prompt, num_tokens, name = chain(path), max(1, len(path) * PAGE_SIZE + extra), str(self.num_placed)
        self.num_placed += 1
        request = PlaceRequest(
            request_id=name,
            block_hashes=prompt,
            num_tokens=num_tokens,
            max_tokens=max_tokens,
            tenant=tenant,
            excluded=frozenset(map(str, excluded)),
        )
        self.cluster.ask(name, tenant, max_tokens)
        placement = self.real.place(request, self.now)
        self.cluster.pass_time(self.now)
        groups = [i for i in range(len(NUM_PAGES)) if i not in excluded]
        expected = self.oracle.route(prompt, num_tokens, name, groups)
        assert (int(placement.group), placement.matched_tokens) == (
            expected,
            self.cluster.cached(prompt, num_tokens, expected),
        )
        if isinstance(self.oracle, ReleasedPreble | LeastAddedDelay):
            assert placement.decision == self.oracle.decision
        if isinstance(self.oracle, LeastAddedDelay):
            assert [int(group) for group in placement.alternatives] == self.oracle.order[1:3]
        assert len({placement.group, *placement.alternatives}) == min(3, len(groups))
        self.cluster.send(name, prompt, num_tokens, expected)
        self.running.append(name)
        self.decisions[placement.decision] += 1

    def start(self, index: int) -> None:
        """A first token comes."""
        waiting = [name for name in self.running if name not in self.started]
        if waiting:
            name = waiting[index % len(waiting)]
            self.started.add(name)
            self.real.first_token(name, self.now)
            self.cluster.pass_time(self.now)
            self.cluster.start(name)

    def report(self, group: int, tokens: int, rows: int) -> None:
        """Steps of a group that is not as fast as was thought, from which its costs are fitted anew."""
        before = self.steps[group]
        seconds = 20 * 0.002 + 0.0007 * tokens + (0.0004 + 0.0003 * group) * rows
        self.steps[group] = StepTotals(before[0] + 20, before[1] + tokens, before[2] + rows, before[3] + seconds)
        self.real.load_report(str(group), Report(), self.now, steps=self.steps[group])
        self.cluster.pass_time(self.now)

    def finish(self, index: int, output_tokens: int) -> None:
        if self.running:
            name = self.running.pop(index % len(self.running))
            self.real.finished(name, output_tokens, 0, self.now)
            self.cluster.pass_time(self.now)
            self.cluster.finish(name, output_tokens)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def sched(policy: str, **kwargs) -> SchedSettings:
    """Small numbers, so that every threshold is crossed often."""
    defaults = {
        "placement": policy,
        "window_s": 20.0,
        "optimistic_ttl_s": 6.0,
        "group_timeout_s": 1e6,
        "hash_blocks": 2,
        "hash_points": 5,
        "cache_aware_balance_abs": 3,
        "cacheroute_interval_s": 3.0,
        "cacheroute_key_blocks": 2,
        "cacheroute_q_cap": 0.6,
        "cacheroute_warm_slots": 2,
        "released_min_requests": 5,
    }
    return SchedSettings(**(defaults | kwargs))


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("place"),
            st.lists(st.integers(0, 1), max_size=7).map(tuple),
            st.integers(0, PAGE_SIZE - 1),
            st.sampled_from([0, 5, 50]),
            st.frozensets(st.integers(0, 3), max_size=3),
            st.sampled_from(["default", "default", "other", "third"]),
        ),
        st.tuples(st.just("start"), st.integers(0, 10)),
        st.tuples(st.just("report"), st.integers(0, 3), st.integers(0, 2000), st.integers(0, 4000)),
        st.tuples(st.just("finish"), st.integers(0, 10), st.integers(0, 100)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 12.0])),
    ),
    min_size=8,
    max_size=40,
)
tunings = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 3),
        "hash_epsilon": st.sampled_from([0.25, 1.0]),
        "cache_aware_threshold": st.sampled_from([0.25, 0.5]),
        "cache_aware_balance_abs": st.integers(0, 3),
        "cache_aware_balance_rel": st.sampled_from([1.0, 1.5, 2.0]),
        "dynamo_overlap_credit": st.sampled_from([1.0, 0.5]),
        "dynamo_prefill_scale": st.sampled_from([1.0, 0.5]),
        "dynamo_temperature": st.sampled_from([0.0, 0.5]),
        "cacheroute_q_cap": st.sampled_from([0.3, 1.0]),
        "cacheroute_warm_slots": st.integers(1, 2),
        "released_high_load": st.sampled_from([1.0, 1.5]),
        # binary fractions, so that the scheduler's floats are as exact as fractions
        "delay_others": st.sampled_from([0.25, 0.0, 2.0]),
        "delay_decoding": st.sampled_from([0.25, 0.0, 8.0]),
        "d2lpm_quantum_tokens": st.sampled_from([1, 8192]),
    }
)


# binary fractions, too
some_weights = st.sampled_from([{}, {}, {"other": 2.0, "third": 0.25}, {"default": 4.0}])


@pytest.mark.parametrize("policy", [*ORACLES, "default"])
@settings(max_examples=60, deadline=None)
@given(tuning=tunings, weights=some_weights, history=steps)
def test_same_decisions_as_the_source(
    policy: str, tuning: dict[str, float], weights: dict[str, float], history: list[tuple]
) -> None:
    side = Side(sched(policy, **tuning), weights)
    for name, *arguments in history:
        getattr(side, name)(*arguments)
    side.real.validate()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", [*ORACLES, "least_added_delay"])
def test_same_decisions_as_the_source_on_long_runs(policy: str, seed: int) -> None:
    """Steady traffic with popular beginnings, so that plans, rings and moves have something to work on."""
    random_ = random.Random(seed)
    side = Side(sched(policy, seed=seed, dynamo_temperature=0.3 * (seed % 2)))
    for i in range(250):
        excluded = frozenset({i // 40 % 5}) - {4}
        shared = [random_.choices(range(5), weights=(12, 6, 3, 2, 1))[0]] * random_.choice((2, 3, 5))
        own = [random_.randrange(3) for _ in range(random_.randrange(4))]
        tenant = random_.choices(("default", "other", "third"), weights=(6, 2, 1))[0]
        side.place(shared + own, random_.randrange(PAGE_SIZE), random_.choice((0, 20)), excluded, tenant)
        if i % 2:
            side.start(random_.randrange(10))
        if seed % 2 and i % 5 == 0:
            side.report(random_.randrange(4), random_.randrange(2000), random_.randrange(2000))
        if random_.random() < 0.9:
            side.finish(random_.randrange(10), random_.choice((1, 10, 100)))
        side.wait(random_.expovariate(2.0))
    side.real.validate()
    assert side.decisions.keys() == ({"explore"} if policy == "least_loaded" else {"exploit", "explore"})


# --- each one's point, by example


def scheduler(policy: str, num_groups: int = 4, **kwargs) -> GlobalScheduler:
    made = GlobalScheduler(sched(policy, **kwargs), PAGE_SIZE)
    for group in range(num_groups):
        made.add_group(str(group), 100, 0, 0.0)
    return made


def place(made: GlobalScheduler, name: str, path: Sequence[int], now: float = 0.0, **kwargs) -> Placement:
    request = PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1, **kwargs)
    return made.place(request, now)


def only(group: str, num_groups: int = 4) -> frozenset[str]:
    return frozenset(map(str, range(num_groups))) - {group}


def test_least_loaded_counts_what_has_not_ended() -> None:
    made = scheduler("least_loaded")
    groups = [place(made, str(i), (1,) * 4).group for i in range(4)]
    assert len(set(groups)) == 4
    made.finished("2", 1, 0, 0.0)
    assert place(made, "next", (1,) * 4).group == groups[2]


def test_consistent_hashing_keeps_a_key_home_until_it_is_full() -> None:
    made = scheduler("consistent_hashing", hash_epsilon=1.0)
    home = place(made, "a", (1, 1, 3)).group
    made.finished("a", 1, 0, 0.0)
    # capacity 2 * ceil(requests / 4): the first two requests of a key share its home, the third walks on
    placements = [place(made, str(i), (1, 1, i)) for i in range(3)]
    assert [p.group == home for p in placements] == [True, False, True]
    assert [p.decision for p in placements] == ["exploit", "explore", "exploit"]


def test_consistent_hashing_moves_few_keys_when_a_group_goes() -> None:
    made = scheduler("consistent_hashing", 8, hash_points=64, hash_epsilon=100.0)

    def homes() -> list[str]:
        found = []
        for key in range(200):
            found.append(place(made, "x", (key, 1)).group)
            made.finished("x", 1, 0, 0.0)
        return found

    before = homes()
    made.remove_group("3", 0.0)
    after = homes()
    assert "3" in before and "3" not in after
    assert [a for a, b in zip(after, before, strict=True) if b != "3"] == [b for b in before if b != "3"]


def test_a_slot_that_another_group_takes_over_has_that_groups_places() -> None:
    one, other = scheduler("consistent_hashing", 2), scheduler("consistent_hashing", 1)
    place(one, "a", (1, 1))
    one.finished("a", 1, 0, 0.0)
    one.remove_group("1", 0.0)
    one.tick(100.0)
    for made in (one, other):
        made.add_group("9", 100, 0, 100.0)
    for key in range(30):
        assert place(one, f"k{key}", (key, 1), 100.0).group == place(other, f"k{key}", (key, 1), 100.0).group


def test_cache_aware_gives_affinity_up_when_queues_are_uneven() -> None:
    made = scheduler("cache_aware", cache_aware_balance_abs=3)
    decisions = [place(made, str(i), (1,) * 5 + (i,)) for i in range(6)]
    assert [p.decision for p in decisions] == ["explore", *["exploit"] * 3, "explore", "explore"]
    assert len({p.group for p in decisions[:4]}) == 1 and decisions[4].group != decisions[0].group


def test_cache_aware_ignores_a_short_match() -> None:
    made = scheduler("cache_aware", cache_aware_threshold=0.5)
    first = place(made, "a", (1,) * 10)
    assert place(made, "b", (1,) * 4 + (2,) * 6).group != first.group
    assert place(made, "c", (1,) * 6 + (2,) * 4).group == first.group


def test_cache_aware_needs_more_than_its_threshold() -> None:
    made = scheduler("cache_aware", 2, cache_aware_threshold=0.5)
    holder = place(made, "a", (1,) * 4).group
    half = PlaceRequest(request_id="half", block_hashes=chain((1,) * 4), num_tokens=32)
    assert made.place(half, 0.0).group != holder
    more = PlaceRequest(request_id="more", block_hashes=chain((1,) * 4), num_tokens=31)
    assert made.place(more, 0.0).decision == "exploit"


def test_cache_aware_needs_more_than_the_ratio_of_queues() -> None:
    made = scheduler("cache_aware", 2, cache_aware_balance_abs=1, cache_aware_balance_rel=2.0)
    holder = place(made, "a", (1,) * 4).group
    for i in range(3):
        place(made, f"h{i}", (2,), excluded=only(holder, 2))
    for i in range(2):
        place(made, f"o{i}", (2,), excluded=frozenset(holder))
    assert place(made, "b", (1,) * 4).group == holder, "four requests are not more than twice two"
    assert place(made, "c", (1,) * 4).group != holder, "five are"


def test_dynamo_weighs_prefill_against_decode_pages() -> None:
    """A cached prompt of 10 pages against 10 decode pages already there, and one more that tips it."""
    made = scheduler("dynamo_cost", 2)
    warm = place(made, "a", (1,) * 10)
    made.finished("a", 1, 0, 0.0)
    busy = [place(made, f"b{i}", (1,) * 10) for i in range(2)]
    assert busy[0].group == warm.group and busy[0].decision == "exploit"
    assert busy[1].group != warm.group and busy[1].decision == "explore"


def test_dynamo_temperature_spreads_and_is_seeded() -> None:
    def run(seed: int, temperature: float) -> list[str]:
        made = scheduler("dynamo_cost", seed=seed, dynamo_temperature=temperature)
        return [place(made, str(i), (i % 3,) * 6, now=i * 0.1).group for i in range(40)]

    assert run(1, 2.0) == run(1, 2.0) != run(1, 0.0)


def test_lmetric_leaves_a_busy_holder() -> None:
    made = scheduler("lmetric", 2)
    holder = place(made, "a", (1,) * 10).group
    other = place(made, "b", (2,) * 2).group
    assert holder != other
    # holder: (41 queued + 1 own) * 1 = 42, other: (9 + 41) * 1 = 50
    assert place(made, "c", (1,) * 10).group == holder
    # holder: (42 + 1) * 2 = 86
    assert place(made, "d", (1,) * 10).group == other


def test_cacheroute_plans_from_the_interval_before() -> None:
    made = scheduler("cacheroute", 4, cacheroute_interval_s=10.0, cacheroute_q_cap=1.0, cacheroute_warm_slots=1)

    def interval(at: float) -> tuple[set[str], set[str]]:
        groups: list[set[str]] = [set(), set()]
        for i in range(20):  # two keys: 1.5 and 0.5 requests a second
            key = int(i % 4 == 0)
            placement = place(made, f"{at}-{i}", (key, key, i), now=at + i / 2)
            groups[key].add(placement.group)
            assert placement.decision == ("exploit" if at else "explore")
            made.finished(f"{at}-{i}", 1, 0, at + i / 2)
        return groups[0], groups[1]

    interval(0.0)
    hot, cold = interval(10.0)
    assert len(hot) <= 2 and len(cold) == 1 and not hot & cold
    assert interval(20.0) == (hot, cold), "a key whose rate has not changed stays"


def test_released_uses_a_position_as_a_group() -> None:
    """Groups 1 and 3 hold the prefix, 1 is the cheaper: its position among the two, 0, is taken for its number."""
    made = scheduler("preble_released", released_min_requests=10**6)
    for name, path, group in (("a", (1,) * 10, "1"), ("b", (1,) * 10, "3"), ("c", (2,) * 10, "3")):
        assert place(made, name, path, excluded=only(group)).decision == "explore", "repeating a whole prompt too"
    placement = place(made, "d", (1,) * 10 + (5,))
    assert (placement.decision, placement.group, placement.matched_tokens) == ("exploit", "0", 0)


def test_released_has_no_p_and_explores_where_nothing_is_cached() -> None:
    made = scheduler("preble_released", 2)
    assert place(made, "a", (1,) * 5).group == "0"
    assert place(made, "b", (1,) * 5 + (2,) * 6).group == "1", "half of it is cached on 0, which is the more loaded"


def test_released_moves_prefixes_off_a_heavy_group_and_stops() -> None:
    made = scheduler("preble_released", 2, released_min_requests=6)
    for i in range(5):  # two shared prefixes, both on group 0
        key, length = (1, 8) if i < 3 else (2, 5)
        place(made, str(i), (key,) * length + (i,), excluded=only("0", 2))
    assert place(made, "sixth", (1,) * 8 + (9,)).group == "0"
    # now the second, cheaper one has moved; the first stays, because moving it would only swap the loads
    after = [place(made, f"x{i}", (2,) * 5 + (9, i)) for i in range(3)]
    assert [(p.group, p.decision) for p in after] == [("1", "exploit")] * 3
    assert place(made, "y", (1,) * 8 + (8,)).group == "0"


@pytest.mark.parametrize("doubled", [True, False])
def test_released_replicates_a_groups_only_prefix_when_waiting_doubles(doubled: bool) -> None:
    made = scheduler("preble_released", 2, released_min_requests=1, prefill_base_s=0.0)
    for i in range(3):
        place(made, f"a{i}", (1,) * 8 + (i,), now=0.0, excluded=only("0", 2))
        made.finished(f"a{i}", 50, 0, 0.0)
    for i in range(6):
        placement = place(made, f"b{i}", (1,) * 8 + (3 + i,), now=12.0)
        if not doubled:
            made.finished(f"b{i}", 50, 0, 12.0)
    assert placement.decision == "exploit"
    assert (placement.group == "1") == doubled


@pytest.mark.parametrize("policy", [*ORACLES, "least_added_delay"])
def test_deterministic_for_a_seed(policy: str) -> None:
    def run(seed: int) -> list[Placement]:
        random_ = random.Random(5)
        made = scheduler(policy, seed=seed)
        return [place(made, str(i), [random_.randrange(2) for _ in range(6)], now=i * 0.1) for i in range(80)]

    assert run(3) == run(3)
    seedless = {"consistent_hashing", "preble_released"}  # one hashes, the other takes the first of equals
    assert (len({tuple(p.group for p in run(seed)) for seed in range(6)}) > 1) == (policy not in seedless)


@pytest.mark.parametrize("policy", [*ORACLES, "least_added_delay"])
def test_what_is_refused_changes_no_later_decision(policy: str) -> None:
    def run(refuse: bool) -> list[Placement]:
        random_ = random.Random(7)
        made = scheduler(policy, dynamo_temperature=0.5)
        placements = []
        for i in range(60):
            path, now = [random_.randrange(2) for _ in range(6)], i * 0.1
            if refuse:
                good = PlaceRequest(request_id="bad", block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1)
                for bad in (
                    replace(good, request_id=""),
                    replace(good, request_id=str(i - 1)) if i else replace(good, num_tokens=0),
                    replace(good, num_tokens=10**6),
                    replace(good, excluded=frozenset("0123")),
                    replace(good, block_hashes=chain((7,)) * 2),
                    replace(good, max_tokens=-1),
                ):
                    with pytest.raises(PrebleError):
                        made.place(bad, now)
            placements.append(place(made, str(i), path, now=now))
        return placements

    assert run(True) == run(False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hash_blocks", 0),
        ("hash_epsilon", 0.0),
        ("hash_points", 0),
        ("cache_aware_threshold", 1.5),
        ("cache_aware_balance_abs", -1),
        ("cache_aware_balance_rel", 0.5),
        ("dynamo_overlap_credit", -0.1),
        ("dynamo_prefill_scale", float("nan")),
        ("dynamo_temperature", float("inf")),
        ("cacheroute_interval_s", 0.0),
        ("cacheroute_key_blocks", 0),
        ("cacheroute_q_cap", 0.0),
        ("cacheroute_warm_slots", 0),
        ("released_high_load", 0.9),
        ("delay_others", -0.1),
        ("delay_decoding", float("nan")),
        ("delay_without", "slots,pages"),
        ("released_min_requests", -1),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float | str) -> None:
    with pytest.raises(ConfigError, match=f"sched.{name}: expected"):
        SchedSettings(**{name: value})
