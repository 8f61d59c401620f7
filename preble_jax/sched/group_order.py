"""Groups in the order of something that changes with every request, found without looking at all of them.

A decision changes the sums of a few groups, so the order is a sorted list in which the changed ones are moved by
bisection, and only when somebody asks. Moving one costs a memory move of the list: a microsecond at 1,024 groups.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble_jax.sched.groups import Group

Entry = tuple[float, float, int]
"""(key, rank, slot): no two are equal, so the order does not depend on history."""

_FEW = 16


class GroupOrder:
    """changed: the groups whose key may be another since the last question; whoever changes a group adds it."""

    def __init__(self, key: Callable[[Group], float]) -> None:
        self.changed: set[Group] = set()
        self._key = key
        self._entries: list[Entry] = []
        self._entry_of: dict[Group, Entry] = {}

    @property
    def members(self) -> set[Group]:
        return {*self._entry_of, *self.changed}

    def remove(self, group: Group) -> None:
        self.changed.discard(group)
        entry = self._entry_of.pop(group, None)
        if entry is not None:
            del self._entries[bisect_left(self._entries, entry)]

    def sorted(self, groups: list[Group]) -> list[Group]:
        """A few groups in order, without the list."""
        if len(groups) > 1:
            groups.sort(key=self._entry)
        return groups

    def ascending(self, mask: int) -> Iterator[int]:
        """The slots of a mask, the least key first. Nothing may change meanwhile."""
        self._settle()
        return (slot for _, _, slot in self._entries if mask >> slot & 1)

    def descending(self, mask: int) -> Iterator[int]:
        """The slots of a mask, the greatest key first."""
        self._settle()
        return (slot for _, _, slot in reversed(self._entries) if mask >> slot & 1)

    def _entry(self, group: Group) -> Entry:
        return self._key(group), group.rank, group.slot

    def _settle(self) -> None:
        changed, entries, entry_of = self.changed, self._entries, self._entry_of
        many = len(changed) > _FEW and 4 * len(changed) > len(entries)
        for group in changed:
            entry = self._entry(group)
            old = entry_of.get(group)
            entry_of[group] = entry
            if many or entry == old:
                continue
            if old is not None:
                del entries[bisect_left(entries, old)]
            insort(entries, entry)
        if many:
            entries[:] = sorted(entry_of.values())
        changed.clear()
