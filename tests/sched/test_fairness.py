"""The bounds of fair, DLPM and VTC on what tenants receive, no starvation, work conservation, and who pays: with the
real scheduler, on arrivals an adversary chooses."""

from __future__ import annotations

from itertools import cycle

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fakes.token_device import TokenDevice, request
from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues import make_queue

VOCAB, PAGE = 7, 4
MAX_PROMPT, MAX_OUTPUT, MAX_SEQS = 30, 6, 3
POLICIES = ["dlpm", "fair", "fcfs", "lpm", "priority_groups", "vtc"]
W_E, W_Q = 1.0, 2.0
U = W_E * MAX_PROMPT + W_Q * MAX_SEQS * MAX_OUTPUT


def make_device(
    policy, *, quantum=16.0, head_start=1.0, weights=(), num_pages=200, prefill_tokens=16, max_prefill_seqs=2
):
    limits = StepLimits(
        vocab_size=VOCAB,
        max_model_len=MAX_PROMPT + MAX_OUTPUT,
        prefill_tokens=prefill_tokens,
        max_prefill_seqs=max_prefill_seqs,
        max_num_seqs=MAX_SEQS,
        max_waiting=10_000,
    )
    queue = make_queue(
        QueueSettings(policy=policy, dlpm_quantum=quantum, head_start=head_start),
        TenantSettings(weights=weights, extend_weight=W_E, output_weight=W_Q),
    )
    return TokenDevice(LocalScheduler(limits, PrefixCache(num_pages, PAGE), queue), VOCAB)


class Arena:
    """Tenants f and g have requests waiting at all times; others come and go. service: by tenant, as charged, from the
    scheduler's own hook, which test_what_is_charged holds against what the device computed."""

    def __init__(self, device):
        self.device = device
        self.number = 0
        self.service = {}
        queue = device.scheduler.queue
        charge = queue.served

        def served(sequence, extend_tokens, output_tokens):
            tenant = sequence.request.tenant
            self.service[tenant] = self.service.get(tenant, 0.0) + W_E * extend_tokens + W_Q * output_tokens
            charge(sequence, extend_tokens, output_tokens)

        queue.served = served

    def arrive(self, tenant, job):
        head, length, max_tokens = job
        prompt = [head] * (length // 2) + [self.number % VOCAB] * (length - length // 2)
        self.device.scheduler.add(request(str(self.number), prompt, max_tokens, tenant), 0.0)
        self.number += 1

    def keep_waiting(self, tenant, jobs):
        waiting = sum(s.request.tenant == tenant for s in self.device.scheduler.queue)
        for _ in range(MAX_SEQS + 1 - waiting):
            self.arrive(tenant, next(jobs))


job = st.tuples(st.integers(0, 2), st.integers(1, MAX_PROMPT), st.integers(1, MAX_OUTPUT))
some_jobs = st.lists(job, min_size=1, max_size=4)
guests = st.lists(st.lists(st.tuples(st.sampled_from("hi"), job), max_size=4), min_size=1, max_size=8)
weight = st.sampled_from([1.0, 2.0])


def services(policy, jobs_f, jobs_g, guests, num_steps=60, **settings):
    """Service of each tenant over its weight after each step, those of f and g having requests waiting throughout."""
    device = make_device(policy, **settings)
    if policy == "fair":
        watch_order(device.scheduler, settings.get("head_start", 1.0))
    arena = Arena(device)
    weights = dict(settings.get("weights", ()))
    backlog = {"f": cycle(jobs_f), "g": cycle(jobs_g)}
    history = []
    for _, coming in zip(range(num_steps), cycle(guests), strict=False):
        for tenant, jobs in backlog.items():
            arena.keep_waiting(tenant, jobs)
        for tenant, job in coming:
            arena.arrive(tenant, job)
        assert device.run_step()
        assert {"f", "g"} <= {s.request.tenant for s in device.scheduler.queue}, "f and g are to be backlogged"
        history.append({t: arena.service.get(t, 0.0) / weights.get(t, 1.0) for t in "fghi"})
    return device, history


def widest(history, f, g):
    """The largest difference of service between f and g over any interval."""
    ahead = [0.0] + [point[f] - point[g] for point in history]
    return max(ahead) - min(ahead)


def furthest_behind(history, backlogged, other):
    """The most that `other` receives more than `backlogged`, over any interval."""
    low, worst = 0.0, 0.0
    for point in history:
        gap = point[other] - point[backlogged]
        worst = max(worst, gap - low)
        low = min(low, gap)
    return worst


def watch_order(scheduler, head_start):
    """From now on, asserts at each admission under the fair queue that nobody who may go is passed by a later arrival
    that came after its head start: head_start times its length more tokens had been charged by then."""
    queue, awaits_page, plan_step = scheduler.queue, scheduler._awaits_page, scheduler.schedule
    add, admitted, served = queue.add, queue.admitted, queue.served
    arrived, awaiting, charged = {}, set(), [0]

    def on_add(sequence):
        arrived.setdefault(sequence.order, charged[0])
        add(sequence)

    def on_served(sequence, extend_tokens, output_tokens):
        charged[0] += max(extend_tokens, 0)
        served(sequence, extend_tokens, output_tokens)

    def on_awaits_page(sequence):
        if awaits_page(sequence):
            awaiting.add(sequence.order)
            return True
        return False

    def on_admitted(sequence):
        deficits = queue.deficits()
        for other in queue:
            if other.order < sequence.order and other.order not in awaiting and deficits[other.request.tenant] > 0:
                assert arrived[sequence.order] < arrived[other.order] + head_start * len(other.tokens)
        admitted(sequence)

    def on_schedule(now):
        awaiting.clear()
        return plan_step(now)

    queue.add, queue.admitted, queue.served = on_add, on_admitted, on_served
    scheduler._awaits_page, scheduler.schedule = on_awaits_page, on_schedule


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(["dlpm", "fair"]),
    some_jobs,
    some_jobs,
    guests,
    st.sampled_from([1.0, 8.0, 64.0]),
    st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    st.tuples(weight, weight, weight),
    st.sampled_from([12, 20, 200]),
    st.sampled_from([4, 16, 64]),
)
def test_dlpm_and_fair_bounds(policy, jobs_f, jobs_g, guests, quantum, head_start, weights, num_pages, prefill_tokens):
    """With 12 or 20 pages there are evictions and preemptions all the time."""
    named = tuple(zip("fgh", weights, strict=True))
    device, history = services(
        policy,
        jobs_f,
        jobs_g,
        guests,
        quantum=quantum,
        head_start=head_start,
        weights=named,
        num_pages=num_pages,
        prefill_tokens=prefill_tokens,
    )
    bound = 2 * (U / min(weights) + quantum)
    assert widest(history, "f", "g") <= bound
    for backlogged in "fg":
        for other in "hi":
            assert furthest_behind(history, backlogged, other) <= bound
    for tenant, deficit in device.scheduler.tenant_deficits().items():
        share = dict(named).get(tenant, 1.0)
        assert -U / share <= deficit / share <= quantum


@settings(max_examples=150, deadline=None)
@given(some_jobs, some_jobs, guests, st.tuples(weight, weight, weight), st.sampled_from([12, 20, 200]))
def test_vtc_bounds(jobs_f, jobs_g, guests, weights, num_pages):
    named = tuple(zip("fgh", weights, strict=True))
    _, history = services("vtc", jobs_f, jobs_g, guests, weights=named, num_pages=num_pages)
    bound = 2 * U / min(weights)
    assert widest(history, "f", "g") <= bound
    for backlogged in "fg":
        for other in "hi":
            assert furthest_behind(history, backlogged, other) <= 2 * bound


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "priority_groups"])
def test_the_others_promise_nothing_of_the_kind(policy):
    """A tenant of long outputs beside one of short prompts: what the bounds above would catch."""
    _, history = services(policy, [(0, 28, 6)], [(1, 1, 1)], [[]], num_steps=400)
    assert widest(history, "f", "g") > 2 * (U + 64)


def test_weights_are_shares():
    for policy in ("dlpm", "fair", "vtc"):
        weights = (("f", 3.0), ("g", 1.0))
        _, history = services(policy, [(0, 8, 2)], [(0, 8, 2)], [[]], num_steps=400, weights=weights)
        received = {tenant: history[-1][tenant] * dict(weights)[tenant] for tenant in "fg"}
        assert received["f"] / received["g"] == pytest.approx(3.0, rel=0.1)


@settings(max_examples=150, deadline=None)
@example("dlpm", [[("f", (0, 5, 1)), ("f", (1, 4, 1)), ("f", (1, 8, 1))]], 1.0, 8)
@given(
    st.sampled_from(POLICIES),
    st.lists(st.lists(st.tuples(st.sampled_from("fghi"), job), max_size=5), min_size=1, max_size=12),
    st.sampled_from([1.0, 64.0]),
    st.sampled_from([8, 64]),
)
def test_no_room_is_left_while_somebody_could_run(policy, arrivals, quantum, prefill_tokens):
    """Pages are plenty. A step with slots and budget to spare leaves only requests behind whose page is computed in
    that very step (or such as must not overtake them), so that all they wait for is there in the next."""
    device = make_device(policy, quantum=quantum, prefill_tokens=prefill_tokens, max_prefill_seqs=4)
    arena, scheduler = Arena(device), device.scheduler
    plan_step = scheduler.schedule
    plans = []
    scheduler.schedule = lambda now: plans.append(plan_step(now)) or plans[-1]
    for coming in [*arrivals, *[[]] * 200]:
        for tenant, job in coming:
            arena.arrive(tenant, job)
        if not scheduler.num_unfinished:
            continue
        before = {s.order for s in scheduler.queue}
        device.run_step()
        plan, limits = plans[-1], scheduler.limits
        num_ran = len({row.sequence.order for row in plan.rows})
        left = {s.order: s for s in scheduler.queue}
        full = (
            num_ran == limits.max_num_seqs
            or len(plan.prefill) == limits.max_prefill_seqs
            or plan.num_prefill_tokens == limits.prefill_tokens
        )
        if left and not full:
            assert set(left) <= before
            waited = [s for s in left.values() if _awaited_in(plan, s)]
            assert waited, "slots, budget and pages to spare, and nobody waited for a page"
            assert not any(scheduler._awaits_page(s) for s in left.values())
    assert not scheduler.num_unfinished


def _awaited_in(plan, sequence):
    """Some row of the plan computes a page of `sequence`'s prompt. Its last token alone is a row that decodes."""
    mine = set(sequence.matchable_hashes())
    return any(mine & set(row.sequence.hashes()[row.start // PAGE :]) for row in plan.rows)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.sampled_from("fgh"), job), min_size=1, max_size=12),
    st.sampled_from([12, 16, 100]),
    st.data(),
)
def test_what_is_charged_is_what_was_computed_once(policy, jobs, num_pages, data):
    """Preemptions charge nothing anew; a request that is cancelled is charged for what it got."""
    device = make_device(policy, num_pages=num_pages)
    arena, scheduler = Arena(device), device.scheduler
    for tenant, job in jobs:
        arena.arrive(tenant, job)
        for _ in range(data.draw(st.integers(0, 2))):
            device.run_step()
        if data.draw(st.booleans()):
            scheduler.cancel(str(data.draw(st.integers(0, arena.number - 1))))
    while device.run_step():
        scheduler.validate()
    for tenant in "fgh":
        received = W_E * device.extend_tokens[tenant] + W_Q * device.output_tokens[tenant]
        assert arena.service.get(tenant, 0.0) == received


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_computed_again_is_charged_to_nobody(policy):
    device = make_device(policy, num_pages=13, quantum=64.0, prefill_tokens=64)
    arena, scheduler = Arena(device), device.scheduler
    for tenant, length in (("f", 18), ("f", 18), ("g", 3)):
        arena.arrive(tenant, (arena.number, length, 6))
    while not scheduler.num_preemptions:
        assert device.run_step()
    scheduler.cache.clear()  # all that the preempted request had computed
    while device.run_step():
        pass
    assert arena.service == {"f": W_E * 36 + W_Q * 12, "g": W_E * 3 + W_Q * 6}


def test_whoever_misses_pays_for_the_prefix():
    """Two tenants ask for one document at the same time: the first computes it, the second pays for its question."""
    device = make_device("dlpm", prefill_tokens=64)
    arena = Arena(device)
    document = [3] * 24
    for number, tenant in enumerate("fg"):
        device.scheduler.add(request(tenant, [*document, number, 1, 1], 1, tenant), 0.0)
    while device.run_step():
        pass
    assert arena.service == {"f": W_E * 27 + W_Q, "g": W_E * 3 + W_Q}


@pytest.mark.parametrize("policy", ["dlpm", "fair", "vtc"])
@pytest.mark.parametrize("ending", ["finishes", "is cancelled"])
def test_tenants_whose_requests_have_ended_are_forgotten(policy, ending):
    device = make_device(policy, prefill_tokens=64)
    scheduler = device.scheduler
    for i in range(300):
        scheduler.add(request(str(i), [i % VOCAB] * 3, 1, f"tenant-{i}"), 0.0)
        if ending == "finishes":
            device.run_step()
        else:
            scheduler.cancel(str(i))
    while device.run_step():
        pass
    assert len(scheduler.tenant_deficits()) < 50


@pytest.mark.parametrize("policy", ["dlpm", "fair", "vtc"])
def test_the_best_served_tenant_is_preempted(policy):
    """The modest tenant's request came last and would be the victim elsewhere."""
    preempted = {}
    for name in (policy, "fcfs"):
        device = make_device(name, num_pages=13, quantum=64.0, prefill_tokens=64)
        scheduler = device.scheduler
        for i in range(2):
            scheduler.add(request(f"greedy-{i}", [i] * 18, 6, "greedy"), 0.0)
        scheduler.add(request("modest", [5] * 3, 6, "modest"), 0.0)
        while not scheduler.num_preemptions:
            assert device.run_step()
        preempted[name] = {s.request.request_id for s in scheduler.queue}
    assert preempted == {policy: {"greedy-1"}, "fcfs": {"modest"}}


@pytest.mark.parametrize("policy", ["dlpm", "fair", "vtc"])
def test_leaving_does_not_clear_a_debt(policy):
    """A tenant gets one long request served and is idle; when it is back, those that waited go first until they have
    received as much."""
    device = make_device(policy, quantum=1.0, prefill_tokens=64)
    scheduler = device.scheduler
    scheduler.add(request("long", [4] * 30, 1, "comes and goes"), 0.0)
    for i in range(12):
        scheduler.add(request(f"rest-{i}", [i % VOCAB, 5, 5], 1, "rest"), 0.0)
    while "long" not in device.ended:
        device.run_step()
    before = len(device.ended)
    for i in range(6):
        scheduler.add(request(f"again-{i}", [i, *[6] * 8], 1, "comes and goes"), 0.0)
    while device.run_step():
        pass
    order = [name.partition("-")[0] for name in device.ended[before:]]
    assert order[:4] == ["rest"] * 4
    assert order.index("again") < 7
