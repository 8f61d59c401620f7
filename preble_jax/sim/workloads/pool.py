"""The shared prefixes of one or several clients: their lengths, popularity and blocks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from preble_jax.sim.workloads.shape import Shape


class Pool:
    """A system prompt and prefixes behind it, in blocks with ids of their own.

    scale: device groups over two. first_id: where its ids start. next_id: the first one after them.
    """

    def __init__(self, shape: Shape, *, scale: float, block_size: int, first_id: int, rng: np.random.Generator) -> None:
        self._shape = shape
        self._block_size = block_size
        self._num_system = round(shape.system / block_size)
        lengths = shape.prefix
        self._count = max(1, round(shape.num_prefixes * scale)) if lengths else 0
        drawn = lengths.spread(rng, self._count) if lengths else np.zeros(0, np.int64)
        if shape.max_prefix:
            drawn = np.minimum(drawn, shape.max_prefix)
        self._num_blocks = np.rint(drawn / block_size).astype(np.int64)
        self._starts = first_id + self._num_system + np.cumsum(self._num_blocks) - self._num_blocks
        self._system = tuple(range(first_id, first_id + self._num_system))
        self._chains: dict[int, tuple[int, ...]] = {-1: self._system}
        self.next_id = first_id + self._num_system + int(self._num_blocks.sum())

    def choose(self, rng: np.random.Generator, progress: NDArray[np.float64]) -> NDArray[np.int64]:
        """A prefix for each request, by popularity; -1 where there are none. progress: 0 to 1 of the run."""
        count = len(progress)
        if not self._count:
            return np.full(count, -1, np.int64)
        shape = self._shape
        weights = np.arange(1, self._count + 1, dtype=np.float64) ** -shape.zipf
        places = np.stack([rng.permutation(self._count) for _ in range(shape.num_epochs)])
        draws = rng.random((count, 2))
        share = np.cumsum(weights) / weights.sum()
        ranks = np.minimum(np.searchsorted(share, draws[:, 0], side="right"), self._count - 1)
        epochs = np.minimum((progress * shape.num_epochs).astype(np.int64), shape.num_epochs - 1)
        chosen: NDArray[np.int64] = places[epochs, ranks]
        return np.where(draws[:, 1] < shape.hot, places[epochs, 0], chosen)

    def num_tokens(self, prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens shared by requests with these prefixes, the system prompt included."""
        if not self._count:
            return np.full(len(prefixes), self._num_system * self._block_size, np.int64)
        return (self._num_system + self._num_blocks[prefixes]) * self._block_size

    def blocks(self, prefix: int) -> tuple[int, ...]:
        """The chain of a prefix from the start of the prompt; the same object every time."""
        chain = self._chains.get(prefix)
        if chain is None:
            start = int(self._starts[prefix])
            chain = self._chains[prefix] = self._system + tuple(range(start, start + int(self._num_blocks[prefix])))
        return chain
