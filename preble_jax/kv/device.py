"""The device arrays behind the page pool: every layer's pages, and how many of them fit."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import PageLayout
from preble_jax.config import KVSettings
from preble_jax.errors import ConfigError
from preble_jax.host_memory import free_host_bytes

_GIB = 1 << 30
# Accelerators keep a tenth for the programs' intermediates. On the CPU the memory is everybody's, and the pages are
# cleared at start, at about half a second a GiB: beyond the ceiling a bigger pool has to be asked for.
_CPU_FRACTION, _CPU_CEILING = 0.5, 2 * _GIB
_ACCELERATOR_FRACTION = 0.9
# What is free differs from start to start, and every number of pages is another set of programs to compile. So many
# leading bits are kept of the bytes, the rest is left free: steps of 1, 1.5, 2, 3 ... on the CPU, of 1/64 elsewhere.
_CPU_BITS, _ACCELERATOR_BITS = 2, 7
_MOST_ROWS = (1 << 31) - 1  # of an array, each a token's key or value in one head: XLA counts them in 32 bits

log = logging.getLogger(__name__)


def sized_layout(
    settings: KVSettings,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    num_shards: int,
    max_tokens: int = 0,
    device: jax.Device | None = None,
    backend: str = "jnp",
) -> PageLayout:
    """One layer's layout with `settings.num_pages` pages, or as many as `settings.memory_gib` holds, or as many as fit
    into what is free on the device. Call it when the weights are there already.

    num_shards: devices over which key heads are split; the memory is that of one device.
    max_tokens: more than the running sequences can ever hold together is not taken from free memory; 0: no such limit.
    device: one of the mesh's; None: the first. Raises ConfigError for less than two pages, or than an accelerator has.
    """
    device = device or jax.local_devices()[0]
    layout = PageLayout(
        num_pages=1,
        page_size=settings.page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        backend=backend,
    )
    page_bytes = layout.page_bytes * num_layers // num_shards
    free = _free_bytes(device)
    if settings.num_pages:
        num_pages, reason = settings.num_pages, f"kv.num_pages={settings.num_pages}"
    elif settings.memory_gib == "auto":
        num_bytes, reason = _share_of_free(settings, device, free)
        num_pages = num_bytes // page_bytes
        max_pages = -(-max_tokens // settings.page_size)
        if 0 < max_pages < num_pages:
            num_pages, reason = max_pages, "all that the running sequences can ever hold"
    else:
        num_pages, reason = int(settings.memory_gib * _GIB) // page_bytes, f"kv.memory_gib={settings.memory_gib:g}"
    _check(num_pages, page_bytes, reason, free, device)
    log.info(
        "kv: %d pages of %d tokens in %.2f GiB (%s)%s",
        num_pages,
        settings.page_size,
        num_pages * page_bytes / _GIB,
        reason,
        f", {num_shards} such shares" if num_shards > 1 else "",
    )
    return replace(layout, num_pages=num_pages)


def pages_sharding(mesh: Mesh, heads: str | None) -> NamedSharding:
    """Of the arrays of `allocate_pages`. Key heads are split over mesh axis `heads` (None: every device holds all)."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * PageLayout.HEAD_AXIS, heads))


def allocate_pages(layout: PageLayout, num_layers: int, sharding: NamedSharding) -> tuple[jax.Array, ...]:
    """Zeroed pages, made where they stay: arrays with the pages of equally many layers each, one layer's after the
    other's.

    On the CPU one array has all layers, because each array that a step takes and gives back costs the host several
    microseconds at each dispatch. Accelerators have one for each layer: their kernels' offsets are of 32 bits, and
    what is free there need not be in one piece.
    """
    num_arrays = num_layers
    if sharding.mesh.devices.flat[0].platform == "cpu" and num_layers * math.prod(layout.shape[:-1]) <= _MOST_ROWS:
        num_arrays = 1
    shape = (num_layers // num_arrays * layout.num_pages, *layout.shape[1:])
    make = jax.jit(partial(jnp.zeros, shape, layout.storage_dtype), out_shardings=sharding)
    return tuple(make() for _ in range(num_arrays))


def leading_bits(number: int, num_bits: int) -> int:
    """The largest integer up to `number` whose binary form has zeros after its first `num_bits` digits."""
    shift = max(0, number.bit_length() - num_bits)
    return number >> shift << shift


def _free_bytes(device: jax.Device) -> int | None:
    """None where the platform does not say."""
    if device.platform == "cpu":
        return free_host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))


def _share_of_free(settings: KVSettings, device: jax.Device, free: int | None) -> tuple[int, str]:
    """Bytes for the pages, and how they came about."""
    on_cpu = device.platform == "cpu"
    if free is None:
        return _CPU_CEILING, f"nothing says what is free on {device.device_kind}; kv.memory_gib sets another size"
    if settings.memory_fraction == "auto":
        fraction, ceiling = (_CPU_FRACTION, _CPU_CEILING) if on_cpu else (_ACCELERATOR_FRACTION, free)
    else:
        fraction, ceiling = settings.memory_fraction, free
    if on_cpu:
        fraction /= max(1, settings.memory_sharers)
    num_bytes = leading_bits(int(fraction * free), _CPU_BITS if on_cpu else _ACCELERATOR_BITS)
    there = f"{fraction:.0%} of the {free / _GIB:.2f} GiB that are free"
    if num_bytes > ceiling:
        return ceiling, f"the most that is taken unasked; {there} would be more"
    return num_bytes, f"at most {there}"


def _check(num_pages: int, page_bytes: int, reason: str, free: int | None, device: jax.Device) -> None:
    there = "an unknown amount is" if free is None else f"{free / _GIB:.2f} GiB are"
    if num_pages < 2:
        raise ConfigError(
            f"kv: expected room for at least 2 pages of {page_bytes} bytes, got {num_pages} ({reason}; {there} free on "
            f"{device.device_kind}); raise kv.memory_gib or kv.num_pages, or free memory"
        )
    if free is None or num_pages * page_bytes <= free:
        return
    message = (
        f"kv: expected pages that fit into what is free, {free / _GIB:.2f} GiB on {device.device_kind}, got "
        f"{num_pages * page_bytes / _GIB:.2f} GiB ({reason}); lower kv.memory_gib or kv.num_pages"
    )
    if device.platform != "cpu":  # there it would be out of memory a moment later, in words nobody understands
        raise ConfigError(message)
    log.warning("%s", message)  # swap may still take it
