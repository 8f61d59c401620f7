"""The simulated clients and frontends: requests are sent, placed, tried again, and written down."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import replace

from preble_jax.errors import GroupUnavailableError, OverloadedError, PromptTooLongError
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.messages import PlaceRequest
from preble_jax.sched.sequence import Sequence
from preble_jax.sim.attempt import Attempt
from preble_jax.sim.event_queue import EventQueue
from preble_jax.sim.group import SimGroup
from preble_jax.sim.link import SchedulerLink
from preble_jax.sim.page_hashes import PageHashes
from preble_jax.sim.record import RequestRecord, Status
from preble_jax.sim.request import Workload
from preble_jax.sim.stop_rule import StopRule


class Frontend:
    """groups: by name; to be filled in before time passes. records: one a request of the workload. num_open: requests
    that have not ended. stopped: the rule said so. served, place_s: as in SimResult.
    """

    def __init__(
        self,
        workload: Workload,
        link: SchedulerLink,
        events: EventQueue,
        *,
        page_size: int,
        network_s: float,
        stop: StopRule | None,
    ) -> None:
        self.groups: dict[str, SimGroup] = {}
        self.served: list[tuple[float, str, int, int]] = []
        self.place_s = 0.0
        self.stopped = False
        self._workload = workload
        self._link = link
        self._hashes = PageHashes(workload, page_size)
        self._page_size = page_size
        self._budgets = workload.output_budgets()
        self._events = events
        self._network_s = network_s
        self._stop = stop
        self._followers: defaultdict[int, list[int]] = defaultdict(list)
        self._sampling: dict[int, SamplingParams] = {}
        self.records = [
            RequestRecord(
                index=index,
                tenant=request.tenant,
                num_prompt=request.num_prompt,
                num_output=request.num_output,
                sent_s=request.arrival_s,
            )
            for index, request in enumerate(workload.requests)
        ]
        self.num_open = len(self.records)
        for index, request in enumerate(workload.requests):
            if request.follows is not None:
                self._followers[request.follows].append(index)
        self._push_next(0)

    # -- sending -----------------------------------------------------------------------------------

    def _push_next(self, index: int) -> None:
        """The arrival of the next request that follows no other, from number `index` on."""
        requests = self._workload.requests
        while index < len(requests) and requests[index].follows is not None:
            index += 1
        if index < len(requests):
            self._events.push(requests[index].arrival_s, self._arrive, index)

    def _arrive(self, now: float, index: int) -> None:
        """This one, and all that come at the same time."""
        requests = self._workload.requests
        while index < len(requests) and requests[index].arrival_s <= now:
            if requests[index].follows is None:
                self._send(now, index)
            index += 1
        self._push_next(index)

    def _send(self, now: float, index: int) -> None:
        request, record = self._workload.requests[index], self.records[index]
        record.sent_s = now
        if self._stop is not None:
            self.stopped |= self._stop.sent(record, now)
        hashes = self._hashes.of(index)
        sampling = self._sampling.get(request.num_output)
        if sampling is None:
            sampling = self._sampling[request.num_output] = SamplingParams(
                max_tokens=request.num_output, temperature=0.0, ignore_eos=True
            )
        name = str(index)
        inside = Request(
            request_id=name,
            prompt_token_ids=bytes(request.num_prompt),
            sampling=sampling,
            tenant=request.tenant,
            block_hashes=hashes,
        )
        placed = PlaceRequest(
            request_id=name,
            block_hashes=hashes[: request.num_prompt // self._page_size],
            num_tokens=request.num_prompt,
            max_tokens=self._budgets[request.tenant],
            tenant=request.tenant,
        )
        self._try(Attempt(record, inside, placed), now)

    def _try(self, attempt: Attempt, now: float) -> None:
        record = attempt.record
        began = time.perf_counter()
        try:
            placement = self._link.scheduler.place(attempt.placed, now)
        except (OverloadedError, PromptTooLongError):
            return self._end(record, "rejected", now)
        except GroupUnavailableError:
            return self._end(record, "failed", now)
        finally:
            self.place_s += time.perf_counter() - began
        record.group, record.decision = placement.group, placement.decision
        record.num_placements += 1
        attempt.generation = self.groups[placement.group].generation
        if self._network_s:
            self._events.push(now + self._network_s, self._deliver, attempt)
        else:
            self._deliver(now, attempt)

    def _deliver(self, now: float, attempt: Attempt) -> None:
        try:
            self.groups[attempt.record.group].deliver(attempt, now)
        except GroupUnavailableError:
            self._retry(attempt, now)

    def _retry(self, attempt: Attempt, now: float) -> None:
        """Nothing came of it: to another process, under a new name, because late reports must not mix in. A group is
        excluded for as long as the process that failed the request is the one behind it."""
        record, old = attempt.record, attempt.placed
        self._link.finished(old.request_id, 0, 0, True, now)
        name = f"{record.index}.{record.num_placements}"
        failed = attempt.failed | {(record.group, attempt.generation)}
        excluded = {group for group, generation in failed if self.groups[group].generation == generation}
        placed = replace(old, request_id=name, excluded=frozenset(excluded))
        inside = replace(attempt.request, request_id=name)
        self._try(Attempt(record, inside, placed, failed), now)

    # -- what groups say ---------------------------------------------------------------------------

    def admitted(self, attempt: Attempt, sequence: Sequence, now: float) -> None:
        record = attempt.record
        record.queue_s = now - attempt.delivered_s
        record.cached_tokens = cached = sequence.num_cached or 0
        attempt.served_at = len(self.served)
        self.served.append((now, record.tenant, record.num_prompt - cached, 0))

    def first_token(self, attempt: Attempt, sequence: Sequence, now: float) -> None:
        record = attempt.record
        record.first_token_s = now
        self._link.first_token(attempt.request.request_id, sequence.queue_s, now)
        if self._stop is not None:
            self.stopped |= self._stop.first_token(record, now)

    def ended(self, attempt: Attempt, sequence: Sequence, now: float) -> None:
        record = attempt.record
        made = len(sequence.tokens) - sequence.num_prompt
        record.made_tokens = made
        self.served.append((now, record.tenant, 0, made - attempt.num_served))
        self._link.finished(attempt.request.request_id, made, record.cached_tokens, False, now)
        self._end(record, "finished", now)

    def refused(self, attempt: Attempt, error: OverloadedError | PromptTooLongError, now: float) -> None:
        self._link.finished(attempt.request.request_id, 0, 0, True, now)
        self._end(attempt.record, "rejected", now)

    def lost(self, attempt: Attempt, made: int, now: float) -> None:
        """Its group is gone, after so many tokens. What was computed in vain is nobody's service."""
        record = attempt.record
        if not made:
            if attempt.served_at is not None:
                self.served[attempt.served_at] = (self.served[attempt.served_at][0], record.tenant, 0, 0)
            return self._retry(attempt, now)
        record.made_tokens = made
        self.served.append((now, record.tenant, 0, made - attempt.num_served))
        self._link.finished(attempt.request.request_id, made, record.cached_tokens, False, now)
        self._end(record, "failed", now)

    def sample(self, group: SimGroup, now: float) -> None:
        """Counts the output of requests that have not ended as service so far."""
        made: Counter[str] = Counter()
        for sequence in group.scheduler.running:
            attempt = group.attempts[sequence.request.request_id]
            attempt.record.made_tokens = num_made = len(sequence.tokens) - sequence.num_prompt
            if num_made > attempt.num_served:
                made[attempt.record.tenant] += num_made - attempt.num_served
                attempt.num_served = num_made
        self.served += [(now, tenant, 0, num) for tenant, num in made.items()]

    def _end(self, record: RequestRecord, status: Status, now: float) -> None:
        record.status = status
        record.finished_s = now if status == "finished" else None
        self.num_open -= 1
        if self._stop is not None:
            self.stopped |= self._stop.ended(record, now)
        requests = self._workload.requests
        for follower in self._followers.pop(record.index, ()):
            if status == "finished":
                at_s = max(requests[follower].arrival_s, now + requests[follower].think_s)
                self._events.push(at_s, self._send, follower)
            else:  # the conversation cannot go on
                self.records[follower].sent_s = max(requests[follower].arrival_s, now)
                self._end(self.records[follower], "failed", now)
