"""The state that placement decides on: the forest, the groups, and the window H of what was sent to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from preble_jax.config import SchedSettings
from preble_jax.errors import InvariantError
from preble_jax.kv.events import EventBatch, Snapshot
from preble_jax.sched.assignment import Assignment
from preble_jax.sched.cost import CostModel, LinearCostModel, MeanCost
from preble_jax.sched.forest import Forest
from preble_jax.sched.forest_check import validate_forest
from preble_jax.sched.forest_nodes import Node
from preble_jax.sched.groups import Group, GroupTable
from preble_jax.sched.placement.base import Prefix, Query
from preble_jax.sched.window import Window


class ClusterState:
    """Implements placement.base.Cluster. Knows no policy, no request ids, no messages."""

    def __init__(self, settings: SchedSettings, page_size: int, cost: CostModel) -> None:
        self.forest = Forest(max_blocks=settings.max_forest_blocks, optimistic_ttl_s=settings.optimistic_ttl_s)
        self.groups = GroupTable()
        self.cost = cost
        self.uniform_cost = True
        self._mean_cost = MeanCost()
        self._price: CostModel | None = None  # until it is asked for again
        self.page_size = page_size
        self.num_outstanding = 0
        self.num_queued = 0
        self.queued_tokens = 0
        self.output_tokens = 0
        self._assigned: Window[Assignment] = Window(settings.window_s)
        self._answered: Window[tuple[Group, int]] = Window(settings.window_s)

    def at(self, slot: int) -> Group:
        return self.groups.at(slot)

    @property
    def num_assigned(self) -> int:
        """Requests of the window, on all groups."""
        return len(self._assigned)

    @property
    def up(self) -> int:
        """Mask of the groups that may be given requests."""
        return self.groups.up

    def expected_output(self, max_tokens: int) -> int:
        """From the window's outputs of all groups: their average, the request's budget counted as one more of them;
        rounded up, and not more than the budget. max_tokens: 0 is no budget, and 0 tokens before the first output.

        So a request of which nothing is known is taken at its word, and a few short outputs, which are the first to
        end, do not stand for all."""
        num_outputs = len(self._answered) + (max_tokens > 0)
        expected = -(-(self.output_tokens + max_tokens) // num_outputs) if num_outputs else 0
        return min(expected, max_tokens) if max_tokens else expected

    @property
    def mean_cost(self) -> CostModel:
        """What work costs on average over the groups that are there."""
        if self._price is None:
            self._price = self.cost if self.uniform_cost else self._mean_cost.mean()
        return self._price

    def set_cost(self, group: Group, cost: LinearCostModel) -> None:
        """A cost model of the group's own, for what is placed from now on."""
        self._count_cost(group, -1)
        group.cost = cost
        self._count_cost(group, 1)
        group.weigh()
        self.uniform_cost = False

    def _count_cost(self, group: Group, sign: int) -> None:
        if isinstance(group.cost, LinearCostModel):
            self._mean_cost.add(group.cost, sign)
        self._price = None

    def by_load(self, mask: int) -> Iterable[Group]:
        return self.groups.by_load(mask)

    def heaviest(self, mask: int) -> Group:
        return self.groups.heaviest(mask)

    def by_decode_share(self, mask: int) -> Iterable[Group]:
        return self.groups.by_decode_share(mask)

    def by_queue(self, mask: int) -> Iterable[Group]:
        return self.groups.by_queue(mask)

    def add_group(self, name: str, rank: float, num_pages: int, generation: int) -> Group:
        slot = self.groups.free_slot()
        group = Group(name, self.forest.add_slot() if slot is None else slot, rank, num_pages, generation, self.cost)
        self.groups.add(group)
        self._count_cost(group, 1)
        return group

    def restart_group(self, group: Group, generation: int) -> None:
        """Another process serves the group: its tree is empty. What was sent to it still counts as its load."""
        if group.state == "gone":
            self._count_cost(group, 1)
        self.forest.clear(group.slot)
        group.cursor.restart(generation)

    def remove_group(self, group: Group) -> None:
        self.forest.clear(group.slot)
        self.groups.set_state(group, "gone")
        self._count_cost(group, -1)
        self.groups.retire(group)

    def assign(self, query: Query, found: tuple[Node, int], group: Group, matched: int, now: float) -> Assignment:
        """Records that the request goes to `group`, which holds `matched` of its tokens."""
        request = query.request
        num_tokens, missed = request.num_tokens, request.num_tokens - matched
        prefill_ns = group.cost.prefill_ns(missed)
        output = group.expected_output(request.max_tokens)
        num_blocks = -(-(num_tokens + output) // self.page_size)
        own_blocks = num_blocks - matched // self.page_size
        node = self.forest.assign(request.block_hashes, found, group.slot, now)
        generation = group.cursor.generation
        assignment = Assignment(
            group, num_tokens, prefill_ns, node, now, request.tenant, missed, missed, num_blocks, own_blocks, generation
        )
        self._assigned.add(now, assignment)
        group.assigned(prefill_ns, 1)
        self.num_outstanding += 1
        self.num_queued += 1
        self.queued_tokens += missed
        group.took(request.tenant, missed, num_blocks, own_blocks)
        return assignment

    def started(self, assignment: Assignment) -> None:
        """The request's first token came: its prefill is no longer in flight."""
        self._computed(assignment)
        assignment.queued_tokens = 0

    def ended(self, assignment: Assignment) -> None:
        """The request is outstanding no more."""
        self._computed(assignment)
        self.num_outstanding -= 1
        assignment.group.gave_back(assignment.num_blocks, assignment.own_blocks)

    def _computed(self, assignment: Assignment) -> None:
        """0 queued tokens: it was said before."""
        self.num_queued -= assignment.queued_tokens > 0
        self.queued_tokens -= assignment.queued_tokens
        assignment.group.computed(assignment.tenant, assignment.queued_tokens)

    def answer(self, group: Group, output_tokens: int, now: float) -> None:
        """Records the output of a finished request."""
        if group.state != "gone":
            self._answered.add(now, (group, output_tokens))
            self.output_tokens += output_tokens
            group.answered(output_tokens, 1)

    def apply_events(self, group: Group, batch: EventBatch) -> None:
        """Applies what is new of a batch; nothing when events before it are missing. group.cursor.behind says so."""
        if not self._reach_generation(group, batch.generation):
            return
        num_known = group.cursor.take(batch.first_seq, len(batch.events))
        if num_known is not None:
            for event in batch.events[num_known:]:
                self.forest.apply(event, group.slot)

    def apply_snapshot(self, group: Group, snapshot: Snapshot) -> None:
        """Replaces what the group holds, unless the snapshot is older than what was applied."""
        if self._reach_generation(group, snapshot.generation) and group.cursor.jump(snapshot.next_seq):
            self.forest.clear(group.slot)
            for stored in snapshot.stored:
                self.forest.apply(stored, group.slot)

    def _reach_generation(self, group: Group, generation: int) -> bool:
        """False: it is an older process that speaks."""
        if generation > group.cursor.generation:
            self.restart_group(group, generation)
        return generation == group.cursor.generation

    def expire(self, now: float) -> None:
        """Lets what is older than H leave the window, and optimistic entries of the forest expire."""
        for assignment in self._assigned.expire(now):
            group = assignment.group
            self.forest.unshare(assignment.node, group.slot)
            group.assigned(assignment.prefill_ns, -1)
            self.groups.retire(group)
        for group, output_tokens in self._answered.expire(now):
            self.output_tokens -= output_tokens
            group.answered(output_tokens, -1)
            self.groups.retire(group)
        self.forest.expire(now)

    def eviction_ns(self, group: Group, num_pages: int, query: Query, *, large_only: bool = False) -> int:
        """M of E2: what is lost when `num_pages` more pages are wanted on `group`.

        Sum of prefill_time(tokens) * requests of the window that used them / requests of the window on the group, over
        the nodes LRU would evict; the last one counts as far as it has to go. Nodes of the request's own match stay.
        large_only: nodes that are not longer than all above them are evicted for nothing.
        """
        # The forest may lag behind evictions and believe that more is held than there are pages: then none is free.
        short = num_pages - max(0, group.num_pages - self.forest.num_held[group.slot])
        if short <= 0 or not group.num_assigned:
            return 0
        total, chain = 0, query.request.block_hashes
        for node in self.forest.coldest(group.slot):
            if node.start < len(chain) and node.hashes[0] == chain[node.start]:
                continue
            num = min(len(node.hashes), short)
            shares = node.shares.get(group.slot)
            if shares and not (large_only and len(node.hashes) <= node.start):
                total += group.cost.prefill_ns(num * self.page_size) * shares
            short -= num
            if not short:
                break
        return total // group.num_assigned

    # --- prefixes, for policies that follow them

    def key_prefix(self, assignment: Assignment) -> Prefix | None:
        """Preble's key portion, of what is shared: the deepest node of the prompt that more than one request of the
        window used and that is longer than everything above it."""
        step: Node | None = assignment.node
        while step is not None and step.parent is not None:
            if step.alive and len(step.hashes) > step.start and _is_shared(step.shares):
                return Prefix(step.hashes[-1], step.end)
            step = step.parent
        return None

    def requests_of(self, prefix: Prefix) -> Mapping[int, int]:
        """Slot -> requests of the window that were placed there with this prefix."""
        node = self.forest.tree.node_of(prefix.last_block)
        return node.shares if node is not None else {}

    def holders_of(self, prefix: Prefix) -> int:
        node = self.forest.tree.node_of(prefix.last_block)
        return node.groups if node is not None else 0

    def continuations(self, prefix: Prefix, slot: int) -> dict[bytes, int]:
        """First block after the prefix -> requests of the window placed on `slot` with both."""
        node = self.forest.tree.node_of(prefix.last_block)
        if node is None:
            return {}
        if node.end > prefix.num_blocks:  # all of its requests went on in the same way
            return {node.hashes[prefix.num_blocks - node.start]: node.shares.get(slot, 0)}
        return {first: child.shares[slot] for first, child in node.children.items() if slot in child.shares}

    def validate(self) -> None:
        """Raises InvariantError if the forest is damaged or a group's sums are not those of the window."""
        validate_forest(self.forest)
        costs = [group.cost for group in self.groups.by_name.values() if group.state != "gone"]
        self._mean_cost.validate([cost for cost in costs if isinstance(cost, LinearCostModel)])
        if self.output_tokens != (total := sum(tokens for _, tokens in self._answered)):
            raise InvariantError(f"output tokens of the window: kept {self.output_tokens} != found {total}")
        for group in self.groups.by_name.values():
            mine = [a.prefill_ns for a in self._assigned if a.group is group]
            outputs = [tokens for owner, tokens in self._answered if owner is group]
            kept = (group.num_assigned, group.prefill_ns, group.num_outputs, group.output_tokens)
            found = (len(mine), sum(mine), len(outputs), sum(outputs))
            if kept != found:
                raise InvariantError(f"group {group.name!r}: sums kept {kept} != sums of the window {found}")
            if sum(group.queued_by_tenant.values()) != group.queued_tokens:
                raise InvariantError(
                    f"group {group.name!r}: {group.queued_tokens} queued tokens kept != sum of {group.queued_by_tenant}"
                )
            if group.state == "gone" and self.forest.num_held[group.slot]:
                raise InvariantError(f"group {group.name!r}: gone, but holds {self.forest.num_held[group.slot]} blocks")


def _is_shared(shares: Mapping[int, int]) -> bool:
    return len(shares) > 1 or any(num > 1 for num in shares.values())
