"""Which CPU cores each device group gets, so that groups on one machine do not fight over all of them."""

from __future__ import annotations

import os
from pathlib import Path

from preble_jax.errors import ConfigError

# Device files that appear only where the chip and its driver are.
_ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "accel/accel[0-9]*", "vfio/[0-9]*", "kfd")


def pin_to_cores(cores: tuple[int, ...]) -> None:
    """Confines this process and its threads to come. Must run before JAX is imported, which sizes its pools by it."""
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        allowed = sorted(os.sched_getaffinity(0))
        raise ConfigError(f"--cores: expected some of {allowed}, got {sorted(cores)}") from error


def cores_by_group(num_groups: int) -> list[tuple[int, ...]] | None:
    """This process's cores in equal shares; None when there is nothing to share out: fewer cores than groups, an
    accelerator that does the work, or a system that cannot pin."""
    if not hasattr(os, "sched_getaffinity") or has_accelerator():
        return None
    return split_cores(sorted(os.sched_getaffinity(0)), num_groups)


def split_cores(cores: list[int], num_groups: int) -> list[tuple[int, ...]] | None:
    """Neighbouring cores stay together; what cannot be divided is left to the other processes."""
    share = len(cores) // num_groups
    if share == 0:
        return None
    return [tuple(cores[i * share : (i + 1) * share]) for i in range(num_groups)]


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether a GPU or TPU is present, without importing JAX."""
    return any(True for pattern in _ACCELERATORS for _ in devices.glob(pattern))
