"""One simulated device group: the production local scheduler and prefix cache, and the engine's loop over them.

The loop is that of preble_jax.engine: while one dispatch runs, the next one is planned, so that a plan is made when the
dispatch before the one before it has ended. Requests that come during a dispatch are seen at the next planning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from preble_jax.errors import GroupUnavailableError, InvariantError, OverloadedError, PromptTooLongError
from preble_jax.kv.events import Snapshot
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.sequence import Sequence, StepPlan
from preble_jax.sim.attempt import Attempt
from preble_jax.sim.coasting import MIN_STEPS, Coast, CoastingScheduler
from preble_jax.sim.event_queue import EventQueue
from preble_jax.sim.limits import SimLimits
from preble_jax.sim.record import GroupRecord
from preble_jax.sim.step_ledger import StepLedger

_TOKEN = (0,)  # what every step makes: which token it is concerns nobody here


class Listener(Protocol):
    """Who hears of a group's requests: the frontend."""

    def admitted(self, attempt: Attempt, sequence: Sequence, now: float) -> None:
        """Its first prompt chunk is in the step planned now."""

    def first_token(self, attempt: Attempt, sequence: Sequence, now: float) -> None: ...

    def ended(self, attempt: Attempt, sequence: Sequence, now: float) -> None: ...

    def refused(self, attempt: Attempt, error: OverloadedError | PromptTooLongError, now: float) -> None: ...


class _Dispatch(NamedTuple):
    """busy_s: how long it takes the device."""

    plan: StepPlan
    busy_s: float


class SimGroup:
    """generation: number of the process, 1 the first one. up: a process runs. draining: it refuses new requests.

    ledger: what it did, and what it costs. coast, sums_exactly: see coasting.
    """

    def __init__(
        self,
        name: str,
        limits: SimLimits,
        new_cache: Callable[[int], PrefixCache],
        new_queue: Callable[[], QueuePolicy],
        ledger: StepLedger,
        events: EventQueue,
        listener: Listener,
        *,
        coast: bool,
        sums_exactly: bool,
    ) -> None:
        self.name = name
        self.limits = limits
        self.ledger = ledger
        self.sampled_s = events.now
        self._coasts, self._sums_exactly = coast, sums_exactly
        self._new_cache, self._new_queue = new_cache, new_queue
        self._events = events
        self._listener = listener
        self.generation = self._life = self._num_runs = 0
        self.attempts: dict[str, Attempt] = {}
        self.start()

    # -- processes ---------------------------------------------------------------------------------

    def start(self) -> None:
        """A process with nothing cached."""
        self.generation += 1
        self._life += 1
        self._num_runs += 1  # what the process before it had in flight comes to nothing
        self.up, self.draining = True, False
        self.cache = self._new_cache(self.generation)
        self.scheduler = CoastingScheduler(self.limits, self.cache, self._new_queue())
        self.scheduler.sums_exactly = self._sums_exactly
        self.ledger.start()
        self._inbox: list[Attempt] = []
        self._tokenless: dict[str, Sequence] = {}  # admitted, without a token so far
        self._running: _Dispatch | None = None
        self._ends_s = 0.0  # when what runs ends
        self._behind: _Dispatch | None = None
        self._coast: Coast | None = None

    def undrain(self) -> None:
        """Takes requests again. The scheduler takes it for a new process, whose tree it does not know yet."""
        self.draining = False
        self.generation += 1
        self.cache.events.generation = self.generation

    def kill(self, now: float) -> list[tuple[Attempt, int]]:
        """Ends the process. Returns the attempts that were here, with the tokens they had made."""
        self.catch_up(now)
        self.ledger.book(self.scheduler)
        self.up = False
        made = {s.request.request_id: len(s.tokens) - s.num_prompt for s in self.sequences()}
        lost = [(attempt, made.get(name, 0)) for name, attempt in self.attempts.items()]
        self.attempts = {}
        return lost

    def finish(self) -> GroupRecord:
        """The record, as of the last `catch_up`."""
        if self.up:
            self.ledger.book(self.scheduler)
        return self.ledger.record

    def snapshot(self, now: float) -> Snapshot:
        self.catch_up(now)
        return self.cache.events.snapshot(self.cache.tree)

    def sequences(self) -> Iterator[Sequence]:
        yield from self.scheduler.running
        yield from self.scheduler.queue

    # -- requests ----------------------------------------------------------------------------------

    def deliver(self, attempt: Attempt, now: float) -> None:
        """Raises GroupUnavailableError."""
        if not self.up or self.draining:
            raise GroupUnavailableError(f"group {self.name}: gone or draining")
        if self._coast is not None:
            self._end_coast(self._coast, now)
            self._plan(now)
        attempt.delivered_s = now
        self.attempts[attempt.request.request_id] = attempt
        self._inbox.append(attempt)
        if self._running is None and len(self._inbox) == 1:  # it sleeps; what comes at the same time is seen together
            self._events.push(now, self._wake, self._life)

    def _wake(self, now: float, life: int) -> None:
        if life == self._life and self.up:
            self._take_inbox(now)
            self._plan(now)

    def _take_inbox(self, now: float) -> None:
        for attempt in self._inbox:
            try:
                self.scheduler.add(attempt.request, now)
            except (OverloadedError, PromptTooLongError) as error:
                del self.attempts[attempt.request.request_id]
                self._listener.refused(attempt, error, now)
        self._inbox.clear()

    # -- the loop ----------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """One dispatch runs and one waits behind it, as far as there is something to do."""
        while self._behind is None:
            plan = self.scheduler.schedule(now, self.ledger.max_steps())
            if plan is None:
                return
            dispatch = _Dispatch(plan, self.ledger.busy_s(plan, self.cache))
            self._note_admissions(plan, now)
            self.scheduler.started(plan)
            if self._running is None:
                self._run(dispatch, now + dispatch.busy_s)
            else:
                self._behind = dispatch

    def _run(self, dispatch: _Dispatch, ends_s: float) -> None:
        self._running, self._ends_s = dispatch, ends_s
        self._num_runs += 1
        self._events.push(ends_s, self._ended, self._num_runs)

    def _ended(self, now: float, run: int) -> None:
        if run != self._num_runs or self._coast is not None or not self.up:
            return
        done, self._running = self._running, None
        assert done is not None
        if self._behind is not None:
            behind, self._behind = self._behind, None
            self._run(behind, now + behind.busy_s)
        self._settle(done, now)
        self._take_inbox(now)
        if not self._begin_coast():
            self._plan(now)

    # -- coasting ----------------------------------------------------------------------------------

    def _begin_coast(self) -> bool:
        """Where only decoding is ahead, a dispatch is running, and none has been planned behind it."""
        running = self._running
        if not self._coasts or running is None or self._tokenless or self.ledger.max_steps() > 1:
            return False
        num_sure_steps = self.scheduler.num_sure_steps(running.plan)
        if num_sure_steps < MIN_STEPS:
            return False
        ledger = self.ledger
        coast = Coast(
            self.scheduler,
            ledger.cost,
            running.busy_s,
            self._ends_s,
            num_sure_steps=num_sure_steps,
            least_s=ledger.longest_shared_s,
        )
        if not coast.possible:
            return False
        coast.work_out()
        if coast.last < MIN_STEPS:
            return False
        self._coast = coast
        self._events.push(coast.wake_s, self._coast_on, coast)
        return True

    def _coast_on(self, now: float, coast: Coast) -> None:
        if self._coast is not coast or not self.up:
            return
        coast.work_out()
        if coast.wake_s > now:
            self._events.push(coast.wake_s, self._coast_on, coast)
            return
        self._end_coast(coast, now, also_now=True)
        self._plan(now)

    def _end_coast(self, coast: Coast, now: float, *, also_now: bool = False) -> None:
        """The group is left with the dispatch that runs; the one behind it is still to be planned."""
        self._make_up(coast, now, also_now=also_now)
        self._coast = None
        coast.end()
        step = coast.num_done
        if step:
            plan = self.scheduler.schedule(now)
            if plan is None or len(plan.decode) != coast.num_rows or plan.prefill:
                raise InvariantError(f"group {self.name}: expected to coast with {coast.num_rows} rows, got {plan}")
            self.scheduler.started(plan)
            self._run(_Dispatch(plan, coast.busy_s[step]), coast.ends_s[step])

    def catch_up(self, now: float) -> None:
        """Makes up for steps of a coast. To be called before anything of the group is looked at."""
        if self._coast is not None:
            self._make_up(self._coast, now)

    def _make_up(self, coast: Coast, now: float, *, also_now: bool = False) -> None:
        num_before, num_ended = coast.num_done, coast.num_ended(now, also_now=also_now)
        if num_ended and not num_before:
            assert self._running is not None
            self._settle(self._running, now)
        coast.make_up(num_ended, num_ended if also_now else num_ended + 1)  # of one that ends now, nobody knows yet
        for step in range(max(num_before, 1), num_ended):
            self.ledger.count_decode(coast.num_rows, coast.busy_s[step])

    # -- results -----------------------------------------------------------------------------------

    def _settle(self, done: _Dispatch, now: float) -> None:
        self.ledger.count(done.plan, done.busy_s)
        if done.plan.num_steps == 1:
            self.scheduler.settle_step(done.plan)
        else:
            made = [_TOKEN * row.num_made for row in done.plan.rows]
            self.scheduler.settle(done.plan, made, made)
        if self._tokenless:
            self._hear_first_tokens(now)
        if ended := self.scheduler.ended:
            self.scheduler.ended = []
            self.ledger.record.num_requests += len(ended)
            for sequence in ended:
                self._listener.ended(self.attempts.pop(sequence.request.request_id), sequence, now)

    def _hear_first_tokens(self, now: float) -> None:
        for name, sequence in list(self._tokenless.items()):
            if len(sequence.tokens) > sequence.num_prompt:
                del self._tokenless[name]
                self._listener.first_token(self.attempts[name], sequence, now)

    def _note_admissions(self, plan: StepPlan, now: float) -> None:
        for row in plan.prefill:
            sequence = row.sequence
            if sequence.queue_s is None:
                sequence.queue_s = max(0.0, now - sequence.arrival_s)
                name = sequence.request.request_id
                self._tokenless[name] = sequence
                self._listener.admitted(self.attempts[name], sequence, now)

    def validate(self) -> None:
        """Raises InvariantError if what the group holds does not add up."""
        if self.up:
            self.scheduler.validate()
            waiting = {attempt.request.request_id for attempt in self._inbox}
            inside = {sequence.request.request_id for sequence in self.sequences()}
            if self.attempts.keys() != waiting | inside:
                raise InvariantError(
                    f"group {self.name}: {len(self.attempts)} attempts != {len(inside)} in the scheduler + "
                    f"{len(waiting)} that it has not seen"
                )
