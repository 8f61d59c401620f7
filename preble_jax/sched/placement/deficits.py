"""One tenant's deficits: how much service each device group may still give it before the next refill."""

from __future__ import annotations

from preble_jax.sched.slots import slots_of


class Deficits:
    """In service units (TenantSettings). quantum: what a refill adds on each group.

    A group that nothing was charged on holds a full quantum, nothing before the first refill: so a group that comes
    later is worth what an unused one is, and only groups in use cost memory.
    """

    __slots__ = ("_by_slot", "_exhausted", "num_refills", "quantum")

    def __init__(self, quantum: float) -> None:
        self.quantum = quantum
        self.num_refills = 0  # quanta added to each group so far
        self._by_slot: dict[int, float] = {}
        self._exhausted = 0  # mask of slots with a deficit <= 0

    def __getitem__(self, slot: int) -> float:
        return self._by_slot.get(slot, self.quantum if self.num_refills else 0.0)

    def available(self, mask: int) -> int:
        """The groups of a mask with a deficit > 0."""
        return mask & ~self._exhausted if self.num_refills else 0

    def add(self, slot: int, units: float) -> None:
        """Negative: charges. What is given back does not lift a deficit above a quantum."""
        deficit = self._by_slot[slot] = min(self[slot] + units, self.quantum)
        if deficit > 0:
            self._exhausted &= ~(1 << slot)
        else:
            self._exhausted |= 1 << slot

    def refill(self, mask: int) -> None:
        """What `while available(mask) is empty: add a quantum on each of its groups` comes to, in one step. None of the
        mask's groups may be available. O(groups), but it pays for as much service on each of them."""
        rounds = 1
        if self.num_refills:
            # -q / Q rounded up, and one more when that brings q to 0 exactly. All of them are in use by now.
            rounds = min(int(-self._by_slot[slot] // self.quantum) + 1 for slot in slots_of(mask))
        self.num_refills += rounds
        for slot in slots_of(mask):
            if slot in self._by_slot:
                self.add(slot, rounds * self.quantum)

    def forget(self, slot: int) -> None:
        """The group is gone, and what was owed there with it."""
        self._by_slot.pop(slot, None)
        self._exhausted &= ~(1 << slot)
