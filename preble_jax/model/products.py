"""Activations times weights, with what goes before and after: by XLA's operations, or the CPU's kernels for weights
that are packed for them.

Letters as in `decoder`. live [4] int32: the rows that are wanted, see `kernels_pallas.cpu.matmul`; XLA computes all.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from preble_jax.model.packed import PackedMatrix
from preble_jax.model.quantize import QuantizedMatrix, Weight
from preble_jax.model.sampling import Scores


class RMSNorm(nnx.Module):
    def __init__(self, weight: Any, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...][None, :]


def normed_matmul(x: jax.Array, norm: RMSNorm, w: Weight, live: jax.Array, in_axis: int = 0) -> jax.Array:
    """x [T, E] float32, w [E, out...] (or with E on another axis) -> [T, out...] float32."""
    if isinstance(w, PackedMatrix):
        return w.matmul(x, live, (norm.weight[...], norm.eps))
    return _matmul(norm(x), w, (in_axis,))


def normed_scores(
    x: jax.Array,
    norm: RMSNorm,
    w: Weight,
    live: jax.Array,
    wanted: jax.Array,
    everywhere: NamedSharding,
    in_axis: int = 0,
) -> Scores:
    """x [T, E] float32, w [E, V] (or [V, E]) -> of T rows. wanted []: whether the logits are. everywhere: on all
    devices of the mesh."""
    if isinstance(w, PackedMatrix):
        found = w.scores(x, live, (norm.weight[...], norm.eps), wanted)
        return Scores(lambda: found.values[:, : w.out_shape[0]], found.best, found.greatest, found.log_sum)
    logits = normed_matmul(x, norm, w, live, in_axis)
    return Scores.of(jax.lax.with_sharding_constraint(logits, everywhere))


def matmul_added(x: jax.Array, w: Weight, residual: jax.Array, live: jax.Array) -> jax.Array:
    """residual [T, E] float32 + x [T, in...] @ w [in..., E]."""
    if isinstance(w, PackedMatrix):
        return w.matmul_added(x, residual, live)
    return residual + _matmul(x, w, tuple(range(x.ndim - 1)))


def swiglu(x: jax.Array, norm: RMSNorm, gate_up: Weight, live: jax.Array) -> jax.Array:
    """x [T, E] float32, gate_up [E, 2, F] -> silu(gate) * up [T, F]."""
    if isinstance(gate_up, PackedMatrix):
        return gate_up.swiglu(x, (norm.weight[...], norm.eps), live)
    both = _matmul(norm(x), gate_up, (0,))
    return jax.nn.silu(both[:, 0]) * both[:, 1]


def embedding_rows(embedding: Weight, token_ids: jax.Array) -> jax.Array:
    """[V, E], [T] -> [T, E] float32."""
    if isinstance(embedding, QuantizedMatrix | PackedMatrix):
        return embedding.rows(token_ids)
    return embedding[token_ids].astype(jnp.float32)


def _matmul(x: jax.Array, w: jax.Array | QuantizedMatrix, in_axes: tuple[int, ...]) -> jax.Array:
    """Contracts x's last axes with these of w, [T, in...] @ [in..., out...] -> [T, out...] float32."""
    if isinstance(w, QuantizedMatrix):
        return w.matmul(x)
    axes = (tuple(range(x.ndim - len(in_axes), x.ndim)), in_axes)
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x.astype(w.dtype), w, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
