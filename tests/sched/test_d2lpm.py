"""D2LPM decides as its pseudo-code does, charges who computes, and forgets who left."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles.naive_forest import chain
from oracles.paper_d2lpm import PaperD2LPM, Sent
from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.errors import ConfigError
from preble_jax.kv.events import BlocksStored, EventBatch
from preble_jax.sched import GlobalScheduler, Placement, PlaceRequest
from preble_jax.sched.placement.deficits import Deficits

PAGE_SIZE = 4
NUM_GROUPS = 3
TENANTS = TenantSettings(weights=(("gold", 2.0), ("half", 0.5)), output_weight=2.0)


class Side:
    """The scheduler and the pseudo-code, given the same history."""

    def __init__(self, quantum: int, seed: int = 0) -> None:
        sched = SchedSettings(
            placement="d2lpm", d2lpm_quantum_tokens=quantum, seed=seed, window_s=1e5, group_timeout_s=1e6
        )
        self.real = GlobalScheduler(sched, PAGE_SIZE, tenants=TENANTS)
        ranks = random.Random(seed)
        self.paper = PaperD2LPM(
            quantum=quantum,
            extend_weight=TENANTS.extend_weight,
            output_weight=TENANTS.output_weight,
            weight=TENANTS.weight,
            page_size=PAGE_SIZE,
            ttl_s=sched.optimistic_ttl_s,
            ranks=[ranks.random() for _ in range(NUM_GROUPS)],
        )
        self.now = 0.0
        self.generation = 1
        self.running: list[tuple[str, Sent]] = []
        self.decisions: Counter[str] = Counter()
        for group in range(NUM_GROUPS):
            self.real.add_group(str(group), 1_000, 0, self.now)

    def place(self, tenant: str, path: Sequence[int], extra: int, excluded: frozenset[int]) -> None:
        prompt, num_tokens = chain(path), max(1, len(path) * PAGE_SIZE + extra)
        name = f"{self.decisions.total()}"
        request = PlaceRequest(
            request_id=name,
            block_hashes=prompt,
            num_tokens=num_tokens,
            tenant=tenant,
            excluded=frozenset(map(str, excluded)),
        )
        placement = self.real.place(request, self.now)
        groups = [i for i in range(NUM_GROUPS) if i not in excluded]
        expected, sent = self.paper.dispatch(tenant, prompt, num_tokens, groups, self.now)
        assert (int(placement.group), num_tokens - placement.matched_tokens) == (expected, sent.extend)
        self.running.append((name, sent))
        self.decisions[placement.decision] += 1

    def end(self, index: int, output_tokens: int, cached: float, failed: bool) -> None:
        if self.running:
            name, sent = self.running.pop(index % len(self.running))
            cached_tokens = int(cached * (sent.num_tokens - 1))
            self.real.finished(name, output_tokens, cached_tokens, self.now, failed=failed)
            self.paper.finish(sent, output_tokens, cached_tokens, failed)

    def restart(self, group: int) -> None:
        self.generation += 1
        self.real.add_group(str(group), 1_000, self.generation, self.now)
        self.paper.group_up(group)

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def check(self) -> None:
        rows = self.real.policy_stats().tenants
        kept = {tenant: {int(group): q for group, q in row.deficits.items()} for tenant, row in rows.items()}
        assert kept == self.paper.q


histories = st.lists(
    st.one_of(
        st.tuples(
            st.just("place"),
            st.sampled_from(["a", "b", "gold", "half"]),
            st.lists(st.integers(0, 1), max_size=7).map(tuple),
            st.integers(0, PAGE_SIZE - 1),
            st.frozensets(st.integers(0, NUM_GROUPS - 1), max_size=NUM_GROUPS - 1),
        ),
        st.tuples(
            st.just("end"), st.integers(0, 10), st.integers(0, 30), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()
        ),
        st.tuples(st.just("restart"), st.integers(0, NUM_GROUPS - 1)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 50.0])),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([1, 8, 30, 1000]), st.integers(0, 3), histories)
def test_same_decisions_as_the_pseudo_code(quantum: int, seed: int, history: list[tuple]) -> None:
    side = Side(quantum, seed)
    for name, *arguments in history:
        getattr(side, name)(*arguments)
        side.check()
    side.real.validate()


@pytest.mark.parametrize("seed", range(3))
def test_same_decisions_on_long_runs(seed: int) -> None:
    random_ = random.Random(seed)
    side = Side(64, seed)
    for _ in range(500):
        path = [random_.choices(range(3), weights=(6, 2, 1))[0]] * 4 + [random_.randrange(4)]
        side.place(random_.choice(("a", "gold", "half")), path, random_.randrange(PAGE_SIZE), frozenset())
        if random_.random() < 0.95:
            side.end(random_.randrange(9), random_.randrange(20), random_.choice((0.0, 0.8)), random_.random() < 0.1)
        side.check()
    assert side.decisions.keys() == {"exploit", "explore"}, side.decisions


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 50), st.lists(st.integers(0, 5_000), min_size=1, max_size=4))
def test_refill_in_one_step_is_the_loop(quantum: int, debts: list[int]) -> None:
    everybody = (1 << len(debts)) - 1
    deficits = Deficits(float(quantum))
    deficits.refill(everybody)
    for slot, debt in enumerate(debts):
        deficits.add(slot, -float(quantum + debt))
    assert not deficits.available(everybody)
    expected, rounds = [-debt for debt in debts], 0
    while all(q <= 0 for q in expected):
        expected, rounds = [q + quantum for q in expected], rounds + 1
    deficits.refill(everybody)
    assert [deficits[slot] for slot in range(len(debts))] == expected
    assert deficits.num_refills == 1 + rounds
    assert deficits.available(everybody) == sum(1 << slot for slot, q in enumerate(expected) if q > 0)


def scheduler(quantum: int, num_groups: int = 2, **kwargs) -> GlobalScheduler:
    sched = SchedSettings(placement="d2lpm", d2lpm_quantum_tokens=quantum, group_timeout_s=1e6, **kwargs)
    made = GlobalScheduler(sched, PAGE_SIZE, tenants=TENANTS)
    for group in range(num_groups):
        made.add_group(str(group), 100, 1, 0.0)
    return made


def place(made: GlobalScheduler, name: str, path: Sequence[int], tenant: str = "a", now: float = 0.0) -> Placement:
    num_tokens = len(path) * PAGE_SIZE + 1
    return made.place(
        PlaceRequest(request_id=name, block_hashes=chain(path), num_tokens=num_tokens, tenant=tenant), now
    )


def deficit(made: GlobalScheduler, tenant: str, group: str) -> float:
    return made.policy_stats().tenants[tenant].deficits[group]


def test_stays_with_the_prefix_until_its_share_of_the_group_is_used_up() -> None:
    made = scheduler(40)
    path = (1,) * 8
    home = place(made, "first", path).group  # 33 tokens
    stays = [place(made, f"r{i}", path) for i in range(7)]  # one token each: the last token is always computed
    assert {p.group for p in stays} == {home} and {p.decision for p in stays} == {"exploit"}
    leaves = place(made, "leaves", path)
    assert (leaves.decision, leaves.group != home) == ("explore", True)
    row = made.policy_stats().tenants["a"]
    assert row.deficits == {home: 0.0, leaves.group: 7.0} and row.num_refills == 1


def test_weights_are_shares() -> None:
    made = scheduler(40)
    homes = {tenant: place(made, tenant, (9,), tenant).group for tenant in ("gold", "half", "plain")}
    quanta = {tenant: deficit(made, tenant, "0" if home == "1" else "1") for tenant, home in homes.items()}
    assert quanta == {"gold": 80.0, "half": 20.0, "plain": 40.0}


def test_whose_miss_computed_it_pays_for_a_shared_prefix() -> None:
    """b was expected to find what a computes; the group says that b computed it in the end, and a found it."""
    made = scheduler(1000, num_groups=1)
    place(made, "first", (1,) * 10, "a")
    place(made, "second", (1,) * 10, "b")
    assert (deficit(made, "a", "0"), deficit(made, "b", "0")) == (1000 - 41, 1000 - 1)
    made.finished("first", 3, 40, 1.0)
    made.finished("second", 3, 0, 1.0)
    assert (deficit(made, "a", "0"), deficit(made, "b", "0")) == (1000 - 1 - 6, 1000 - 41 - 6)


def test_failing_is_not_free_and_giving_back_saves_nothing_up() -> None:
    made = scheduler(1000, num_groups=1)
    place(made, "failed", (1,) * 10)
    made.finished("failed", 0, 0, 1.0, failed=True)
    assert deficit(made, "a", "0") == 1000 - 41
    place(made, "b", (2,) * 25)
    made.finished("b", 0, 101, 1.0)
    assert deficit(made, "a", "0") == 1000 - 41
    for i in range(50):
        place(made, f"c{i}", (3 + i,) * 20)
    for i in range(50):
        made.finished(f"c{i}", 0, 81, 1.0)
    assert 0 < deficit(made, "a", "0") <= 1000


def test_idle_tenants_are_forgotten_busy_ones_are_not() -> None:
    made = scheduler(100, window_s=10.0)
    place(made, "x", (1,), "idle", now=0.0)
    place(made, "y", (1,), "busy", now=1.0)
    made.finished("x", 1, 0, 2.0)
    made.tick(9.9)
    assert set(made.policy_stats().tenants) == {"idle", "busy"}
    made.tick(11.0)
    assert set(made.policy_stats().tenants) == {"busy"}
    made.finished("y", 1, 0, 12.0)
    made.tick(21.0)
    assert made.policy_stats().tenants == {}
    assert place(made, "z", (1,), "busy", now=22.0)


def test_a_group_that_restarts_or_goes_takes_its_debts_along() -> None:
    made = scheduler(30, num_groups=1)
    place(made, "x", (1,) * 20)
    assert deficit(made, "a", "0") < 0
    made.kv_events("0", EventBatch(2, 0, (BlocksStored(chain((1,)), None),)), 1.0)
    assert deficit(made, "a", "0") == 30
    place(made, "old", (2,))
    made.kv_events("0", EventBatch(3, 0, ()), 1.0)
    made.finished("old", 500, 0, 1.0)
    assert deficit(made, "a", "0") == 30
    made.add_group("1", 100, 1, 1.0)
    made.remove_group("0", 1.0)
    made.finished("x", 500, 0, 2.0)
    assert made.policy_stats().tenants["a"].deficits == {"1": 30}
    assert place(made, "y", (1,)).group == "1"


def test_what_ends_late_is_not_charged_to_the_slots_next_group() -> None:
    made = scheduler(30, num_groups=1, window_s=10.0, optimistic_ttl_s=5.0)
    place(made, "x", (1,))
    made.remove_group("0", 1.0)
    made.tick(20.0)
    made.add_group("new", 100, 1, 20.0)
    made.finished("x", 500, 0, 21.0)
    made.add_group("next", 100, 1, 22.0)
    assert made._groups.get("next").slot == 0
    assert made.policy_stats().tenants["a"].deficits == {"new": 30, "next": 30}


def test_refill_pressure_shows_demand_beyond_the_quantum() -> None:
    made = scheduler(10, num_groups=1)
    for i in range(10):
        place(made, str(i), (i,) * 10)  # 41 tokens each: about 4 quanta
    row = made.policy_stats().tenants["a"]
    assert row.num_placed == 10 and row.refill_pressure == 3.7
    calm = scheduler(10_000, num_groups=1)
    for i in range(10):
        place(calm, str(i), (i,) * 10)
    assert calm.policy_stats().tenants["a"].refill_pressure == 0.1


def test_rounded_sums_never_leave_nobody_available() -> None:
    deficits = Deficits(0.1)
    deficits.refill(1)
    for _ in range(1_000):
        deficits.add(0, -0.3)
        while not deficits.available(1):
            before = deficits.num_refills
            deficits.refill(1)
            assert deficits.num_refills > before


def test_quantum_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="d2lpm_quantum_tokens"):
        SchedSettings(d2lpm_quantum_tokens=0)
