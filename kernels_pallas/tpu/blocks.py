"""How much the attention kernel works on at a time, as data per TPU generation, and what that costs in VMEM.

`block_sizes.json` holds one entry for each (generation, variant, head_dim, page dtype); `search.py` proposes them. No
size is guessed at run time: a generation without entries of its own takes the cautious ones of "other".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.geometry import Geometry

Variant = Literal["decode", "prefill"]

LANES = 128
_DATA = "block_sizes.json"
_HEADS = 8
# Mosaic spills vector registers, and XLA keeps some VMEM to itself.
_VMEM_FRACTION = 0.85


@dataclass(frozen=True, kw_only=True)
class BlockSizes:
    """Sizes of one variant of the kernel.

    rows: query rows (tokens x query heads of a key head) of a tile; decode has one token a tile, whatever this says.
    keys: keys of a block, fetched together and multiplied together; whole pages.
    buffers: blocks that are on their way or in use at once; 2 is plain double buffering.
    heads: key heads whose scores go through the softmax as one array.
    """

    rows: int
    keys: int
    buffers: int
    heads: int

    def __post_init__(self) -> None:
        if min(self.rows, self.keys, self.heads) < 1 or self.buffers < 2:
            raise ValueError(f"block sizes: expected positive numbers and at least 2 buffers, got {self}")


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What the kernel needs to know of a TensorCore. Bytes."""

    generation: str
    vmem_bytes: int
    smem_bytes: int

    @property
    def vmem_budget(self) -> int:
        """Bytes that the kernel may ask for."""
        return int(self.vmem_bytes * _VMEM_FRACTION)

    @property
    def smem_budget(self) -> int:
        """Bytes of SMEM that a page table may take: the rest is for work lists and the compiler."""
        return self.smem_bytes // 2


# The interpreter has no chip. Its sizes are small, so that small tests have several blocks and tiles.
_INTERPRETER = Chip(generation="interpret", vmem_bytes=128 * 2**20, smem_bytes=2**20)


def current_chip() -> Chip:
    """The TPU that is being compiled for (an abstract mesh's device, or the default one), or the interpreter's."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # not a TPU: the interpreter
        return _INTERPRETER
    return Chip(
        generation=str(info.chip_version), vmem_bytes=info.vmem_capacity_bytes, smem_bytes=info.smem_capacity_bytes
    )


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    data: dict[str, dict[str, dict[str, dict[str, list[int]]]]] = json.loads(
        resources.files(__package__).joinpath(_DATA).read_text()
    )["blocks"]
    return data


def choose(geometry: Geometry, variant: Variant, chip: Chip) -> BlockSizes:
    """The block sizes for this call.

    Entries are for up to `_HEADS` key heads a device. With more of them a tile (prefill) or a block (decode) takes as
    many times more memory, and has as many times fewer rows or keys.
    """
    table = _table()
    of_variant = table.get(chip.generation, table["other"])[variant]
    entries = of_variant.get(str(geometry.head_dim), of_variant["128"])
    rows, keys, buffers, heads = entries.get(str(geometry.page_dtype), entries["bfloat16"])
    times = 1 << max(0, -(-geometry.num_kv_heads // _HEADS) - 1).bit_length()
    if variant == "decode":
        keys = max(min(keys, LANES), keys // times)
    else:
        rows = max(1, rows // times)
    return BlockSizes(rows=rows, keys=keys, buffers=buffers, heads=heads)


def interpret_params(interpret: bool | pltpu.InterpretParams) -> Any:
    """What `pallas_call` is to be told: True stands for the TPU interpreter with every check on.

    Raises ValueError where the kernel is to be compiled, but not for a TPU that JAX knows.
    """
    if interpret is False and current_chip() is _INTERPRETER:
        raise ValueError("the TPU kernel: expected a TPU that JAX knows, got another device; use jnp or tpu-interpret")
    return pltpu.InterpretParams(detect_races=True) if interpret is True else interpret
