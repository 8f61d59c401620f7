"""Preble's local queue (ICLR 2025, section 3.3): requests with more of their prompt cached go first, none starves.

Requests fall into P groups by the cached percentage of their prompt (63% cached, P = 10: group 6). Admissions are
shared among the groups that have requests in proportion to their rank: 55 admissions over ten groups are 10 from the
top group, 9 from the next, ... Within a group: first come, first served.

The proportion holds over time, not only within a batch: each group has a virtual time that advances by 1 / rank when a
request of it is admitted, and the group that is furthest behind is next. A group that was empty joins at the present:
the least virtual time among those that were not, or if all were, the one at which the last admission was made.
"""

from __future__ import annotations

from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens
from preble_jax.sched.queues.by_match import RankedByMatch
from preble_jax.sched.queues.ordered import Ordered
from preble_jax.sched.sequence import Sequence


class PriorityGroups(RankedByMatch):
    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.num_groups = num_groups
        self._groups: list[Ordered[int, Sequence]] = [Ordered() for _ in range(num_groups)]  # each by order
        self._virtual_time = [0.0] * num_groups
        self._was_empty = [True] * num_groups
        self._present = 0.0

    def group(self, cached: int, total: int) -> int:
        return min(cached * self.num_groups // total, self.num_groups - 1)

    def _place(self, sequence: Sequence, cached: int) -> None:
        self._groups[self.group(cached, len(sequence.tokens))].insert(sequence.order, sequence)

    def _displace(self, sequence: Sequence, cached: int) -> None:
        self._groups[self.group(cached, len(sequence.tokens))].pop(sequence.order)

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        self._rank_unsure(cached_tokens)
        self._join_present()
        heads = {g: order for g, members in enumerate(self._groups) if (order := members.first()) is not None}
        while heads:
            # Ties go to the higher rank. A candidate that cannot be admitted costs its group nothing.
            group = min(heads, key=lambda g: (self._virtual_time[g], -g))
            order = heads.pop(group)
            yield self._groups[group][order]
            following = self._groups[group].after(order)
            if following is not None:
                heads[group] = following

    def admitted(self, sequence: Sequence) -> None:
        group = self.group(self._cached[sequence.order], len(sequence.tokens))
        self._present = self._virtual_time[group]
        self._virtual_time[group] += 1.0 / (group + 1)

    def _join_present(self) -> None:
        occupied = [len(members) > 0 for members in self._groups]
        stayed = [self._virtual_time[g] for g in range(self.num_groups) if occupied[g] and not self._was_empty[g]]
        present = min(stayed, default=self._present)
        for g in range(self.num_groups):
            if occupied[g] and self._was_empty[g]:
                self._virtual_time[g] = max(self._virtual_time[g], present)
            self._was_empty[g] = not occupied[g]
