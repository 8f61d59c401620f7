"""The global scheduler: which device group takes a request. A machine of events; time is an argument.

The server and the simulator drive this very object. It keeps no history but the window's: requests and outputs that
left it are subtracted from integer sums, so a decision costs the prompt's path in the forest, not the traffic.

`now` is in seconds on any clock that does not run backwards; a time before the latest one counts as the latest one.
Whatever raises leaves the state as it was, apart from time passing.
"""

from __future__ import annotations

import math
import random
from collections import Counter

from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.errors import (
    ConfigError,
    GroupUnavailableError,
    InvalidRequestError,
    InvariantError,
    NotFoundError,
    OverloadedError,
    PromptTooLongError,
)
from preble_jax.kv.events import EventBatch, Snapshot
from preble_jax.sched.assignment import Assignment
from preble_jax.sched.cluster import ClusterState
from preble_jax.sched.cost import CostModel, LinearCostModel
from preble_jax.sched.groups import Group
from preble_jax.sched.messages import (
    GroupLost,
    GroupStats,
    Instruction,
    LoadReport,
    Placement,
    PlaceRequest,
    PolicyStats,
    RequestSnapshot,
    check_request,
)
from preble_jax.sched.placement import PlacementPolicy, Query, make_policy
from preble_jax.sched.placement.base import runners_up
from preble_jax.sched.step_fit import StepFit, StepTotals

NUM_ALTERNATIVES = 2
_MAX_TOKENS = 1 << 31  # of one request's output; more is a broken report


class GlobalScheduler:
    """See the module. cost, policy: None builds what the settings name. tenants: None gives all the same weight."""

    def __init__(
        self,
        settings: SchedSettings,
        page_size: int,
        *,
        tenants: TenantSettings | None = None,
        cost: CostModel | None = None,
        policy: PlacementPolicy | None = None,
    ) -> None:
        if page_size < 1:
            raise ConfigError(f"page_size: expected at least 1 token a page, got {page_size}")
        self.settings = settings
        self.page_size = page_size
        cost = cost or LinearCostModel.from_settings(settings)
        self._refinable = cost if settings.refine_costs and isinstance(cost, LinearCostModel) else None
        self._tenants = tenants or TenantSettings()
        self._tenant_outstanding: Counter[str] = Counter()
        self._policy = policy or make_policy(settings, cost, self._tenants)
        self._state = ClusterState(settings, page_size, cost)
        self._forest = self._state.forest
        self._groups = self._state.groups
        self._outstanding: dict[str, Assignment] = {}
        self._random = random.Random(settings.seed)
        self._now = -math.inf

    # --- groups

    def add_group(
        self, group: str, num_pages: int, generation: int, now: float, *, max_num_seqs: int = 0
    ) -> list[Instruction]:
        """A group came up, came back, or registers again (the same generation goes on draining if it was). Always asks
        for a snapshot: events may have been made, and lost, before the scheduler knew the group. max_num_seqs:
        sequences that it runs at a time; 0: not known.

        Raises InvalidRequestError, also for a generation older than the one that is up.
        """
        now = self._time(now)
        if not group or num_pages < 1 or generation < 0 or max_num_seqs < 0:
            raise InvalidRequestError(
                f"add_group: expected a name, num_pages >= 1, generation >= 0 and max_num_seqs >= 0, got {group!r}, "
                f"{num_pages}, {generation} and {max_num_seqs}"
            )
        known = self._groups.by_name.get(group)
        if known is not None and known.state != "gone" and generation < known.cursor.generation:
            raise InvalidRequestError(
                f"add_group: expected generation >= {known.cursor.generation} of group {group!r}, got {generation}; "
                f"an older process of the group still runs, stop it"
            )
        self._now = now
        if known is None:
            known = self._state.add_group(group, self._random.random(), num_pages, generation)
            self._policy.group_added(known.slot)
        else:
            if known.state == "gone" or generation != known.cursor.generation:
                self._state.restart_group(known, generation)
                self._groups.set_state(known, "up")
                self._policy.group_added(known.slot)
            self._groups.resize(known, num_pages)
        known.max_num_seqs = max_num_seqs
        known.heard_at = now
        known.cursor.ask(now, 0.0)
        return [RequestSnapshot(group)]

    def remove_group(self, group: str, now: float) -> None:
        """Its prefixes are forgotten; its requests stay outstanding until `finished`. Raises NotFoundError."""
        now = self._time(now)
        gone = self._groups.get(group)
        self._now = now
        self._remove(gone)

    def drain_group(self, group: str) -> None:
        """No new requests until it is added again. Raises NotFoundError."""
        self._groups.set_state(self._groups.get(group), "draining")

    # --- requests

    def place(self, request: PlaceRequest, now: float) -> Placement:
        """Chooses a group and records the assignment, optimistically the prompt's pages too.

        Raises InvalidRequestError (bad numbers, hashes that are no chain, an id that is still outstanding),
        PromptTooLongError (more pages than any of these groups has), GroupUnavailableError (none is up and allowed) and
        OverloadedError (the tenant has as many outstanding as it may).
        """
        now = self._time(now)
        check_request(request, self.page_size)
        if request.request_id in self._outstanding:
            raise InvalidRequestError(
                f"request {request.request_id!r}: expected a new id, got one that is outstanding; report it "
                "finished(failed=True) before a retry"
            )
        self._check_tenant(request.tenant)
        eligible = self._eligible(request)
        self._now = now
        self._state.expire(now)
        found = self._forest.find(request.block_hashes)
        # The last token is always computed, for its logits: a page that contains it saves nothing.
        limit = (request.num_tokens - 1) // self.page_size
        levels = [(mask, n * self.page_size) for mask, n in self._forest.holders(found, limit, eligible)]
        query = Query(request, levels, eligible, self.page_size, now)
        slots, decision = self._policy.choose(query, self._state)
        slot = slots[0]
        matched = next((tokens for mask, tokens in levels if mask >> slot & 1), 0)
        group = self._groups.at(slot)
        self._outstanding[request.request_id] = self._state.assign(query, found, group, matched, now)
        self._tenant_outstanding[request.tenant] += 1
        group.decisions[decision] += 1
        group.totals["matched_tokens"] += matched
        return Placement(
            group=group.name,
            alternatives=tuple(self._groups.at(other).name for other in runners_up(slots, query, NUM_ALTERNATIVES)),
            decision=decision,
            matched_tokens=matched,
        )

    def first_token(self, request_id: str, now: float, queue_s: float | None = None) -> None:
        """The group produced the request's first token. queue_s: seconds it had waited in the group's own queue before
        its first prompt chunk was computed; None: not known.

        Raises NotFoundError (unknown, or ended) and InvalidRequestError (impossible number, told before).
        """
        now = self._time(now)
        assignment = self._get_outstanding(request_id)
        _check_queue_s(request_id, queue_s)
        if not assignment.queued_tokens:
            raise InvalidRequestError(
                f"request {request_id!r}: expected its first token once, got it again; report it once a request"
            )
        self._now = now
        self._state.started(assignment)
        self._note_queue(assignment, queue_s, now)

    def finished(
        self,
        request_id: str,
        output_tokens: int,
        cached_tokens: int,
        now: float,
        failed: bool = False,
        queue_s: float | None = None,
    ) -> None:
        """The request ended, on the group it was placed on. cached_tokens: what the group says it did not compute.
        queue_s: as of `first_token`, for who does not call that.

        A failed or cancelled request ends here too; a retry is a new `place` (same id, `excluded` extended) after it.
        Raises NotFoundError (unknown, or finished before) and InvalidRequestError (impossible counts).
        """
        now = self._time(now)
        assignment = self._get_outstanding(request_id)
        _check_queue_s(request_id, queue_s)
        if not 0 <= output_tokens < _MAX_TOKENS or not 0 <= cached_tokens <= assignment.num_tokens:
            raise InvalidRequestError(
                f"request {request_id!r}: expected output_tokens in 0..{_MAX_TOKENS - 1} and "
                f"cached_tokens in 0..{assignment.num_tokens}, "
                f"got {output_tokens} and {cached_tokens}"
            )
        self._now = now
        self._drop(request_id)
        self._state.ended(assignment)
        self._note_queue(assignment, queue_s, now)
        self._policy.finished(assignment, output_tokens, cached_tokens, failed, now)
        group = assignment.group
        if failed:
            group.totals["failed"] += 1
            return
        group.totals["prompt_tokens"] += assignment.num_tokens
        group.totals["cached_tokens"] += cached_tokens
        group.totals["output_tokens"] += output_tokens
        self._state.answer(group, output_tokens, now)

    # --- what groups say

    def kv_events(self, group: str, batch: EventBatch, now: float) -> list[Instruction]:
        """Applies the events that are new. A hole in the numbers applies nothing and asks for a snapshot (at most one
        every `snapshot_retry_s`); a batch of an older generation is dropped; a newer one restarts the group.

        Raises NotFoundError, InvalidRequestError (negative numbers).
        """
        now = self._time(now)
        target = self._groups.get(group)
        if batch.generation < 0 or batch.first_seq < 0:
            raise InvalidRequestError(
                f"kv_events of {group!r}: expected numbers >= 0, got generation {batch.generation} and first_seq "
                f"{batch.first_seq}"
            )
        self._heard(target, now)
        generation = target.cursor.generation
        self._state.apply_events(target, batch)
        if target.cursor.generation != generation:
            self._policy.group_added(target.slot)
        return self._ask_if_behind(target)

    def kv_snapshot(self, group: str, snapshot: Snapshot, now: float) -> list[Instruction]:
        """Replaces what the group holds. Dropped when older than what was applied. May ask for another one, when events
        are known to exist that this one does not cover. Raises as `kv_events`."""
        now = self._time(now)
        target = self._groups.get(group)
        if snapshot.generation < 0 or snapshot.next_seq < 0:
            raise InvalidRequestError(
                f"kv_snapshot of {group!r}: expected numbers >= 0, got generation {snapshot.generation} and next_seq "
                f"{snapshot.next_seq}"
            )
        self._heard(target, now)
        generation = target.cursor.generation
        self._state.apply_snapshot(target, snapshot)
        if target.cursor.generation != generation:
            self._policy.group_added(target.slot)
        return self._ask_if_behind(target)

    def load_report(
        self,
        group: str,
        report: LoadReport,
        now: float,
        *,
        next_seq: int | None = None,
        generation: int | None = None,
        steps: StepTotals | None = None,
    ) -> list[Instruction]:
        """Queue lengths, and a sign of life. next_seq, generation: the number the group's next KV event will have; sent
        with the report they reveal events that were lost with nothing after them. steps: totals of the group's steps,
        which refine what work costs there. Raises NotFoundError, InvalidRequestError (a number no group can mean)."""
        now = self._time(now)
        target = self._groups.get(group)
        numbers = (report.num_waiting, report.num_running, next_seq or 0, generation or 0, *(steps or ()))
        if not all(map(math.isfinite, numbers)) or min(numbers) < 0:
            raise InvalidRequestError(f"load_report of {group!r}: expected finite numbers >= 0, got {numbers}")
        self._heard(target, now)
        target.num_waiting = report.num_waiting
        target.num_running = report.num_running
        if steps is not None and self._refinable is not None:
            target.fit = target.fit or StepFit(self._refinable)
            refined = target.fit.observe(steps)
            if refined is not None:
                self._state.set_cost(target, refined)
        if next_seq is not None and generation in (None, target.cursor.generation):
            target.cursor.exists(next_seq)
        return self._ask_if_behind(target)

    def tick(self, now: float) -> list[Instruction]:
        """Time passes: the window moves, optimistic entries and lost requests expire, silent groups are removed,
        overdue snapshots are asked for again. Call it a few times a second.
        """
        self._now = now = self._time(now)
        self._state.expire(now)
        self._forget_lost_requests(now)
        self._policy.tick(self._state, now)
        instructions: list[Instruction] = []
        for group in list(self._groups.by_name.values()):
            if group.state == "gone":
                continue
            if now - group.heard_at > self.settings.group_timeout_s:
                self._remove(group)
                instructions.append(GroupLost(group.name))
            else:
                instructions += self._ask_if_behind(group)
        return instructions

    # --- questions

    def stats(self) -> dict[str, GroupStats]:
        """One row per group that was not removed."""
        return {
            name: group.stats(self._forest.num_held[group.slot])
            for name, group in self._groups.by_name.items()
            if group.state != "gone"
        }

    def policy_stats(self) -> PolicyStats:
        """What the placement policy tells of itself."""
        return self._policy.stats(self._state)

    def cost_of(self, group: str) -> CostModel:
        """What work is believed to cost there now. Raises NotFoundError."""
        return self._groups.get(group).cost

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def num_blocks(self) -> int:
        """Pages the forest knows, each once."""
        return len(self._forest)

    def blocks(self, group: str, *, confirmed_only: bool = False) -> set[bytes]:
        """Hashes of the pages the group is believed to hold. O(pages), for debugging. Raises NotFoundError."""
        return self._forest.blocks(self._groups.get(group).slot, confirmed_only=confirmed_only)

    def validate(self) -> None:
        """Raises InvariantError if the books do not add up. O(everything)."""
        self._state.validate()
        tenants = Counter(assignment.tenant for assignment in self._outstanding.values())
        if tenants != self._tenant_outstanding:
            raise InvariantError(f"outstanding requests by tenant: kept {self._tenant_outstanding} != found {tenants}")
        if self._state.num_outstanding != len(self._outstanding):
            raise InvariantError(
                f"outstanding requests: kept {self._state.num_outstanding} != found {len(self._outstanding)}"
            )
        waiting = [a.queued_tokens for a in self._outstanding.values() if a.queued_tokens]
        if (self._state.num_queued, self._state.queued_tokens) != (len(waiting), sum(waiting)):
            raise InvariantError(
                f"queued requests and their tokens: kept {self._state.num_queued} and {self._state.queued_tokens} != "
                f"found {len(waiting)} and {sum(waiting)}"
            )
        for group in self._groups.by_name.values():
            mine = [a for a in self._outstanding.values() if a.group is group]
            kept = (group.num_outstanding, group.queued_tokens, group.decode_blocks, group.own_blocks)
            found = (
                len(mine),
                sum(a.queued_tokens for a in mine),
                sum(a.num_blocks for a in mine),
                sum(a.own_blocks for a in mine),
            )
            if kept != found:
                raise InvariantError(
                    f"group {group.name!r}: outstanding requests, their queued tokens, blocks and own blocks kept "
                    f"{kept} != found {found}"
                )
            queued: Counter[str] = Counter()
            for assignment in mine:
                queued[assignment.tenant] += assignment.queued_tokens
            if group.queued_by_tenant != +queued:
                raise InvariantError(
                    f"group {group.name!r}: queued tokens by tenant kept {group.queued_by_tenant} != found {queued}"
                )

    # --- inside

    def _time(self, now: float) -> float:
        if not math.isfinite(now):
            raise InvalidRequestError(f"now: expected finite seconds, got {now}")
        return max(now, self._now)

    def _eligible(self, request: PlaceRequest) -> int:
        """Mask of the groups that may take the request; never 0."""
        allowed = self._groups.allowed(request.excluded)
        if not allowed:
            raise GroupUnavailableError(
                f"request {request.request_id!r}: expected a group that is up and not excluded, got none of "
                f"{len(self._groups.by_name)} ({len(request.excluded)} excluded); wait for one to come back"
            )
        num_pages = -(-request.num_tokens // self.page_size)
        eligible = self._groups.large_enough(allowed, num_pages)
        if not eligible:
            raise PromptTooLongError(
                f"request {request.request_id!r}: expected a prompt that fits into a group, got {num_pages} pages of "
                f"{self.page_size} tokens, more than any group has; shorten it"
            )
        return eligible

    def _check_tenant(self, tenant: str) -> None:
        limit, outstanding = self._tenants.max_outstanding, self._tenant_outstanding[tenant]
        if limit and outstanding >= limit:
            raise OverloadedError(
                f"tenant {tenant!r}: expected at most {limit} requests at a time (tenants.max_outstanding), got one "
                "more; wait for one of them to end"
            )

    def _drop(self, request_id: str) -> Assignment:
        """The request is outstanding no more."""
        assignment = self._outstanding.pop(request_id)
        self._tenant_outstanding[assignment.tenant] -= 1
        if not self._tenant_outstanding[assignment.tenant]:
            del self._tenant_outstanding[assignment.tenant]
        return assignment

    def _get_outstanding(self, request_id: str) -> Assignment:
        assignment = self._outstanding.get(request_id)
        if assignment is None:
            raise NotFoundError(
                f"request {request_id!r}: expected one that is outstanding, got one never placed, or ended before; "
                "report each placement finished once"
            )
        return assignment

    def _note_queue(self, assignment: Assignment, queue_s: float | None, now: float) -> None:
        """Once a request; what came first counts."""
        if queue_s is not None and not assignment.queue_known:
            assignment.queue_known = True
            self._policy.queued(assignment, queue_s, self._state, now)

    def _forget_lost_requests(self, now: float) -> None:
        """Requests whose frontend died are never reported finished."""
        lost: list[str] = []
        for request_id, assignment in self._outstanding.items():  # oldest first
            if now - assignment.placed_at < self.settings.request_timeout_s:
                break
            lost.append(request_id)
        for request_id in lost:
            assignment = self._drop(request_id)
            self._state.ended(assignment)
            assignment.group.totals["failed"] += 1
            self._policy.finished(assignment, 0, 0, True, now)

    def _remove(self, group: Group) -> None:
        self._policy.group_removed(group.slot)
        self._state.remove_group(group)

    def _heard(self, group: Group, now: float) -> None:
        self._now = group.heard_at = now

    def _ask_if_behind(self, group: Group) -> list[Instruction]:
        if group.cursor.behind and group.cursor.ask(self._now, self.settings.snapshot_retry_s):
            return [RequestSnapshot(group.name)]
        return []


def _check_queue_s(request_id: str, queue_s: float | None) -> None:
    if queue_s is not None and not 0.0 <= queue_s < math.inf:
        raise InvalidRequestError(f"request {request_id!r}: expected finite queue_s >= 0, got {queue_s}")
