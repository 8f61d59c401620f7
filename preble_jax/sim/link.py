"""What travels between the simulated groups and the global scheduler: KV events, load, snapshots, ends of requests.

As serve.link and serve.scheduler do it: events and load go up at intervals, a snapshot when it is asked for. All of it
arrives `lag_s` later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from preble_jax.errors import NotFoundError
from preble_jax.kv.events import EventBatch, Snapshot
from preble_jax.sched import GlobalScheduler, GroupLost, Instruction
from preble_jax.sched.step_fit import StepTotals
from preble_jax.sim.event_queue import EventQueue
from preble_jax.sim.group import SimGroup


class Load(NamedTuple):
    num_waiting: int
    num_running: int


class SchedulerLink:
    """Of all groups. lag_s: seconds that every message takes."""

    def __init__(self, scheduler: GlobalScheduler, events: EventQueue, lag_s: float) -> None:
        self.scheduler = scheduler
        self.lag_s = lag_s
        self._events = events
        self._groups: dict[str, SimGroup] = {}  # those the scheduler has a link to

    def join(self, group: SimGroup, now: float) -> None:
        """A process says hello; at once."""
        self._groups[group.name] = group
        instructions = self.scheduler.add_group(
            group.name,
            group.cache.pool.num_pages,
            group.cache.events.generation,
            now,
            max_num_seqs=group.limits.max_num_seqs,
        )
        self._carry_out(instructions, now)

    def leave(self, group: SimGroup, now: float) -> None:
        """Its link broke."""
        if self._groups.pop(group.name, None) is not None:
            self.scheduler.remove_group(group.name, now)

    def drain(self, group: SimGroup, now: float) -> None:
        self._send(now, self._drained, group)

    def report(self, group: SimGroup, now: float) -> None:
        """Events since the last report, and the load."""
        group.catch_up(now)
        log = group.cache.events
        batch = log.take()
        load = Load(group.scheduler.num_waiting, len(group.scheduler.running))
        self._send(now, self._hear, group, batch, load, log.generation, log.next_seq, group.ledger.totals)

    def first_token(self, request_id: str, queue_s: float | None, now: float) -> None:
        self._send(now, self._first_token, request_id, queue_s)

    def finished(self, request_id: str, num_output: int, num_cached: int, failed: bool, now: float) -> None:
        self._send(now, self._finished, request_id, num_output, num_cached, failed)

    def tick(self, now: float) -> None:
        self._carry_out(self.scheduler.tick(now), now)

    # -- inside ------------------------------------------------------------------------------------

    def _send(self, now: float, call: Callable[..., None], *args: Any) -> None:
        if self.lag_s:
            self._events.push(now + self.lag_s, call, *args)
        else:
            call(now, *args)

    def _is_linked(self, group: SimGroup, generation: int) -> bool:
        return self._groups.get(group.name) is group and group.cache.events.generation == generation

    def _hear(
        self,
        now: float,
        group: SimGroup,
        batch: EventBatch | None,
        load: Load,
        generation: int,
        next_seq: int,
        totals: StepTotals,
    ) -> None:
        if not self._is_linked(group, generation):
            return  # what a process that is gone had still sent
        if batch is not None:
            self._carry_out(self.scheduler.kv_events(group.name, batch, now), now)
        answer = self.scheduler.load_report(
            group.name, load, now, next_seq=next_seq, generation=generation, steps=totals
        )
        self._carry_out(answer, now)

    def _hear_snapshot(self, now: float, group: SimGroup, snapshot: Snapshot) -> None:
        if self._is_linked(group, snapshot.generation):
            self._carry_out(self.scheduler.kv_snapshot(group.name, snapshot, now), now)

    def _drained(self, now: float, group: SimGroup) -> None:
        if self._groups.get(group.name) is group and group.draining:
            self.scheduler.drain_group(group.name)

    def _first_token(self, now: float, request_id: str, queue_s: float | None) -> None:
        with suppress(NotFoundError):  # forgotten after sched.request_timeout_s
            self.scheduler.first_token(request_id, now, queue_s)

    def _finished(self, now: float, request_id: str, num_output: int, num_cached: int, failed: bool) -> None:
        with suppress(NotFoundError):
            self.scheduler.finished(request_id, num_output, num_cached, now, failed=failed)

    def _carry_out(self, instructions: Iterable[Instruction], now: float) -> None:
        for instruction in instructions:
            group = self._groups.get(instruction.group)
            if group is None:
                continue
            if isinstance(instruction, GroupLost):  # it is told to say hello again
                self.join(group, now)
                if group.draining:
                    self._drained(now, group)
            else:
                self._send(now, self._hear_snapshot, group, group.snapshot(now))
