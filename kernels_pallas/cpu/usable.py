"""Whether these kernels can be compiled and called here."""

from __future__ import annotations

import logging
import sys
from functools import cache

from kernels_pallas.cpu.ffi import api_version
from kernels_pallas.cpu.jit import host_features

logger = logging.getLogger(__name__)

_API_MAJOR, _API_MINOR = 0, 1  # of the structures' layout; later minor versions only add to it


@cache
def usable() -> bool:
    """Asked of the process's own processor. Why not is said once, in the log."""
    reason = _obstacle()
    if reason is not None:
        logger.warning("kernels for the CPU: %s; XLA's own operations are used, which is slower", reason)
    return reason is None


@cache
def has_wide_registers() -> bool:
    """32 registers of 16 float32 numbers, which a tile of a matrix product fills."""
    return "avx512f" in host_features()


def _obstacle() -> str | None:
    try:
        host_features()
    except ImportError:
        return "llvmlite is not installed"
    if sys.maxsize < 1 << 32:
        return "made for processors with addresses of 64 bits"
    major, minor = api_version()
    if major != _API_MAJOR or minor < _API_MINOR:
        return f"made for version {_API_MAJOR}.{_API_MINOR} of XLA's FFI, found {major}.{minor}"
    return None
