"""Kernels as functions of JAX arrays: written and compiled when they are first traced, once for each description."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Protocol

import jax

from kernels_pallas.cpu.ffi import register, write_handler
from kernels_pallas.cpu.ir import Function, Module, Value
from kernels_pallas.cpu.jit import compile_function, host_features


class Kernel(Protocol):
    """What is fixed when a kernel is compiled: a frozen dataclass, whose `repr` says all of it.

    name: what it is called in a profile. num_args, num_results: arrays.
    """

    @property
    def name(self) -> str: ...
    @property
    def num_args(self) -> int: ...
    @property
    def num_results(self) -> int: ...
    def __hash__(self) -> int: ...

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        """i64: how many items of work there are. buffers: pointers to the arguments, then to the results."""
        ...

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        """One item's work; items run in any order, at the same time."""
        ...


def call_kernel(
    kernel: Kernel,
    args: Sequence[jax.Array],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """aliases: number of an argument -> number of the result that takes its memory."""
    return list(jax.ffi.ffi_call(_target(kernel), list(results), input_output_aliases=aliases)(*args))


_compiling = Lock()


def _target(kernel: Kernel) -> str:
    """The name that XLA knows the kernel by."""
    with _compiling:  # steps are traced on several threads, and a name can be registered once
        return _registered(kernel)


@cache
def _registered(kernel: Kernel) -> str:
    """The name is in compiled programs that outlive the process, so it changes with the kernel's source."""
    digest = hashlib.sha256(f"{_source()} {kernel!r}".encode()).hexdigest()[:16]
    name = f"preble.{kernel.name}.{digest}"
    module = Module(host_features())
    write_handler(module, name, kernel.num_args, kernel.num_results, kernel.write_item, kernel.count_items)
    register(name, compile_function(module, name))
    return name


@cache
def _source() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
