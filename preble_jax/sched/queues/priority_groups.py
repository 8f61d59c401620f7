"""Preble's local queue (ICLR 2025, section 3.3): requests with more of their prompt cached go first, none starves.

Requests fall into P groups by the cached percentage of their prompt (63% cached, P = 10: group 6). Admissions are
shared among the groups that have requests in proportion to their rank: 55 admissions over ten groups are 10 from the
top group, 9 from the next, ... Within a group: first come, first served.

The proportion holds over time, not only within a batch: each group has a virtual time that advances by 1 / rank when a
request of it is admitted, and the group that is furthest behind is next. A group that was empty joins at the present.
"""

from __future__ import annotations

from collections.abc import Iterator

from preble_jax.sched.queues.base import CachedTokens
from preble_jax.sched.sequence import Sequence


class PriorityGroups:
    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self._waiting: dict[int, Sequence] = {}  # by order
        self._virtual_time = [0.0] * num_groups
        self._was_empty = [True] * num_groups
        self._group_of: dict[int, int] = {}  # order -> group, as of the last `candidates`

    def add(self, sequence: Sequence) -> None:
        self._waiting[sequence.order] = sequence

    def remove(self, sequence: Sequence) -> None:
        if self._waiting.pop(sequence.order, None) is not sequence:
            raise KeyError(f"request {sequence.request.request_id!r} is not waiting")
        self._group_of.pop(sequence.order, None)

    def group(self, cached: int, total: int) -> int:
        return min(cached * self.num_groups // total, self.num_groups - 1)

    def candidates(self, cached_tokens: CachedTokens) -> Iterator[Sequence]:
        groups: list[list[Sequence]] = [[] for _ in range(self.num_groups)]
        for order in sorted(self._waiting):
            sequence = self._waiting[order]
            group = self.group(cached_tokens(sequence), len(sequence.tokens))
            self._group_of[order] = group
            groups[group].append(sequence)
        self._join_present([bool(members) for members in groups])
        heads = [0] * self.num_groups
        while open_groups := [g for g in range(self.num_groups) if heads[g] < len(groups[g])]:
            # Ties go to the higher rank. A candidate that cannot be admitted costs its group nothing.
            group = min(open_groups, key=lambda g: (self._virtual_time[g], -g))
            sequence = groups[group][heads[group]]
            heads[group] += 1
            yield sequence

    def admitted(self, sequence: Sequence) -> None:
        group = self._group_of[sequence.order]
        self._virtual_time[group] += 1.0 / (group + 1)

    def _join_present(self, occupied: list[bool]) -> None:
        present = [self._virtual_time[g] for g in range(self.num_groups) if occupied[g] and not self._was_empty[g]]
        for g in range(self.num_groups):
            if occupied[g] and self._was_empty[g]:
                self._virtual_time[g] = max(self._virtual_time[g], min(present, default=self._virtual_time[g]))
            self._was_empty[g] = not occupied[g]

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting.values())
