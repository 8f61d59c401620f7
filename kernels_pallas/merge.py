"""Merging parts of one attention by their log-sum-exp: exact, whatever keys the parts had, as long as none is in two.

With out_i the softmax-weighted values over the keys of part i and lse_i the logarithm of its sum of exp(scores), all
keys together have lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) * out_i.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """outs [n, ..., D], lses [n, ...], float32, -inf for a part without keys -> out [..., D], lse [...]."""
    peak = jnp.max(lses, axis=0)
    seen = peak > -jnp.inf
    weights = jnp.exp(lses - jnp.where(seen, peak, 0.0)[None])  # [n, ...]; exp(-inf) is 0
    total = jnp.where(seen, weights.sum(axis=0), 1.0)
    out = (weights[..., None] * outs).sum(axis=0) / total[..., None]
    return out, jnp.where(seen, peak + jnp.log(total), -jnp.inf)
