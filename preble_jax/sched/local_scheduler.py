"""A device group's scheduler: who runs in the next step, with how many tokens, on which pages.

    plan = scheduler.schedule(now)      # a StepPlan, or None when nothing can run
    scheduler.started(plan)             # the device has it; the next one may be planned
    outputs = scheduler.settle(plan, tokens, logprobs)

A machine of events: no clock, no thread, no device. Order of business in `schedule`: running sequences that decode get
their slot (preempting the latest arrivals when pages run out), running prompts continue with the step's token budget,
then waiting requests are admitted in the order the queue policy proposes.

Steps run on the device in the order in which they were started, so a plan may build on those in flight: `started`
counts their tokens as computed and caches the pages they fill, as far as the tokens in them are known. Which tokens
were made is known when a plan is settled. Whoever ends then (or is cancelled meanwhile) gives its pages up at once,
although steps in flight may still read them, and write to the private ones: steps that use those pages for somebody
else are started later and run later, and write what they read. No step is planned that would write to a cached page:
what is cached holds known tokens only, and a sequence writes from its first uncomputed token on. Preemption is the one
thing that waits until nothing is in flight.

A request whose next page another running request is about to compute waits for that page instead of computing it again.
Nothing can wait forever: whoever computes runs until it commits, and gives the pages up when it ends or is preempted.
Nor is much lost by it: in a step that has budget to spare, all running prompts are computed to their ends, so whatever
is waited for is there in the next one.

No step takes time in proportion to the queue: at most MAX_PASSED_OVER candidates are looked at in vain, and at most
MAX_REMATCHED are told to the queue as changed. The others' turn comes in the steps that follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq

from preble_jax.errors import InvalidRequestError, InvariantError, OverloadedError
from preble_jax.kv.prefix_cache import PrefixCache
from preble_jax.request import FinishReason, Request, RequestOutput
from preble_jax.sched.deadlines import Deadlines
from preble_jax.sched.limits import StepLimits
from preble_jax.sched.prefix_matches import PrefixMatches
from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.sequence import PlannedRow, Sequence, StepPlan

MAX_PASSED_OVER = 64
MAX_REMATCHED = 64


class LocalScheduler:
    """All requests of one device group. Each ends exactly once, with one output whose `finished` is true."""

    def __init__(self, limits: StepLimits, cache: PrefixCache, queue: QueuePolicy) -> None:
        self.limits = limits
        self.cache = cache
        self.queue = queue
        self.running: list[Sequence] = []  # by order of arrival
        self.waiting_tokens = 0  # that the waiting requests bring, cached ones included
        self._sequences: dict[str, Sequence] = {}
        self._matches = PrefixMatches(cache)
        self._deadlines = Deadlines()
        self._computing: dict[Sequence, int] = {}  # running, and its pages that it is about to commit: so many in all
        self._slots = list(range(2 * limits.max_num_seqs - 1, -1, -1))  # twice: some are ending while others begin
        self._num_arrived = 0
        self._num_in_flight = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0  # of admitted requests, each counted once
        self.num_cached_tokens = 0  # those of them that pages held

    # -- requests come and go ----------------------------------------------------------------------

    def add(self, request: Request, now: float, seed: int = 0) -> None:
        """Queues a request. Raises, with nothing changed, if it can never run or the queue is full."""
        self.limits.check(request)
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"request_id: expected a new one, got {request.request_id!r}, which is still running"
            )
        if len(self.queue) >= self.limits.max_waiting:
            raise OverloadedError(
                f"the queue is full: {len(self.queue)} requests wait, at most {self.limits.max_waiting} may"
            )
        sequence = Sequence(request, self._num_arrived, self.cache.page_size, now, seed, self.limits.max_model_len)
        self._num_arrived += 1
        self._sequences[request.request_id] = sequence
        self._matches.num_pages(sequence)  # hashes the prompt: now rather than in the middle of a step
        self._deadlines.add(sequence)
        self._enqueue(sequence)

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> RequestOutput | None:
        """Ends a request now; its pages are free when this returns. None if it has ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        return self._end(sequence, reason)

    def expire(self, now: float) -> list[RequestOutput]:
        """Ends the requests whose deadline has passed."""
        return [self._end(sequence, "deadline") for sequence in self._deadlines.take_passed(now)]

    @property
    def num_waiting(self) -> int:
        return len(self.queue)

    @property
    def num_unfinished(self) -> int:
        return len(self._sequences)

    def tenant_deficits(self) -> Mapping[str, float]:
        """What the queue policy owes each tenant (negative: is owed), in service units. O(tenants)."""
        return self.queue.deficits()

    # -- one step ----------------------------------------------------------------------------------

    def schedule(self, now: float, max_steps: int = 1) -> StepPlan | None:
        """Plans the next dispatch and takes its pages. max_steps: decode steps that may go into it; while anybody waits
        or a prompt is computed it is one. None: nothing to do before what is in flight has been settled, or at all."""
        planned = self._plan_decode(max_steps if max_steps > 1 and self._all_decode() else 1)
        if planned is None:
            return None
        decode, others = planned
        prefill = self._plan_prefill(others)
        if not decode and not prefill:
            if self._sequences and not self._num_in_flight:
                raise InvariantError(
                    f"{len(self._sequences)} requests unfinished, {len(self.queue)} waiting, none can run"
                )
            return None
        return StepPlan(tuple(decode), tuple(prefill))

    def started(self, plan: StepPlan) -> None:
        """The device has the plan, and its arrays were made. Call it before anything else is asked or told."""
        self._num_in_flight += 1
        page_size = self.cache.page_size
        for sequence, start, num_tokens, num_made in plan.rows:
            sequence.num_computed = num_computed = start + num_tokens
            if num_computed > sequence.num_reached:
                sequence.num_reached = num_computed
            sequence.num_pending += num_made
            held = sequence.pages
            if held is not None and num_computed // page_size > held.num_committed:
                self._commit(sequence, len(sequence.tokens))

    def settle(self, plan: StepPlan, tokens: Seq[Seq[int]], logprobs: Seq[Seq[float]]) -> list[RequestOutput]:
        """Books the results of the oldest plan in flight: what each row of it made, log-probabilities beside it.

        A row makes fewer tokens than planned if one of them ends its request. What rows made whose request had ended
        before, or that make none, is ignored."""
        self._num_in_flight -= 1
        outputs = []
        for (sequence, _, _, num_made), made, row_logprobs in zip(plan.rows, tokens, logprobs, strict=True):
            if num_made and sequence.pages is not None:
                sequence.num_pending -= num_made
                outputs.append(self._append(sequence, made, row_logprobs, num_made))
        return outputs

    # -- planning ----------------------------------------------------------------------------------

    def _all_decode(self) -> bool:
        return not len(self.queue) and all(sequence.num_uncomputed == 1 for sequence in self.running)

    def _plan_decode(self, max_steps: int) -> tuple[list[PlannedRow], list[Sequence]] | None:
        """(rows, running sequences that do not decode). None: pages are short, and who is to give some up cannot be
        said before what is in flight is settled."""
        rows: list[PlannedRow] = []
        others: list[Sequence] = []
        num_preemptions, page_size = self.num_preemptions, self.cache.page_size
        for sequence in tuple(self.running):
            # sequence.can_decode, num_total and PlannedRow(...), written out: this is every token of every request.
            num_total, num_steps = len(sequence.tokens) + sequence.num_pending, 1
            num_computed, held = sequence.num_computed, sequence.pages
            if held is None:
                continue
            if num_total - num_computed != 1 or num_total >= sequence.max_total:
                others.append(sequence)
                continue
            if max_steps > 1:
                num_steps = min(max_steps, sequence.max_total - num_total)
                if not self._extend_to(sequence, num_computed + num_steps):
                    num_steps = 1
            if num_total > len(held.pages) * page_size and not self._extend_to(sequence, num_total):
                if self._num_in_flight:
                    return None
                if not self._make_room(sequence):
                    continue
            rows.append(tuple.__new__(PlannedRow, (sequence, num_computed, num_steps, num_steps)))
        if self.num_preemptions != num_preemptions:
            rows = [row for row in rows if row.sequence.pages is not None]
            others = [sequence for sequence in others if sequence.pages is not None]
        return rows, others

    def _make_room(self, sequence: Sequence) -> bool:
        """A page for the sequence's next token; preempts for it whom the queue policy names. False if it was named.

        No order of naming can stop everybody: a sequence that runs alone always finds room, prompts in computation are
        disturbed only for one that decodes, and tokens that were made are never lost. So tokens go on being made.
        """
        while not self._extend_to(sequence, sequence.num_total):
            victim = self.queue.victim(self.running)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _plan_prefill(self, others: Iterable[Sequence]) -> list[PlannedRow]:
        """others: running sequences that do not decode: prompts in computation, and those that are ending."""
        rows: list[PlannedRow] = []
        budget, num_rows = self.limits.prefill_tokens, self.limits.max_prefill_seqs  # that are left
        num_free = self.limits.max_num_seqs - len(self.running)
        for sequence in others:
            num_total = len(sequence.tokens) + sequence.num_pending
            if num_total >= sequence.max_total:
                num_free += 1
            if num_total - sequence.num_computed > 1 and budget and num_rows:
                rows.append(PlannedRow.chunk(sequence, budget))
                budget -= rows[-1].num_tokens
                num_rows -= 1
        num_free = min(num_free, len(self._slots), num_rows)
        if not budget or num_free <= 0 or not len(self.queue):
            return rows
        for sequence in self._matches.take_stale(MAX_REMATCHED):
            self.queue.rematched(sequence)
        num_passed_over = 0
        for sequence in self.queue.candidates(self._cached_tokens):
            if self._awaits_page(sequence):
                num_passed_over += 1
                if num_passed_over == MAX_PASSED_OVER:
                    break
                continue
            if not self._admit(sequence):
                break  # pages are short: whoever is first waits first
            rows.append(PlannedRow.chunk(sequence, budget))
            budget -= rows[-1].num_tokens
            num_free -= 1
            if not budget or num_free == 0:
                break
        return rows

    def _awaits_page(self, sequence: Sequence) -> bool:
        if not self._computing:
            return False
        hashes = sequence.matchable_hashes()
        matched = self._matches.num_pages(sequence)
        if matched == len(hashes):
            return False
        page = hashes[matched]
        # They are few: whose prompt is not computed whole takes all that a step has left, or one of its rows.
        return any(matched < num and other.hashes()[matched] == page for other, num in self._computing.items())

    def _admit(self, sequence: Sequence) -> bool:
        """Pins what is cached and takes pages for the sequence's other tokens. False, and nothing done, if short."""
        hashes = sequence.hashes()[: self._matches.num_pages(sequence)]
        num_new = self._num_pages(len(sequence.tokens)) - len(hashes)
        reserve = len(self.running)  # a page for each running sequence, lest admission is followed by preemption
        if num_new + self.cache.num_evictable_in(hashes) + reserve > self.cache.num_available:
            return False
        sequence.pages = self.cache.open(hashes)
        if not self._extend_to(sequence, len(sequence.tokens)):
            raise InvariantError(f"admission: {num_new} pages were counted as available and are not")
        sequence.slot = self._slots.pop()
        sequence.num_computed = len(hashes) * self.cache.page_size
        self.queue.admitted(sequence)
        self._dequeue(sequence)
        self._insert_running(sequence)
        if sequence.num_cached is None:  # computing again after a preemption is charged to nobody
            sequence.num_cached = sequence.num_reached = sequence.num_computed
            self.num_prompt_tokens += sequence.num_prompt
            self.num_cached_tokens += sequence.num_cached
            self.queue.served(sequence, extend_tokens=sequence.num_prompt - sequence.num_cached, output_tokens=0)
        num_full = len(sequence.hashes())
        if self.cache.enabled and num_full > len(hashes):
            self._computing[sequence] = num_full
        return True

    def _enqueue(self, sequence: Sequence) -> None:
        self.waiting_tokens += len(sequence.tokens)
        self.queue.add(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        self.waiting_tokens -= len(sequence.tokens)
        self.queue.remove(sequence)
        self._matches.forget(sequence)

    def _insert_running(self, sequence: Sequence) -> None:
        index = len(self.running)
        while index and self.running[index - 1].order > sequence.order:
            index -= 1
        self.running.insert(index, sequence)

    # -- pages -------------------------------------------------------------------------------------

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.page_size)

    def _extend_to(self, sequence: Sequence, num_tokens: int) -> bool:
        assert sequence.pages is not None
        missing = self._num_pages(num_tokens) - len(sequence.pages.pages)
        return missing <= 0 or self.cache.extend(sequence.pages, missing)

    def _cached_tokens(self, sequence: Sequence) -> int:
        return self._matches.num_pages(sequence) * self.cache.page_size

    def _commit(self, sequence: Sequence, num_known: int) -> None:
        """Caches its pages that are full of computed tokens, of the first `num_known` ones."""
        assert sequence.pages is not None
        num_written = sequence.num_computed if sequence.num_computed < num_known else num_known
        num_full = num_written // self.cache.page_size
        if num_full <= sequence.pages.num_committed or not self.cache.enabled:
            return
        self.cache.commit(sequence.pages, sequence.hashes(), num_full)
        if num_full >= self._computing.get(sequence, num_full + 1):
            del self._computing[sequence]

    def _free(self, sequence: Sequence) -> None:
        if sequence.pages is None:
            return
        self._computing.pop(sequence, None)
        self.cache.release(sequence.pages)
        sequence.pages = None
        self._slots.append(sequence.slot)
        sequence.slot = -1
        self.running.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its tokens are kept and computed again, from whatever pages are still cached then.
        Nothing is in flight, lest tokens come for it that nobody knows of when its pages are counted anew."""
        self._free(sequence)
        sequence.num_computed = 0
        self.num_preemptions += 1
        self._enqueue(sequence)

    # -- endings -----------------------------------------------------------------------------------

    def _append(self, sequence: Sequence, made: Seq[int], logprobs: Seq[float], num_planned: int) -> RequestOutput:
        tokens, stop_token_ids = sequence.tokens, sequence.request.stop_token_ids
        reason: FinishReason | None = None
        count = len(made)
        if stop_token_ids:
            for place, token in enumerate(made):
                if token in stop_token_ids:
                    reason, count = "stop", place + 1
                    made, logprobs = made[:count], logprobs[:count]
                    break
        tokens.extend(made)
        num_tokens = len(tokens)
        if reason is None:
            if count != num_planned:
                raise InvariantError(
                    f"request {sequence.request.request_id!r}: {count} tokens made, {num_planned} planned"
                )
            if num_tokens >= sequence.max_total:
                reason = "length"
        self.queue.served(sequence, extend_tokens=0, output_tokens=count)
        assert sequence.pages is not None
        if num_tokens // self.cache.page_size > sequence.pages.num_committed:
            # Of one that ends, the last token may never be computed, and those after it do not count.
            self._commit(sequence, num_tokens - (reason is not None))
        output = self._output(sequence, made, logprobs, reason)
        if reason is not None:
            self._forget(sequence)
        return output

    def _output(
        self, sequence: Sequence, made: Seq[int], logprobs: Seq[float], reason: FinishReason | None
    ) -> RequestOutput:
        request = sequence.request
        return RequestOutput(
            request_id=request.request_id,
            token_ids=list(made),
            logprobs=list(logprobs) if request.sampling.logprobs else [],
            finish_reason=reason,
            cached_tokens=sequence.num_cached or 0,
            queue_s=sequence.queue_s,
        )

    def _end(self, sequence: Sequence, reason: FinishReason) -> RequestOutput:
        self._forget(sequence)
        return RequestOutput(
            request_id=sequence.request.request_id, finish_reason=reason, cached_tokens=sequence.num_cached or 0
        )

    def _forget(self, sequence: Sequence) -> None:
        if sequence.pages is None:
            self._dequeue(sequence)
        self._free(sequence)
        never_computed = sequence.num_prompt - sequence.num_reached
        if sequence.num_cached is not None and never_computed > 0:
            self.queue.served(sequence, extend_tokens=-never_computed, output_tokens=0)
        self.queue.finished(sequence)
        self._deadlines.remove(sequence)
        del self._sequences[sequence.request.request_id]

    def validate(self) -> None:
        """Raises InvariantError if requests, queue, running set and pages do not add up."""
        self.cache.validate()
        self._matches.validate()
        if self.waiting_tokens != sum(len(sequence.tokens) for sequence in self.queue):
            raise InvariantError(
                f"queue: {self.waiting_tokens} tokens counted, "
                f"{sum(len(sequence.tokens) for sequence in self.queue)} found"
            )
        if len(self.queue) + len(self.running) != len(self._sequences):
            raise InvariantError(
                f"requests: {len(self.queue)} waiting + {len(self.running)} running "
                f"!= {len(self._sequences)} unfinished"
            )
        if len(self._slots) + len(self.running) != 2 * self.limits.max_num_seqs:
            raise InvariantError(
                f"slots: {len(self._slots)} free + {len(self.running)} taken != {2 * self.limits.max_num_seqs}"
            )
        pending = sum(sequence.num_pending for sequence in self._sequences.values())
        if pending and not self._num_in_flight:
            raise InvariantError(f"tokens: {pending} are to come from steps in flight, of which there are none")
        for sequence, num_full in self._computing.items():
            if sequence.pages is None or sequence.pages.num_committed >= num_full:
                raise InvariantError("a page is expected from a sequence that does not run, or is cached already")
        held = sum(len(s.pages.pages) - s.pages.num_committed for s in self.running if s.pages is not None)
        free = self.cache.pool.num_free
        if free + self.cache.num_cached + held != self.cache.pool.num_pages:
            raise InvariantError(
                f"pages: free {free} + cached {self.cache.num_cached} + held by running {held} "
                f"!= {self.cache.pool.num_pages}"
            )
