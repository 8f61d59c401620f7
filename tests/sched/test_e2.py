"""E2 decides as the paper's text does, and each of its branches fires and stops."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_forest import chain
from oracles.paper_e2 import PaperE2, Sent
from preble_jax.config import SchedSettings
from preble_jax.kv.events import BlocksRemoved, BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler, Placement, PlaceRequest
from preble_jax.sched.cost import NS_PER_S, LinearCostModel

PAGE_SIZE = 4
NUM_PAGES = (8, 12, 9)


class Side:
    """The scheduler and the paper, given the same history."""

    def __init__(self, sched: SchedSettings) -> None:
        self.real = GlobalScheduler(sched, PAGE_SIZE)
        ranks = random.Random(sched.seed)
        cost = LinearCostModel.from_settings(sched)
        self.paper = PaperE2(
            window_s=sched.window_s,
            ttl_s=sched.optimistic_ttl_s,
            imbalance_ratio=sched.imbalance_ratio,
            rebalance_ratio=sched.rebalance_ratio if sched.rebalance else None,
            autoscale_ratio=sched.autoscale_ratio if sched.autoscale else None,
            page_size=PAGE_SIZE,
            prefill_time=cost.prefill_ns,
            decode_time=cost.decode_ns,
            num_pages=NUM_PAGES,
            ranks=[ranks.random() for _ in NUM_PAGES],
        )
        self.now = 0.0
        self.next_seq = [0] * len(NUM_PAGES)
        self.running: list[tuple[str, int, Sequence[bytes], Sent]] = []
        self.num_placed = 0
        self.decisions: Counter[str] = Counter()
        for group, num_pages in enumerate(NUM_PAGES):
            self.real.add_group(str(group), num_pages, 0, self.now)

    def place(self, path: Sequence[int], extra: int, excluded: frozenset[int]) -> None:
        prompt, num_tokens = chain(path), max(1, len(path) * PAGE_SIZE + extra)
        name = str(self.num_placed)
        self.num_placed += 1
        placement = self.real.place(
            PlaceRequest(
                request_id=name, block_hashes=prompt, num_tokens=num_tokens, excluded=frozenset(map(str, excluded))
            ),
            self.now,
        )
        groups = [i for i in range(len(NUM_PAGES)) if i not in excluded]
        expected = self.paper.schedule_request(prompt, num_tokens, groups, self.now)
        assert (int(placement.group), placement.decision, placement.matched_tokens) == expected
        named = [placement.group, *placement.alternatives]
        assert len(named) == len(set(named)) == len(groups) and set(named) == set(map(str, groups))
        self.running.append((name, expected[0], prompt, self.paper.sent[-1]))
        self.decisions[placement.decision] += 1

    def serve(self, index: int, output_tokens: int, queue_s: float | None) -> None:
        """A group runs a request: stores its pages, evicts what is too much, finishes."""
        if not self.running:
            return
        name, group, prompt, sent = self.running.pop(index % len(self.running))
        self._event(group, BlocksStored(prompt, None))
        self.paper.forest.store(prompt, None, group)
        confirmed = self.paper.forest.holds(group, confirmed_only=True)
        excess = len(confirmed) - NUM_PAGES[group]
        if excess > 0:
            gone = tuple([b for b in self.paper.forest.lru(group) if b in confirmed][:excess])
            self._event(group, BlocksRemoved(gone))
            self.paper.forest.remove(gone, group)
        if sent not in self.paper.sent:  # it has left the window, and its prefixes may be others since
            queue_s = None
        self.real.finished(name, output_tokens, 0, self.now, queue_s=queue_s)
        if queue_s is not None:
            self.paper.report_queue(sent, round(queue_s * NS_PER_S), self.now)
        self.paper.finish(group, output_tokens, self.now)

    def _event(self, group: int, event: BlocksStored | BlocksRemoved) -> None:
        self.real.kv_events(str(group), EventBatch(0, self.next_seq[group], (event,)), self.now)
        self.next_seq[group] += 1

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def tick(self) -> None:
        self.real.tick(self.now)
        self.paper.tick(self.now)
        if self.paper.autoscale is not None:
            counters = self.real.policy_stats().counters
            expected = (self.paper.autoscale.num_replicated, self.paper.autoscale.num_retired)
            assert (counters["replicated"], counters["retired"]) == expected


steps = st.lists(
    st.one_of(
        st.tuples(
            st.just("place"),
            st.lists(st.integers(0, 1), max_size=7).map(tuple),
            st.integers(0, PAGE_SIZE - 1),
            st.frozensets(st.integers(0, 2), max_size=2),
        ),
        st.tuples(
            st.just("serve"), st.integers(0, 10), st.integers(0, 100), st.sampled_from([None, 0.0, 0.1, 1.0, 20.0])
        ),
        st.just(("tick",)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 20.0])),
    ),
    min_size=8,
    max_size=40,
)
schedules = st.builds(
    SchedSettings,
    placement=st.just("e2"),
    window_s=st.sampled_from([5.0, 30.0]),
    optimistic_ttl_s=st.sampled_from([2.0, 10.0]),
    imbalance_ratio=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    rebalance=st.booleans(),
    rebalance_ratio=st.sampled_from([1.0, 1.5, 3.0]),
    autoscale=st.booleans(),
    autoscale_ratio=st.sampled_from([1.0, 2.0]),
    prefill_base_s=st.sampled_from([0.0, 0.01]),
    prefill_token_s=st.sampled_from([0.001, 0.0007]),
    decode_token_s=st.sampled_from([0.0, 0.0001, 0.005]),
    group_timeout_s=st.just(1e6),
    seed=st.integers(0, 3),
)


@settings(max_examples=250, deadline=None)
@given(schedules, steps)
def test_same_decisions_as_the_paper(sched: SchedSettings, history: list[tuple]) -> None:
    side = Side(sched)
    for name, *arguments in history:
        getattr(side, name)(*arguments)
        side.real.validate()


@pytest.mark.parametrize("seed", range(6))
def test_same_decisions_as_the_paper_on_long_runs(seed: int) -> None:
    """Long enough for full caches, so that M decides, and for every branch; queues grow in bursts."""
    random_ = random.Random(seed)
    side = Side(
        SchedSettings(
            placement="e2",
            window_s=20.0,
            optimistic_ttl_s=3.0,
            imbalance_ratio=0.5,
            rebalance_ratio=2.0,
            prefill_base_s=0.001,
            prefill_token_s=0.001,
            decode_token_s=0.0003,
            group_timeout_s=1e6,
            seed=seed,
        )
    )
    for i in range(400):
        shared = [random_.choices(range(4), weights=(8, 4, 2, 1))[0]] * random_.choice((2, 3))
        own = [random_.randrange(3) for _ in range(random_.randrange(4))]
        side.place(shared + own, random_.randrange(PAGE_SIZE), frozenset())
        if random_.random() < 0.9:
            side.serve(random_.randrange(10), random_.choice((1, 10, 100)), random_.choice((0.01, 0.3 * (i // 50 % 2))))
        if i % 5 == 0:
            side.tick()
        side.wait(random_.expovariate(2.0))
    assert side.decisions.keys() == {"exploit", "explore", "balance", "rebalance", "replicate"}, side.decisions
    side.wait(30.0)
    side.tick()
    counters = side.real.policy_stats().counters
    assert counters["replicas"] == 0 < counters["retired"]
    side.real.validate()


def scheduler(num_groups: int = 2, num_pages: int = 100, **kwargs) -> GlobalScheduler:
    made = GlobalScheduler(SchedSettings(placement="e2", **kwargs), PAGE_SIZE)
    for group in range(num_groups):
        made.add_group(str(group), num_pages, 0, 0.0)
    return made


def place(made: GlobalScheduler, name: str, path: Sequence[int], now: float = 0.0, **kwargs) -> Placement:
    request = PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=len(path) * PAGE_SIZE + 1, **kwargs)
    return made.place(request, now)


def test_exploits_what_is_cached_for_the_greater_part() -> None:
    made = scheduler(rebalance=False)
    first = place(made, "a", (1,) * 10)
    assert first.decision == "explore" and first.matched_tokens == 0
    most = place(made, "b", (1,) * 6 + (2,) * 4)
    assert (most.decision, most.group, most.matched_tokens) == ("exploit", first.group, 24)
    least = place(made, "c", (1,) * 4 + (3,) * 6)
    assert least.decision == "explore" and least.group != first.group


def test_explores_the_least_loaded_and_names_a_runner_up() -> None:
    made = scheduler(3)
    seen = [place(made, str(i), (i,) * 10) for i in range(6)]
    assert Counter(p.group for p in seen) == {"0": 2, "1": 2, "2": 2}
    for placement in seen:
        assert {placement.group, *placement.alternatives} == {"0", "1", "2"}


def test_history_counts_for_one_window_only() -> None:
    made = scheduler(window_s=10.0, optimistic_ttl_s=1.0, group_timeout_s=1e6)
    loaded = place(made, "a", (1,) * 20, now=0.0).group
    assert {place(made, f"b{i}", (2 + i,) * 2, now=9.0).group for i in range(3)}.isdisjoint({loaded})
    assert place(made, "c", (9,) * 2, now=10.0).group == loaded
    made.tick(30.0)
    assert {row.load_s for row in made.stats().values()} == {0.0}


def test_balance_fires_where_decoding_fills_the_load_and_stops() -> None:
    made = scheduler(num_pages=200, imbalance_ratio=0.8, window_s=100.0, group_timeout_s=1e6)
    talker = place(made, "talks", (1,) * 2).group
    assert place(made, "quiet", (2,) * 2).group != talker
    made.finished("talks", 1_000, 0, 1.0)
    made.finished("quiet", 1, 0, 1.0)
    decisions = []
    for i in range(40):  # prefill work and short answers bring the ratio down again
        placement = place(made, f"n{i}", (4 + i,) * 100, now=3.0)
        assert placement.decision == "explore" or placement.group == talker
        made.finished(f"n{i}", 1, 0, 3.0)
        decisions.append(placement.decision)
    assert decisions[0] == "balance" and decisions[-1] == "explore"


def test_a_full_group_that_would_lose_shared_pages_costs_more() -> None:
    """M decides: equal L and P, but one group would evict what its requests share."""
    made = scheduler(num_pages=20, prefill_base_s=0.0, window_s=100.0)
    one = place(made, "a", (1,) * 18, now=0.0)
    other = place(made, "b", (2,) * 18, now=0.0)
    assert one.group != other.group
    made.kv_events(one.group, EventBatch(0, 0, (BlocksStored(chain((1,) * 18), None),)), 0.0)
    made.kv_events(
        other.group,
        EventBatch(0, 0, (BlocksStored(chain((2,) * 18), None), BlocksRemoved(tuple(reversed(chain((2,) * 18)))))),
        0.0,
    )
    assert place(made, "c", (3,) * 10, now=1.0).group == other.group


@given(st.integers(0, 5), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_same_seed_same_decisions(seed: int, workload: int) -> None:
    def run() -> list[Placement]:
        random_ = random.Random(workload)
        made = scheduler(4, seed=seed)
        return [place(made, str(i), [random_.randrange(2) for _ in range(6)], now=i * 0.1) for i in range(30)]

    assert run() == run()


def test_the_seed_decides_between_equals() -> None:
    assert len({place(scheduler(4, seed=seed), "a", (1,)).group for seed in range(20)}) > 1
