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


def merge_rows(
    own_out: jax.Array, own_lse: jax.Array, out: jax.Array, lse: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """own_out [T, H, D] and own_lse [T, H] with parts merged in that are among out [N, H, D] and lse [N, H].

    rows [t, L] int32: where the parts of each of the first t tokens are; N where it has none.
    """
    by_level = rows.T
    num_tokens = by_level.shape[1]
    outs = jnp.concatenate([own_out[None, :num_tokens], out.at[by_level].get(mode="fill", fill_value=0.0)])
    lses = jnp.concatenate([own_lse[None, :num_tokens], lse.at[by_level].get(mode="fill", fill_value=-jnp.inf)])
    merged_out, merged_lse = merge(outs, lses)
    return own_out.at[:num_tokens].set(merged_out), own_lse.at[:num_tokens].set(merged_lse)
