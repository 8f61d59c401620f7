"""Weights onto a mesh: from a checkpoint, or random ones. One tensor at a time, each straight to its sharding."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from preble_jax.model.config import ModelConfig
from preble_jax.model.packed import PackedMatrix, pack_matrix
from preble_jax.model.packed_int8 import pack_int8_matrix
from preble_jax.model.params import Array, Initializer, ParamSpec, param_table, spec_for
from preble_jax.model.quantize import Weight, check_weight_format, has_int8_activations, quantize
from preble_jax.model.weights import Checkpoint
from preble_jax.progress import NullProgress, Progress

Params = dict[str, Weight]

# Orbax takes 20 ms to begin reading, whatever the number of parameters.
_MAX_GROUP_BYTES = 32 << 20


@runtime_checkable
class ShardedCheckpoint(Protocol):
    """A checkpoint that can place each shard itself, without the whole tensor on the host (Orbax)."""

    def restore(self, specs: Sequence[ParamSpec], targets: Sequence[jax.ShapeDtypeStruct]) -> dict[str, jax.Array]: ...


def load_params(
    checkpoint: Checkpoint,
    mesh: Mesh | None,
    dtype: Any,
    progress: Progress | None = None,
    weight_format: str = "native",
    *,
    packed: bool = False,
) -> Params:
    """All parameters of `checkpoint`, by path, placed as the parameter table says.

    mesh: None puts everything on the default device. dtype: what the engine computes in; norms stay float32.
    weight_format: one of `quantize.WEIGHT_FORMATS`; matrices are made int8 as soon as they are read.
    packed: matrices are laid out for the CPU's kernels as soon as they are read (`packed.can_pack` says where).
    One tensor is on the host at a time, the largest first: what its reading takes besides is then taken while little
    else is there. Raises CheckpointError for a missing tensor or one of the wrong shape, ValueError for a weight format
    that does not exist.
    """
    check_weight_format(weight_format)
    specs = param_table(checkpoint.model_config)
    with (progress or NullProgress()).task("reading weights", total=len(specs)) as task:
        if isinstance(checkpoint, ShardedCheckpoint) and weight_format == "native" and not packed:
            restored = checkpoint.restore(specs, [abstract_param(spec, mesh, dtype) for spec in specs])
            task.advance(len(specs))
            return dict(restored)
        params: Params = {}
        for group in _groups(specs, _MAX_GROUP_BYTES if isinstance(checkpoint, ShardedCheckpoint) else 0):
            for spec, host in zip(group, _read(checkpoint, group, mesh, dtype), strict=True):
                param = _placed(spec, host, mesh, dtype, weight_format, packed=packed)
                params[spec.path] = jax.block_until_ready(param)
                del host  # before the next one is read
                task.advance()
        return {spec.path: params[spec.path] for spec in specs}


def random_params(
    config: ModelConfig,
    seed: int,
    dtype: Any,
    mesh: Mesh | None = None,
    weight_format: str = "native",
    *,
    packed: bool = False,
) -> Params:
    """Freshly initialised parameters; the same values for the same seed, whatever the mesh.

    Raises ValueError for a weight format that does not exist.
    """
    check_weight_format(weight_format)
    key = jax.random.key(seed)
    params: Params = {}
    for spec in param_table(config):
        init = _jitted(spec.init, param_sharding(spec, mesh))
        param_key = jax.random.fold_in(key, np.uint32(zlib.crc32(spec.path.encode())))
        param = init(param_key, spec.shape, spec.dtype(dtype))
        if weight_format != "native" or packed:
            params[spec.path] = _placed(spec, np.asarray(param), mesh, dtype, weight_format, packed=packed)
        else:
            params[spec.path] = param
    return params


def _groups(specs: Sequence[ParamSpec], max_bytes: int) -> Iterator[list[ParamSpec]]:
    """Largest first, together as long as they take no more than `max_bytes` in float32."""
    group: list[ParamSpec] = []
    for spec in sorted(specs, key=lambda spec: -prod(spec.shape)):
        if group and 4 * sum(prod(s.shape) for s in [*group, spec]) > max_bytes:
            yield group
            group = []
        group.append(spec)
    yield group


def _read(checkpoint: Checkpoint, group: Sequence[ParamSpec], mesh: Mesh | None, dtype: Any) -> Iterator[Array]:
    """These parameters on the host, one after the other."""
    if isinstance(checkpoint, ShardedCheckpoint):
        restored = checkpoint.restore(group, [abstract_param(spec, mesh, dtype) for spec in group])
        yield from (np.asarray(restored.pop(spec.path)) for spec in group)
        return
    yield from (checkpoint.read(spec, spec.dtype(dtype)) for spec in group)


def _placed(spec: ParamSpec, host: Array, mesh: Mesh | None, dtype: Any, weight_format: str, *, packed: bool) -> Weight:
    """A parameter in its format, on its devices."""
    if (weight_format == "native" and not packed) or not spec.in_axes:
        param: Weight = jax.device_put(np.ascontiguousarray(host, dtype=spec.dtype(dtype)), param_sharding(spec, mesh))
        return param
    if weight_format == "native":
        return _put(pack_matrix(host, spec.in_axes, interleaved=spec.gated), spec, mesh)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    matrix = quantize(host, spec.in_axes, dtype, int8_activations=has_int8_activations(device.platform))
    if packed:
        return _put(pack_int8_matrix(matrix, interleaved=spec.gated), spec, mesh)
    out_axes = [axis for axis in range(len(spec.shape)) if axis not in spec.in_axes]
    return replace(
        matrix,
        values=jax.device_put(matrix.values, _axes_sharding(spec, [*out_axes, *spec.in_axes], mesh)),
        scales=jax.device_put(matrix.scales, _axes_sharding(spec, out_axes, mesh)),
    )


def _put(matrix: PackedMatrix, spec: ParamSpec, mesh: Mesh | None) -> PackedMatrix:
    return replace(matrix, panels=jax.device_put(matrix.panels, _axes_sharding(spec, [], mesh)))


def param_sharding(spec: ParamSpec, mesh: Mesh | None) -> Sharding:
    """Where a parameter's shards lie."""
    return _axes_sharding(spec, range(len(spec.shape)), mesh)


def _axes_sharding(spec: ParamSpec, axes: Sequence[int], mesh: Mesh | None) -> Sharding:
    """That of an array which has these of the parameter's axes, in this order."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    split = spec_for([spec.axes[axis] for axis in axes], [spec.shape[axis] for axis in axes], mesh.shape)
    return NamedSharding(mesh, split)


def abstract_param(spec: ParamSpec, mesh: Mesh | None, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a parameter, without its values."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype(dtype), sharding=param_sharding(spec, mesh))


@lru_cache(maxsize=64)  # layers share their shapes and shardings: compile once for all of them
def _jitted(init: Initializer, sharding: Sharding) -> Initializer:
    return jax.jit(init, static_argnums=(1, 2), out_shardings=sharding)
