"""Whether this processor and this installation run the kernels, and run them well."""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path

from kernels_pallas.cpu import jit
from kernels_pallas.cpu.bf16 import DOT_FEATURE
from kernels_pallas.cpu.ffi import api_version
from kernels_pallas.cpu.int8_matmul import VNNI_FEATURE

logger = logging.getLogger(__name__)

_FFI_VERSIONS = range(1, 6)  # minor ones, of major 0, whose structures begin alike


@cache
def usable() -> bool:
    """True where products by the kernels are faster than XLA's: where one instruction multiplies 16 pairs of bfloat16.

    Why not is said once, in the log.
    """
    if not runnable():
        return False
    if DOT_FEATURE not in jit.host_features():
        logger.info("kernels for the CPU: the processor lacks %s; matrix products are XLA's", DOT_FEATURE)
        return False
    return True


@cache
def runnable() -> bool:
    """True where the kernels can be compiled and called; they are right on every processor. Why not is said once."""
    obstacle = _obstacle()
    if obstacle is not None:
        logger.info("kernels for the CPU: %s; XLA's own operations are used, which is slower", obstacle)
    return obstacle is None


@cache
def has_wide_registers() -> bool:
    """32 registers of 16 float32 numbers, which a tile of a matrix product fills."""
    return "avx512f" in jit.host_features()


@cache
def has_byte_dots() -> bool:
    """One instruction that multiplies 16 times 4 bytes."""
    return VNNI_FEATURE in jit.host_features()


def keep_code_in(folder: Path) -> None:
    """Where compiled kernels are kept for the next start."""
    if runnable():
        jit.keep_code_in(folder)


def _obstacle() -> str | None:
    try:
        jit.host_features()
    except ImportError as error:
        return f"llvmlite cannot be imported ({error})"
    if sys.maxsize < 1 << 32:
        return "made for processors with addresses of 64 bits"
    try:
        major, minor = api_version()
    except (OSError, KeyError) as error:
        return f"jaxlib's headers, which name the version of its FFI, cannot be read ({error})"
    if major != 0 or minor not in _FFI_VERSIONS:
        return f"made for versions 0.1 to 0.5 of XLA's FFI, found {major}.{minor}"
    return None
