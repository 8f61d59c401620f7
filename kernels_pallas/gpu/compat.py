"""What differs between JAX 0.10.2, 0.11.2 and 0.12 for the Hopper kernel. Nothing else asks for a version."""

from __future__ import annotations

import importlib
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu


def interpret_params() -> Any:
    """What makes `plgpu.kernel` run on the CPU, with NaN in memory nobody wrote. Public from 0.12 on."""
    params = getattr(plgpu, "InterpretGPUParams", None)
    if params is None:
        params = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.params").InterpretGPUParams
    return params(uninitialized_memory="nan")
