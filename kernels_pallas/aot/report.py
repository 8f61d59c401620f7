"""What the TPU compiler says of a program: VMEM of its kernels, HBM, whole arrays copied.

XLA gives HBM and costs as numbers; VMEM and copies are read from the optimised program, which notes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True, kw_only=True)
class KernelMemory:
    """VMEM of one Pallas kernel: what its blocks, scratch and spilled registers take, and what it may take."""

    name: str
    vmem_used_bytes: int
    vmem_limit_bytes: int


@dataclass(frozen=True, kw_only=True)
class ArrayCopy:
    """An array that the program copies as a whole, such as "bf16[1024,8,2,64,128]"."""

    array: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CompileReport:
    """What the compiler said, for one device of the program.

    Arguments, outputs and temporaries lie in HBM; aliased bytes are outputs that are arguments updated in place.
    flops and optimal_s: of XLA's cost model, None where it has no number. It leaves out kernels that carry no estimate
    of their own, so for a program that is mostly kernels optimal_s is the time of the rest.
    """

    generation: str
    topology: str
    num_devices: int
    kernels: tuple[KernelMemory, ...]
    copies: tuple[ArrayCopy, ...]
    vmem_capacity_bytes: int
    hbm_capacity_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    flops: float | None
    optimal_s: float | None
    lower_s: float
    compile_s: float

    @property
    def vmem_used_bytes(self) -> int:
        """Of the largest kernel: they run one after the other."""
        return max((kernel.vmem_used_bytes for kernel in self.kernels), default=0)

    @property
    def largest_copy_bytes(self) -> int:
        return max((copy.num_bytes for copy in self.copies), default=0)


_NAME = re.compile(r'op_name="([^"]*)"')
_USED = re.compile(r'"used_scoped_memory_configs":(\[[^\]]*\])')
_LIMIT = re.compile(r'"scoped_memory_configs":(\[[^\]]*\])')
_VMEM = "1"  # memory space


def kernels_of(program: str) -> Iterator[KernelMemory]:
    """Pallas kernels of an optimised HLO program, from what the compiler noted beside each."""
    for line in program.splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name = _NAME.search(line)
            yield KernelMemory(
                name=name[1].removesuffix("/pallas_call").rpartition("/")[2] if name else "?",
                vmem_used_bytes=_vmem_bytes(_USED.search(line)),
                vmem_limit_bytes=_vmem_bytes(_LIMIT.search(line)),
            )


def _vmem_bytes(found: re.Match[str] | None) -> int:
    """Of a list such as [{"memory_space":"1","offset":"0","size":"4194304"}]."""
    entries = json.loads(found[1]) if found else []
    return sum(int(entry["size"]) for entry in entries if entry["memory_space"] == _VMEM)


_COPY = re.compile(r"= \(?(\w+)\[([\d,]+)\]\S*(?: .*?)? copy(?:-start)?\(")
_HLO_DTYPES = {
    "bf16": jnp.bfloat16,
    "f32": jnp.float32,
    "s8": jnp.int8,
    "f8e4m3fn": jnp.float8_e4m3fn,
    "s32": jnp.int32,
}


def copies_of(program: str) -> Iterator[ArrayCopy]:
    """Arrays that the program copies, to HBM or to a memory nearer the cores."""
    for line in program.splitlines():
        found = _COPY.search(line)
        if found:
            dtype, dims = found.groups()
            itemsize = jnp.dtype(_HLO_DTYPES.get(dtype, jnp.float32)).itemsize
            yield ArrayCopy(array=f"{dtype}[{dims}]", num_bytes=math.prod(map(int, dims.split(","))) * itemsize)
