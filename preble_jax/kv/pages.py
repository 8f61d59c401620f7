"""The page pool: which page ids are free."""

from __future__ import annotations

from collections.abc import Iterable

from preble_jax.errors import InvariantError


class PagePool:
    """Hands out page ids `0 .. num_pages - 1`. Knows only free and taken, not who holds a taken page."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages; the caller has made sure that so many are free."""
        if count > len(self._free):
            raise InvariantError(f"page pool: {count} pages wanted, {len(self._free)} free")
        if count == 1:  # a decoding sequence's next one
            page = self._free.pop()
            self._is_free[page] = 0
            return [page]
        if not count:
            return []
        pages = self._free[: -count - 1 : -1]
        del self._free[-count:]
        is_free = self._is_free
        for page in pages:
            is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        is_free, free = self._is_free, self._free
        for page in pages:
            if is_free[page]:
                raise InvariantError(f"page pool: page {page} freed twice")
            is_free[page] = 1
            free.append(page)

    def validate(self) -> None:
        if len(set(self._free)) != len(self._free) or sum(self._is_free) != len(self._free):
            raise InvariantError(f"page pool: free list {len(self._free)} != pages marked free {sum(self._is_free)}")
