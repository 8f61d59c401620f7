"""Many decode steps at a time, where nothing can come between them: the same result as one by one, and several times
faster.

A group *coasts* while all it has is running and decodes. Its next steps are then known, until a request comes, or the
first one ends. So only the steps' times are worked out at once; what they do to sequences, pages and events is made up
for when somebody looks, in the order in which single steps would have done it: step i + 1 is planned, and takes pages,
before step i is settled, and fills any; rows go by arrival.
"""

from __future__ import annotations

from collections import Counter

from preble_jax.errors import InvariantError
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import RequestOutput
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.local_scheduler import LocalScheduler
from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.sequence import Sequence, StepPlan
from preble_jax.sim.cost.base import StepCost, StepWork

FIRST_CHUNK, LAST_CHUNK = 6, 48
"""Steps whose times are worked out at once, more each time; those after an arrival are in vain."""
MIN_STEPS = 4
_TOKEN = (0,)
_NO_OUTPUT = RequestOutput(request_id="")


class CoastingScheduler(LocalScheduler):
    """The production scheduler, which can also be told that many decode steps were planned, run and settled.

    sums_exactly: that tokens are charged one by one or together makes no difference, not even of rounding.
    ended: what has ended since somebody took it out.
    """

    sums_exactly = False

    def __init__(self, limits: StepLimits, cache: PrefixCache, queue: QueuePolicy) -> None:
        super().__init__(limits, cache, queue)
        self.ended: list[Sequence] = []
        self._charges = type(queue).served is not QueuePolicy.served

    def num_sure_steps(self, in_flight: StepPlan) -> int:
        """Decode steps that every running sequence takes after `in_flight`, the only plan that is; 0 when something
        else may be planned among them, or that plan is more than one such step."""
        if len(self.queue) or in_flight.num_steps > 1 or len(in_flight.rows) != len(self.running) or in_flight.prefill:
            return 0
        return min([s.max_total - len(s.tokens) - s.num_pending for s in self.running], default=0)

    def _output(self, *_: object) -> RequestOutput:
        """Nobody asks for it here."""
        return _NO_OUTPUT

    def _forget(self, sequence: Sequence) -> None:
        super()._forget(sequence)
        self.ended.append(sequence)

    def settle_step(self, plan: StepPlan) -> None:
        """`settle` of a single step, all of whose tokens are 0 and end nothing by themselves."""
        self._num_in_flight -= 1
        page_size, charges = self.cache.page_size, self._charges
        for sequence, _, _, num_made in plan.rows:
            held = sequence.pages
            if not num_made or held is None:
                continue
            sequence.num_pending -= 1
            tokens = sequence.tokens
            num_tokens = len(tokens) + 1
            if charges or num_tokens >= sequence.max_total or num_tokens // page_size > held.num_committed:
                self._append(sequence, _TOKEN, (), 1)
            else:
                tokens.append(0)

    def take_page(self, sequence: Sequence) -> None:
        assert sequence.pages is not None
        if not self.cache.extend(sequence.pages, 1):
            raise InvariantError(f"coasting: expected a page for {sequence.request.request_id!r}, got none")

    def fill_page(self, sequence: Sequence, num_known: int) -> None:
        self._commit(sequence, num_known)

    def serve(self, num_steps: int) -> None:
        """Charges so many steps to the tenants."""
        if num_steps <= 0 or not self._charges:
            return
        num_calls, num_tokens = (1, num_steps) if self.sums_exactly else (num_steps, 1)
        for _ in range(num_calls):
            for sequence in self.running:
                self.queue.served(sequence, extend_tokens=0, output_tokens=num_tokens)


class Coast:
    """Steps 0, 1, ... of one group; step 0 was planned as usual, and runs when the coast begins.

    ends_s, busy_s: by step, as far as they are worked out. num_done: steps that were made up for. last: the last step
    that is sure to be as the ones before it. least_s: no step that takes no longer is.
    """

    def __init__(
        self,
        scheduler: CoastingScheduler,
        cost: StepCost,
        busy_s: float,
        end_s: float,
        *,
        num_sure_steps: int,
        least_s: float,
    ) -> None:
        self.ends_s = [end_s]
        self.busy_s = [busy_s]
        self.num_done = 0
        self.last = num_sure_steps
        self._least_s = least_s
        self._chunk = FIRST_CHUNK
        self._scheduler = scheduler
        self._cost = cost
        self._rows = list(scheduler.running)
        self._lengths = [len(sequence.tokens) for sequence in self._rows]  # before step 0 is settled
        self._context = sum(self._lengths)
        size = self._page_size = scheduler.cache.page_size
        # Step i takes a page for a row of length L with room for P tokens when L + i = P + 1, and every `size` steps.
        self._takes = [
            len(sequence.pages.pages) * size - length + 1 if sequence.pages is not None else 0
            for sequence, length in zip(self._rows, self._lengths, strict=True)
        ]
        self._num_taken = 0  # steps that were planned, with their pages taken; step 0 not counted
        self._takers = Counter([take % size for take in self._takes])
        cache = scheduler.cache
        self._used = cache.pool.num_pages - cache.num_available  # pages, by the last step that was worked out

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    @property
    def possible(self) -> bool:
        return max(self._takes) <= self._page_size and min(self.busy_s) > self._least_s

    @property
    def wake_s(self) -> float:
        """When to look again: the step after the one that ends then has been worked out, and is sure."""
        return self.ends_s[-2]

    def work_out(self) -> None:
        """The times of some more steps, or of all that are sure."""
        cache, size, rows = self._scheduler.cache, self._page_size, len(self._rows)
        first = len(self.ends_s)
        stop = min(first + self._chunk, self.last + 1)
        self._chunk = min(2 * self._chunk, LAST_CHUNK)
        for step in range(first, stop):
            used = self._used + self._takers[step % size]
            if used > cache.pool.num_pages:
                self.last = step - 1
                return
            busy_s = self._cost.step_s(StepWork(rows, self._context + step * rows, [], used * size))
            if busy_s <= self._least_s:
                self.last = step - 1
                return
            self._used = used
            self.busy_s.append(busy_s)
            self.ends_s.append(self.ends_s[-1] + busy_s)

    def num_ended(self, now: float, *, also_now: bool) -> int:
        """Steps that have ended before `now`."""
        step, ends_s = self.num_done, self.ends_s
        while step < len(ends_s) and (ends_s[step] < now or (also_now and ends_s[step] == now)):
            step += 1
        return step

    def make_up(self, num_ended: int, num_planned: int) -> None:
        """What steps do, up to the end of step num_ended - 1 and the planning of step num_planned. Step 0 has been
        settled by the scheduler if it has ended."""
        scheduler, size = self._scheduler, self._page_size
        operations: list[tuple[int, int, int]] = []
        for row, (sequence, length) in enumerate(zip(self._rows, self._lengths, strict=True)):
            take = self._takes[row] - 1  # planned before the step before it is settled
            begin = self._num_taken + (take - self._num_taken) % size
            operations += [(step, 0, row) for step in range(begin, num_planned, size)]
            begin = self.num_done + (-length - 1 - self.num_done) % size
            operations += [(step, 1, row) for step in range(begin, num_ended, size)]
            if num_ended:
                sequence.tokens.extend(bytes(length + num_ended - len(sequence.tokens)))
                sequence.num_computed = length + num_ended
        operations.sort()
        for step, fills, row in operations:
            if fills:
                scheduler.fill_page(self._rows[row], self._lengths[row] + step + 1)
            else:
                scheduler.take_page(self._rows[row])
        scheduler.serve(num_ended - max(self.num_done, 1))  # step 0 was, when it was settled
        self._num_taken = num_planned
        self.num_done = num_ended

    def end(self) -> None:
        """Sequences as if the step after those made up for, and all later ones, had not been planned."""
        if self.num_done:
            for sequence, length in zip(self._rows, self._lengths, strict=True):
                sequence.num_computed = length + self.num_done - 1
