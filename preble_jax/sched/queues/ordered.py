"""A small sorted map, for queues that change a little at each step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Ordered(Generic[K, V]):
    """Values in the order of their keys, each key once.

    A sorted list of keys beside a dict: an insertion is a binary search and a memmove, which at 10,000 keys is a few
    microseconds, less than a balanced tree in Python takes.
    """

    __slots__ = ("_keys", "_values")

    def __init__(self) -> None:
        self._keys: list[Any] = []  # K has an order, which typing cannot say of int and tuple alike
        self._values: dict[K, V] = {}

    def insert(self, key: K, value: V) -> None:
        if key in self._values:
            raise KeyError(f"key {key!r} is there already")
        self._values[key] = value
        insort(self._keys, key)

    def pop(self, key: K) -> V:
        value = self._values.pop(key)
        del self._keys[bisect_left(self._keys, key)]
        return value

    def first(self) -> K | None:
        return self._keys[0] if self._keys else None

    def after(self, key: K | None) -> K | None:
        """The least key greater than `key`, which need not be there; None is less than all."""
        if key is None:
            return self.first()
        index = bisect_right(self._keys, key)
        return self._keys[index] if index < len(self._keys) else None

    def __getitem__(self, key: K) -> V:
        return self._values[key]

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[V]:
        """Values in order; the map must not change meanwhile."""
        return (self._values[key] for key in self._keys)
