"""What the TPU kernel cannot serve, said when a call is traced."""

from __future__ import annotations

from kernels_pallas.geometry import Geometry
from kernels_pallas.layout import PAGE_SIZES
from kernels_pallas.tpu.blocks import LANES, current_chip
from kernels_pallas.tpu.tiles import Tile, tile_of

HEAD_DIMS = (64, 128, 256)


def check(
    geometry: Geometry,
    *,
    sliding_window: int | None,
    soft_cap: float | None,
    tiles: tuple[Tile, ...] | None = None,
) -> None:
    """Raises ValueError, naming the limit. tiles: those that will run; by default the chip's block sizes make them."""
    if geometry.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim on TPUs: expected one of {HEAD_DIMS}, got {geometry.head_dim}; use the jnp backend")
    if geometry.page_size not in PAGE_SIZES:
        raise ValueError(f"page_size on TPUs: expected one of {PAGE_SIZES}, got {geometry.page_size}; set it")
    if geometry.num_kv_heads > LANES:
        raise ValueError(
            f"key heads: expected at most {LANES} a device, got {geometry.num_kv_heads}; split them over a mesh"
        )
    if sliding_window is not None and (sliding_window < 1 or not geometry.causal):
        raise ValueError(f"sliding_window: expected at least 1, and causal attention, got {sliding_window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap: expected a positive number or None, got {soft_cap}")
    if tiles is None:
        both = (tile_of(geometry, "decode"), tile_of(geometry, "prefill"))
        tiles = tuple(tile for tile in both if tile is not None)
    for tile in tiles:
        _check_memory(geometry, tile)


def _check_memory(geometry: Geometry, tile: Tile) -> None:
    chip, slots = current_chip(), geometry.num_decode_slots
    num_seqs = slots if tile.variant == "decode" else geometry.num_seqs - slots
    table = 4 * num_seqs * geometry.pages_per_seq
    if table > chip.smem_budget:
        raise ValueError(
            f"page table: {num_seqs} {tile.variant} sequences x {geometry.pages_per_seq} pages x 4 bytes = {table} "
            f"bytes of scalar memory, but it may take {chip.smem_budget} of {chip.smem_bytes} on {chip.generation}; "
            f"use larger pages (now {geometry.page_size} keys), a shorter context or fewer sequences a step"
        )
    work = 4 * 5 * (tile.max_tiles(geometry.num_tokens - slots, num_seqs) + 1)
    if work > chip.smem_budget // 2:
        raise ValueError(
            f"work list: {work} bytes of scalar memory for {geometry.num_tokens} tokens of {num_seqs} sequences, but "
            f"it may take {chip.smem_budget // 2} on {chip.generation}; use fewer tokens a step"
        )
    if tile.vmem_bytes > chip.vmem_budget:
        raise ValueError(
            f"block sizes: the {tile.variant} kernel needs about {tile.vmem_bytes >> 20} MiB of VMEM for "
            f"{geometry.num_q_heads} heads of {geometry.head_dim}, but may take {chip.vmem_budget >> 20} MiB on "
            f"{chip.generation}; put smaller blocks into block_sizes.json, or split the heads over a mesh"
        )
