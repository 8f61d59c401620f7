"""The device groups a scheduler knows: who is up, what was sent to them, what they reported.

A group has a *slot*, a small integer that stands for it in the forest's bit masks. A slot is given to another group
only when nothing of the window and no outstanding request refers to it any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Literal

from preble_jax.errors import InvariantError, NotFoundError
from preble_jax.sched.cost import NS_PER_S, CostModel
from preble_jax.sched.event_cursor import EventCursor
from preble_jax.sched.group_order import GroupOrder
from preble_jax.sched.messages import Decision, GroupStats
from preble_jax.sched.slots import FEW, slots_of
from preble_jax.sched.step_fit import StepFit

State = Literal["up", "draining", "gone"]


class Group:
    """One device group. The sums over the window H are kept by adding what comes and subtracting what leaves.

    max_num_seqs: sequences that run at a time; 0: not known, taken for any number.
    cost: what work costs here; fit: what refines it. rank: decides between groups of equal cost. load_ns: L of E2.
    decode_ns: the part of L that is decoding.
    num_waiting, num_running: as the group last reported them. num_outstanding: placed here and not reported finished;
    of these, queued_tokens: prompt tokens they had to compute when placed, less those of requests whose first token was
    reported (prefill in flight), and the same by tenant; decode_blocks: pages of their prompts and expected outputs;
    own_blocks: of these, what was not there when they were placed, so that no prefix counts twice.
    """

    def __init__(self, name: str, slot: int, rank: float, num_pages: int, generation: int, cost: CostModel) -> None:
        self.name = name
        self.slot = slot
        self.rank = rank
        self.num_pages = num_pages
        self.max_num_seqs = 0
        self.cursor = EventCursor(generation)
        self.cost = cost
        self.fit: StepFit | None = None
        self.state: State = "up"
        self.heard_at = 0.0
        # sums over the window
        self.num_assigned = 0
        self.prefill_ns = 0
        self.num_outputs = 0
        self.output_tokens = 0
        self.load_ns = 0
        self.decode_ns = 0
        # of the requests that have not ended
        self.num_outstanding = 0
        self.queued_tokens = 0
        self.queued_by_tenant: dict[str, int] = {}
        self.decode_blocks = 0
        self.own_blocks = 0
        # since the group was added
        self.num_waiting = 0
        self.num_running = 0
        self.totals: Counter[str] = Counter()
        self.decisions: Counter[Decision] = Counter()
        # sets to which the group adds itself when its load, and when the number of its requests, changes
        self.watchers: tuple[set[Group], ...] = ()
        self.queue_watchers: tuple[set[Group], ...] = ()

    @property
    def decode_share(self) -> float:
        """The share of decoding in L; 0 without load."""
        return self.decode_ns / self.load_ns if self.load_ns else 0.0

    def assigned(self, prefill_ns: int, sign: int) -> None:
        """A request enters the window (sign 1) or leaves it (sign -1)."""
        self.num_assigned += sign
        self.prefill_ns += sign * prefill_ns
        self.weigh()

    def answered(self, output_tokens: int, sign: int) -> None:
        """A finished request's output enters the window (sign 1) or leaves it (sign -1)."""
        self.num_outputs += sign
        self.output_tokens += sign * output_tokens
        self.weigh()

    def expected_output(self, max_tokens: int) -> int:
        """Output tokens a request is expected to have: the average of the window (0 before the first), rounded up, and
        not more than the request's budget. max_tokens: 0 is no budget."""
        expected = -(-self.output_tokens // self.num_outputs) if self.num_outputs else 0
        return min(expected, max_tokens) if max_tokens else expected

    def took(self, tenant: str, missed_tokens: int, num_blocks: int, own_blocks: int) -> None:
        """A request was sent here."""
        self._count(1)
        self.queued_tokens += missed_tokens
        self.queued_by_tenant[tenant] = self.queued_by_tenant.get(tenant, 0) + missed_tokens
        self.decode_blocks += num_blocks
        self.own_blocks += own_blocks

    def computed(self, tenant: str, missed_tokens: int) -> None:
        """A request that was sent here needs no more of its prompt computed: its first token came, or it ended before.
        missed_tokens: what `took` was told; 0 when this was said before."""
        if missed_tokens:
            self.queued_tokens -= missed_tokens
            self.queued_by_tenant[tenant] -= missed_tokens
            if not self.queued_by_tenant[tenant]:
                del self.queued_by_tenant[tenant]

    def gave_back(self, num_blocks: int, own_blocks: int) -> None:
        """A request ended."""
        self._count(-1)
        self.decode_blocks -= num_blocks
        self.own_blocks -= own_blocks

    @property
    def num_slots(self) -> int:
        """Sequences that run at a time: what it has slots for, or fewer, when those that are here want more pages than
        it has. 0: any number."""
        slots = self.max_num_seqs
        if self.own_blocks > self.num_pages:
            fit = max(1, self.num_outstanding * self.num_pages // self.own_blocks)
            return min(slots, fit) if slots else fit
        return slots

    def _count(self, change: int) -> None:
        self.num_outstanding += change
        for changed in self.queue_watchers:
            changed.add(self)

    def weigh(self) -> None:
        """Works out L anew, which `assigned` and `answered` do; call it after `cost` was replaced.

        L = sum of prefill times + requests * decode time of the average output seen here (0 before the first)."""
        if self.num_outputs:
            self.decode_ns = self.num_assigned * self.cost.decode_ns(self.output_tokens / self.num_outputs)
        else:
            self.decode_ns = 0
        self.load_ns = self.prefill_ns + self.decode_ns
        for changed in self.watchers:
            changed.add(self)

    def stats(self, held_pages: int) -> GroupStats:
        return GroupStats(
            group=self.name,
            draining=self.state == "draining",
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_outstanding=self.num_outstanding,
            num_placed=self.decisions.total(),
            num_failed=self.totals["failed"],
            decisions=dict(self.decisions),
            matched_tokens=self.totals["matched_tokens"],
            prompt_tokens=self.totals["prompt_tokens"],
            cached_tokens=self.totals["cached_tokens"],
            output_tokens=self.totals["output_tokens"],
            held_pages=held_pages,
            num_pages=self.num_pages,
            load_s=self.load_ns / NS_PER_S,
        )


class GroupTable:
    """Groups by name and by slot. `up` is the mask of those that may be given requests."""

    def __init__(self) -> None:
        self.by_name: dict[str, Group] = {}
        self.by_slot: list[Group | None] = []
        self.up = 0
        self._free_slots: list[int] = []
        self._least_pages = 0
        self._by_load = GroupOrder(lambda group: group.load_ns)
        self._by_decode_share = GroupOrder(lambda group: -group.decode_share)
        self._by_queue = GroupOrder(lambda group: group.num_outstanding)

    def get(self, name: str) -> Group:
        """Raises NotFoundError for a group that was never added, or was removed."""
        group = self.by_name.get(name)
        if group is None or group.state == "gone":
            known = ", ".join(sorted(g.name for g in self.by_name.values() if g.state != "gone")) or "none"
            raise NotFoundError(f"group: expected one that was added ({known}), got {name!r}; add it first")
        return group

    def at(self, slot: int) -> Group:
        group = self.by_slot[slot]
        assert group is not None
        return group

    def free_slot(self) -> int | None:
        """A slot that was given back, if there is one; it is taken by the next `add`."""
        return self._free_slots[-1] if self._free_slots else None

    def add(self, group: Group) -> None:
        if self._free_slots and self._free_slots[-1] == group.slot:
            self._free_slots.pop()
            self.by_slot[group.slot] = group
        else:
            assert group.slot == len(self.by_slot)
            self.by_slot.append(group)
        self.by_name[group.name] = group
        group.watchers = (self._by_load.changed, self._by_decode_share.changed)
        group.queue_watchers = (self._by_queue.changed,)
        for changed in (*group.watchers, *group.queue_watchers):
            changed.add(group)
        self.resize(group, group.num_pages)
        self.set_state(group, "up")

    def resize(self, group: Group, num_pages: int) -> None:
        group.num_pages = num_pages
        self._least_pages = min(g.num_pages for g in self.by_name.values())

    def set_state(self, group: Group, state: State) -> None:
        group.state = state
        self.up = self.up | 1 << group.slot if state == "up" else self.up & ~(1 << group.slot)

    def retire(self, group: Group) -> None:
        """Forgets a group that is gone once the window holds nothing of it and its requests have ended."""
        if group.state == "gone" and not (group.num_assigned or group.num_outputs or group.num_outstanding):
            del self.by_name[group.name]
            self.by_slot[group.slot] = None
            self._by_load.remove(group)
            self._by_decode_share.remove(group)
            self._by_queue.remove(group)
            self._free_slots.append(group.slot)

    def validate(self) -> None:
        """Raises InvariantError if a slot is neither free nor one group's, or an order has other groups than these."""
        groups = set(self.by_name.values())
        kept = [(slot, group) for slot, group in enumerate(self.by_slot) if group is not None]
        if {group for _, group in kept} != groups or any(slot != group.slot for slot, group in kept):
            raise InvariantError(
                f"groups by slot: kept {[(slot, group.name) for slot, group in kept]} != found "
                f"{sorted((group.slot, group.name) for group in groups)}"
            )
        free = [slot for slot, group in enumerate(self.by_slot) if group is None]
        if sorted(self._free_slots) != free:
            raise InvariantError(f"free slots: kept {sorted(self._free_slots)} != found {free}")
        for order in (self._by_load, self._by_decode_share, self._by_queue):
            if wrong := order.members ^ groups:
                raise InvariantError(f"order of groups: {[group.name for group in wrong]} in it or here, not both")

    def by_load(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by L, the least first; equal ones by rank. Nothing may change meanwhile."""
        return self._in_order(self._by_load, mask)

    def by_decode_share(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by the share of decoding in L, the greatest first; equal ones by rank."""
        return self._in_order(self._by_decode_share, mask)

    def by_queue(self, mask: int) -> Iterable[Group]:
        """The groups of a mask by the number of requests outstanding, the fewest first; equal ones by rank."""
        return self._in_order(self._by_queue, mask)

    def heaviest(self, mask: int) -> Group:
        """The group of greatest L in a mask that is not 0; of equal ones the last by rank."""
        if mask.bit_count() <= FEW:
            return max((self.at(slot) for slot in slots_of(mask)), key=lambda group: (group.load_ns, group.rank))
        return self.at(next(self._by_load.descending(mask)))

    def _in_order(self, order: GroupOrder, mask: int) -> Iterable[Group]:
        if mask.bit_count() <= FEW:
            return order.sorted([self.at(slot) for slot in slots_of(mask)])
        return map(self.at, order.ascending(mask))

    def allowed(self, excluded: frozenset[str]) -> int:
        """Mask of the groups that are up and not excluded. Names nobody knows exclude nobody."""
        mask = self.up
        for name in excluded:
            group = self.by_name.get(name)
            if group is not None:
                mask &= ~(1 << group.slot)
        return mask

    def large_enough(self, mask: int, num_pages: int) -> int:
        """The groups of `mask` that have that many pages at all."""
        if num_pages > self._least_pages:
            for group in self.by_name.values():
                if group.num_pages < num_pages:
                    mask &= ~(1 << group.slot)
        return mask
