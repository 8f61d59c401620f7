"""Discrete-event simulation of a cluster. Schedulers, page pools and prefix trees are the production objects; the
devices are a cost model, and time is simulated.

Deterministic: the same settings, cost model and workload give the same records, bit by bit.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.progress import NullProgress, Progress
from preble_jax.sched import GlobalScheduler
from preble_jax.sched.queues import make_queue
from preble_jax.sim.attempt import Attempt
from preble_jax.sim.cost.base import StepCost
from preble_jax.sim.cost.profiled import ProfiledCost
from preble_jax.sim.event_queue import EventQueue
from preble_jax.sim.frontend import Frontend
from preble_jax.sim.group import SimGroup
from preble_jax.sim.host import CrowdedGroup, Host
from preble_jax.sim.limits import SimLimits
from preble_jax.sim.link import SchedulerLink
from preble_jax.sim.page_hashes import check_workload
from preble_jax.sim.record import SimResult
from preble_jax.sim.request import Workload
from preble_jax.sim.settings import Fault, SimSettings
from preble_jax.sim.step_ledger import StepLedger
from preble_jax.sim.stop_rule import StopRule

SAMPLE_S = 1.0
_VOCAB = 256  # tokens are bytes, and all the same


class Simulator:
    """One cluster. After a run, `scheduler`, `groups` and what connects them are as it left them."""

    def __init__(self, settings: SimSettings, cost: StepCost) -> None:
        self.settings = settings
        self.cost = cost
        self._shape = settings.engine(cost.engine)

    def run(self, workload: Workload, *, progress: Progress | None = None, stop: StopRule | None = None) -> SimResult:
        """Simulates until every request has ended, the horizon is reached or the rule says so.

        Raises InvalidRequestError for a workload that cannot be sent.
        """
        check_workload(workload)
        began = time.perf_counter()
        with _collecting_rarely():
            self._build(workload, stop)
            with (progress or NullProgress()).task("simulating", total=len(workload.requests)) as task:
                num_open = self.frontend.num_open
                for left in self._advance():
                    task.advance(num_open - left)
                    num_open = left
        return self._result(time.perf_counter() - began)

    def validate(self) -> None:
        """Raises InvariantError if the state after a run does not add up. O(everything)."""
        self.scheduler.validate()
        for group in self.groups:
            group.validate()

    # -- inside ------------------------------------------------------------------------------------

    def _build(self, workload: Workload, stop: StopRule | None) -> None:
        settings = self.settings
        first_s = min((request.arrival_s for request in workload.requests[:1]), default=0.0)
        self.events = EventQueue(min([first_s, *(fault.at_s for fault in settings.faults)]))
        self.scheduler = GlobalScheduler(settings.seeded_sched, settings.page_size, tenants=settings.tenants)
        self.link = SchedulerLink(self.scheduler, self.events, settings.event_lag_s)
        self._stop = stop
        for fault in settings.faults:
            self.events.push(fault.at_s, self._strike, fault)
        self.frontend = Frontend(
            workload,
            self.link,
            self.events,
            page_size=settings.page_size,
            network_s=settings.network_s,
            stop=stop,
        )
        self._hosts: list[Host] = []
        self.groups = [self._make_group(number) for number in range(settings.num_groups)]
        self.frontend.groups = {group.name: group for group in self.groups}
        now, interval_s = self.events.now, settings.report_interval_s
        for number, group in enumerate(self.groups):
            self.link.join(group, now)
            # Not all at once, as they would not be.
            self.events.push(now + interval_s * (number + 1) / len(self.groups), self._report, group)
        self.events.push(now + interval_s, self._tick)

    def _make_group(self, number: int) -> SimGroup:
        settings, shape = self.settings, self._shape
        num_pages = shape.kv_tokens // settings.page_size
        limits = SimLimits(
            vocab_size=_VOCAB,
            max_model_len=num_pages * settings.page_size,
            prefill_tokens=shape.prefill_tokens,
            max_prefill_seqs=shape.max_prefill_seqs,
            max_num_seqs=shape.max_num_seqs,
            max_waiting=settings.queue.max_waiting,
        )
        name = f"group-{number}"
        return self._group_class(number)(
            name,
            limits,
            lambda generation: PrefixCache(num_pages, settings.page_size, generation=generation),
            partial(make_queue, settings.queue, settings.tenants),
            StepLedger(name, self.cost, decode_steps=settings.decode_steps, max_dispatch_s=settings.max_dispatch_s),
            self.events,
            self.frontend,
            coast=settings.coast,
            sums_exactly=settings.sums_exactly,
        )

    def _group_class(self, number: int) -> Callable[..., SimGroup]:
        """Where groups have no neighbours that cost them anything, the plain one, which is faster."""
        crowding = self.cost.crowding if isinstance(self.cost, ProfiledCost) else None
        if self.settings.groups_per_host == 1 or crowding is None:
            return SimGroup
        if number % self.settings.groups_per_host == 0:
            self._hosts.append(Host(crowding.num_neighbours))
        return partial(CrowdedGroup, self._hosts[-1], crowding.cost)

    def _advance(self) -> Iterator[int]:
        """Requests that have not ended, now and then."""
        events, frontend, horizon_s = self.events, self.frontend, self.settings.horizon_s
        end_s = float("inf") if horizon_s is None else horizon_s
        count = 0
        while frontend.num_open and not frontend.stopped:
            next_s = events.next_s
            if next_s is None or next_s > end_s:
                events.now = max(events.now, end_s) if next_s is not None else events.now
                break
            events.step()
            count += 1
            if not count % 4096:
                yield frontend.num_open
        yield frontend.num_open

    def _report(self, now: float, group: SimGroup) -> None:
        self.events.push(now + self.settings.report_interval_s, self._report, group)
        if group.up:
            self.link.report(group, now)
            if now - group.sampled_s >= SAMPLE_S:
                group.sampled_s = now
                self.frontend.sample(group, now)

    def _tick(self, now: float) -> None:
        self.events.push(now + self.settings.report_interval_s, self._tick)
        self.link.tick(now)
        if self._stop is not None and self._stop.passed(now):
            self.frontend.stopped = True

    def _strike(self, now: float, fault: Fault) -> None:
        group = self.groups[fault.group]
        if fault.kind in ("kill", "restart"):
            lost = self._kill(group, now)
            if fault.kind == "restart":  # at once: who tries again finds the new process
                group.start()
                self.link.join(group, now)
            for attempt, made in lost:
                self.frontend.lost(attempt, made, now)
        elif fault.kind == "drain" and group.up:
            group.draining = True
            self.link.drain(group, now)
        elif fault.kind == "undrain" and group.up and group.draining:
            group.undrain()
            self.link.join(group, now)

    def _kill(self, group: SimGroup, now: float) -> list[tuple[Attempt, int]]:
        """The attempts that were there, with the tokens they had made."""
        if not group.up:
            return []
        lost = group.kill(now)
        self.link.leave(group, now)
        return lost

    def _result(self, wall_s: float) -> SimResult:
        frontend = self.frontend
        for group in self.groups:
            if group.up:
                group.catch_up(self.events.now)
                frontend.sample(group, self.events.now)
        return SimResult(
            requests=frontend.records,
            groups=[group.finish() for group in self.groups],
            served=frontend.served,
            end_s=self.events.now,
            wall_s=wall_s,
            place_s=frontend.place_s,
            stopped=frontend.stopped,
            policy=dict(self.scheduler.policy_stats().counters),
        )


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """Python's cyclic garbage collector would walk all pages and requests again and again, to find next to nothing."""
    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1_000)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
