"""One interval's plan of CacheRoute (arXiv 2608.19677): destinations of the keys that are kept warm.

1. A key of rate r wants k = max(1, ceil(r / q_cap)) destinations (no more than there are groups), r / k for each.
2. Keys are admitted in order of rate until the next one's k does not fit into what is left of W slots a group.
3. Longest processing time first: keys in order of r / k, each onto the least loaded groups that have a slot left.

Ours: that admission ends with the first key that does not fit; and that a key stays where the last plan had it while
that group's load is not above the mean, because moving it would compute its prefix again. This keeps the bound of list
scheduling (mean + one share): all it needs is that nobody above the mean is given more (Graham, 1966).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from preble_jax.sched.placement.base import slots_of


def make_plan(
    rates: Mapping[bytes, float], slots: Sequence[int], q_cap: float, num_slots: int, previous: Mapping[bytes, int]
) -> dict[bytes, int]:
    """Key -> mask of destinations. rates, q_cap: requests a second. num_slots: W. previous: the last plan."""
    wanted = _admit(rates, len(slots), q_cap, num_slots)
    mean = sum(rates[key] for key in wanted) / max(1, len(slots))
    loads = dict.fromkeys(slots, 0.0)
    room = dict.fromkeys(slots, num_slots)
    heap = [(0.0, slot) for slot in sorted(slots)]  # entries whose load is no longer the slot's are stale
    plan: dict[bytes, int] = {}
    for key in sorted(wanted, key=lambda key: (-rates[key] / wanted[key], key)):
        num, share = wanted[key], rates[key] / wanted[key]
        held = [slot for slot in slots_of(previous.get(key, 0)) if room.get(slot) and loads[slot] <= mean]
        chosen = held[:num]
        while len(chosen) < num and heap:
            load, slot = heapq.heappop(heap)
            if room[slot] and load == loads[slot] and slot not in chosen:
                chosen.append(slot)
        plan[key] = sum(1 << slot for slot in chosen)
        for slot in chosen:
            loads[slot] += share
            room[slot] -= 1
            heapq.heappush(heap, (loads[slot], slot))
    return plan


def _admit(rates: Mapping[bytes, float], num_groups: int, q_cap: float, num_slots: int) -> dict[bytes, int]:
    """Key -> k, of the keys that are kept warm."""
    wanted: dict[bytes, int] = {}
    left = num_groups * num_slots
    for key in sorted(rates, key=lambda key: (-rates[key], key)):
        num = min(num_groups, max(1, math.ceil(rates[key] / q_cap)))
        if num > left or not num:
            break
        wanted[key] = num
        left -= num
    return wanted
