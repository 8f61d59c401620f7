"""Kernels for CPUs: written in Python, compiled by LLVM for the processor at hand, called by XLA through its FFI."""

from functools import cache
from importlib.util import find_spec


@cache
def usable() -> bool:
    """Whether there is an LLVM to compile them."""
    return find_spec("llvmlite") is not None
