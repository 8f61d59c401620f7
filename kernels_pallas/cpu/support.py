"""Whether this processor and this installation run the kernels well."""

from __future__ import annotations

import logging
import struct
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

_FFI_VERSIONS = range(1, 6)  # minor ones, of major 0, whose structures begin alike


@cache
def usable() -> bool:
    """True where the kernels are the fast way. Why not is said once in the log.

    They are right on every processor, and fast where bfloat16 pairs are multiplied by one instruction on 16 lanes.
    """
    obstacle = _obstacle()
    if obstacle is not None:
        logger.info("CPU kernels: not used, %s; XLA's own code runs instead, which is slower", obstacle)
    return obstacle is None


def keep_code_in(folder: Path) -> None:
    """Where compiled kernels are kept for the next start; nothing where there are none."""
    if usable():
        from kernels_pallas.cpu import jit

        jit.keep_code_in(folder)


def _obstacle() -> str | None:
    if struct.calcsize("P") != 8:
        return "this Python is not a 64-bit one"
    try:
        from kernels_pallas.cpu.bf16 import DOT_FEATURE
        from kernels_pallas.cpu.ffi import api_version
        from kernels_pallas.cpu.jit import host_features
    except ImportError as error:
        return f"llvmlite cannot be imported ({error})"
    if DOT_FEATURE not in host_features():
        return f"the processor lacks {DOT_FEATURE}"
    major, minor = api_version()
    if major != 0 or minor not in _FFI_VERSIONS:
        return f"jaxlib's FFI is version {major}.{minor}, which is not known here"
    return None
