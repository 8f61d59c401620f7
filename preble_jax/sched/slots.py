"""Sets of device groups as bit masks over their slots."""

from __future__ import annotations

from collections.abc import Iterator

FEW = 16
"""Up to that many groups are looked at one by one."""


def slots_of(mask: int) -> Iterator[int]:
    """The slots in a mask, ascending."""
    if mask.bit_count() > FEW:  # then a walk over digits is faster than arithmetic on a thousand bits a slot
        return (slot for slot, digit in enumerate(reversed(bin(mask))) if digit == "1")
    return _bits_of(mask)


def _bits_of(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
