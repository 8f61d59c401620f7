"""Sets of device groups as bit masks over their slots."""

from __future__ import annotations

from collections.abc import Iterator

FEW = 16
"""Up to that many groups are looked at one by one."""


def slots_of(mask: int) -> Iterator[int]:
    """The slots in a mask, ascending."""
    if mask.bit_count() <= FEW:
        return _bits_of(mask)
    # More are found faster among digits than by arithmetic on a thousand bits a slot: by search where they are sparse.
    if 4 * mask.bit_count() < mask.bit_length():
        return _found_in(f"{mask:b}"[::-1])
    return (slot for slot, digit in enumerate(reversed(bin(mask))) if digit == "1")


def _found_in(digits: str) -> Iterator[int]:
    slot = digits.find("1")
    while slot >= 0:
        yield slot
        slot = digits.find("1", slot + 1)


def _bits_of(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
