"""Weights onto a mesh: from a checkpoint, or random ones. One tensor at a time, each straight to its sharding."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from preble_jax.model.config import ModelConfig
from preble_jax.model.params import Initializer, ParamSpec, param_table, spec_for
from preble_jax.model.weights import Checkpoint
from preble_jax.progress import NullProgress, Progress

Params = dict[str, jax.Array]


@runtime_checkable
class ShardedCheckpoint(Protocol):
    """A checkpoint that can place each shard itself, without the whole tensor on the host (Orbax)."""

    def restore(self, specs: Sequence[ParamSpec], targets: Sequence[jax.ShapeDtypeStruct]) -> Params: ...


def load_params(checkpoint: Checkpoint, mesh: Mesh | None, dtype: Any, progress: Progress | None = None) -> Params:
    """All parameters of `checkpoint`, by path, placed as the parameter table says.

    mesh: None puts everything on the default device. dtype: what the engine computes in; norms stay float32.
    One tensor is on the host at a time. Raises CheckpointError for a missing tensor or one of the wrong shape.
    """
    specs = param_table(checkpoint.model_config)
    with (progress or NullProgress()).task("reading weights", total=len(specs)) as task:
        if isinstance(checkpoint, ShardedCheckpoint):
            params = checkpoint.restore(specs, [abstract_param(spec, mesh, dtype) for spec in specs])
            task.advance(len(specs))
            return params
        params = {}
        for spec in specs:
            host = np.ascontiguousarray(checkpoint.read(spec), dtype=spec.dtype(dtype))
            # Waiting lets go of the host's copy before the next one is made.
            params[spec.path] = jax.block_until_ready(jax.device_put(host, param_sharding(spec, mesh)))
            task.advance()
        return params


def random_params(config: ModelConfig, seed: int, dtype: Any, mesh: Mesh | None = None) -> Params:
    """Freshly initialised parameters; the same values for the same seed, whatever the mesh."""
    key = jax.random.key(seed)
    params = {}
    for spec in param_table(config):
        init = _jitted(spec.init, param_sharding(spec, mesh))
        param_key = jax.random.fold_in(key, np.uint32(zlib.crc32(spec.path.encode())))
        params[spec.path] = init(param_key, spec.shape, spec.dtype(dtype))
    return params


def param_sharding(spec: ParamSpec, mesh: Mesh | None) -> Sharding:
    """Where a parameter's shards lie."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, spec_for(spec.axes, spec.shape, mesh.shape))


def abstract_param(spec: ParamSpec, mesh: Mesh | None, dtype: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a parameter, without its values."""
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype(dtype), sharding=param_sharding(spec, mesh))


@lru_cache(maxsize=64)  # layers share their shapes and shardings: compile once for all of them
def _jitted(init: Initializer, sharding: Sharding) -> Initializer:
    return jax.jit(init, static_argnums=(1, 2), out_shardings=sharding)
