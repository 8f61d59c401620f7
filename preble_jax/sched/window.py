"""The window H: things that count for a while and then leave, in the order in which they came."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Window(Generic[T]):
    """A queue of items that leave `span_s` after they came. O(1) amortised per item.

    Keeps no sums itself: whoever adds an item adds it to sums of integers, and takes it out of them when `expire`
    hands it back. Times must not run backwards.
    """

    __slots__ = ("_items", "_span_s")

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._items: deque[tuple[float, T]] = deque()

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return (item for _, item in self._items)

    def add(self, now: float, item: T) -> float:
        """Returns the time at which the item leaves."""
        leaves_at = now + self._span_s
        self._items.append((leaves_at, item))
        return leaves_at

    def expire(self, now: float) -> Iterator[T]:
        """Takes out and yields every item whose time is up (leaves_at <= now); consume it to the end."""
        items = self._items
        while items and items[0][0] <= now:
            yield items.popleft()[1]
