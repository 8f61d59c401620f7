"""Block sizes of the Hopper kernel as data, with the shared memory each of them takes.

To tune for a card: edit a row, see that `smem_bytes` stays under the limit (a test holds it there), and run
benchmarks/gpu_kernels.py.
"""

from __future__ import annotations

from dataclasses import dataclass

SMEM_BYTES = 227 * 1024  # what one block of threads may have on Hopper
NUM_SMS = 132  # multiprocessors of the SXM cards; each runs one block of threads, which goes from item to item
WGMMA_ROWS = 64  # rows of one warpgroup's matrix product
STORE_COLUMNS = 64  # a split item's result leaves through shared memory in pieces of so many columns
REDUCTION_SCRATCH_BYTES = 2048


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """num_consumers: warpgroups of 64 query rows. split_keys: they share a tile of 64 rows and take alternate steps
    (few query rows, many keys); otherwise each has its own rows of the tile and takes every step.
    block_kv: keys of a step. num_stages: steps in flight. num_q_slots: query tiles in flight.
    waves: how many items per multiprocessor to aim for when key ranges are split, and min_split_keys, which no part
    but a sequence's only one goes below. registers: a thread's, in consumers and in the producer.
    """

    num_consumers: int
    split_keys: bool
    block_kv: int
    num_stages: int
    num_q_slots: int
    waves: int
    min_split_keys: int
    registers: tuple[int, int] = (232, 40)

    @property
    def tile_rows(self) -> int:
        """Query rows of an item."""
        return WGMMA_ROWS if self.split_keys else WGMMA_ROWS * self.num_consumers

    @property
    def parts_per_item(self) -> int:
        """Partial results that one item leaves for each of its rows."""
        return self.num_consumers if self.split_keys else 1

    def smem_bytes(self, head_dim: int) -> int:
        """Shared memory of one block of threads: queries, the ring of K and V, staged results, barriers."""
        queries = self.num_q_slots * self.tile_rows * head_dim * 2
        ring = 2 * self.num_stages * self.block_kv * head_dim * 2
        staged = self.num_consumers * WGMMA_ROWS * STORE_COLUMNS * 4 if self.split_keys else 0
        barriers = 8 * (4 * self.num_stages + 2 * self.num_q_slots)
        return queries + ring + staged + barriers + REDUCTION_SCRATCH_BYTES + 1024  # what alignment may cost


# One query token a sequence: bound by memory, so what counts is bytes in flight and even shares.
DECODE = {
    64: Blocks(
        num_consumers=2, split_keys=True, block_kv=128, num_stages=4, num_q_slots=2, waves=8, min_split_keys=512
    ),
    128: Blocks(
        num_consumers=2, split_keys=True, block_kv=64, num_stages=4, num_q_slots=2, waves=8, min_split_keys=512
    ),
    256: Blocks(
        num_consumers=2,
        split_keys=True,
        block_kv=64,
        num_stages=2,
        num_q_slots=1,
        waves=8,
        min_split_keys=512,
        registers=(240, 24),
    ),
}
# Tiles of prompt chunks and of families: bound by the tensor cores.
TILES = {
    64: Blocks(
        num_consumers=2, split_keys=False, block_kv=128, num_stages=3, num_q_slots=2, waves=2, min_split_keys=512
    ),
    128: Blocks(
        num_consumers=2, split_keys=False, block_kv=128, num_stages=2, num_q_slots=2, waves=2, min_split_keys=512
    ),
    256: Blocks(
        num_consumers=2,
        split_keys=False,
        block_kv=64,
        num_stages=2,
        num_q_slots=1,
        waves=2,
        min_split_keys=512,
        registers=(240, 24),
    ),
}
