"""The next token of each sequence, on the device.

A row's token depends on its logits, its settings, its seed and how many tokens it has made so far, and on nothing else
in the batch: the same prompt and seed give the same tokens whatever runs beside them.

top-k and top-p are thresholds on the logits, found by bisection over the bits of a float32: 32 halvings are exact, no
sort is needed, and k has no limit. Tokens that tie with the last one kept are kept too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HostOrDeviceArray = Any  # numpy where the host fills it in, jax.Array in the compiled step

_NEVER = -jnp.inf
_KEY_BITS = 32
_ARGMAX_BLOCK = 512


class SamplingArrays(NamedTuple):
    """Settings of R rows. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep everything.

    temperature, top_p, min_p [R] float32; top_k, num_made [R] int32 (tokens the request has made); seed [R] uint32.
    """

    temperature: HostOrDeviceArray
    top_k: HostOrDeviceArray
    top_p: HostOrDeviceArray
    min_p: HostOrDeviceArray
    seed: HostOrDeviceArray
    num_made: HostOrDeviceArray

    @classmethod
    def greedy(cls, rows: int) -> SamplingArrays:
        """Host arrays to be filled in row by row."""
        return cls(
            temperature=np.zeros(rows, np.float32),
            top_k=np.zeros(rows, np.int32),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seed=np.zeros(rows, np.uint32),
            num_made=np.zeros(rows, np.int32),
        )


class Scores(NamedTuple):
    """What the next tokens of R rows are chosen by.

    logits: gives them, [R, V] float32; they mean nothing where `wants_logits` is false. best [R] int32: the first of
    the greatest. greatest, log_sum [R] float32: of the logits, and of e to their power.
    """

    logits: Callable[[], jax.Array]
    best: jax.Array
    greatest: jax.Array
    log_sum: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> Scores:
        best = _argmax(logits)
        return cls(lambda: logits, best, _chosen(logits, best), jax.nn.logsumexp(logits, axis=-1))


def wants_logits(settings: SamplingArrays) -> jax.Array:
    """Whether any row draws its token: bool []."""
    return jnp.any(settings.temperature > 0.0)


def sample(scores: Scores, settings: SamplingArrays) -> tuple[jax.Array, jax.Array]:
    """Token ids [R] int32 and their log-probabilities [R] (natural, before temperature)."""

    def draw() -> tuple[jax.Array, jax.Array]:
        logits = scores.logits()
        tokens = _sample_random(logits, settings, scores.best)
        return tokens, _chosen(logits, tokens)

    tokens, chosen = jax.lax.cond(wants_logits(settings), draw, lambda: (scores.best, scores.greatest))
    return tokens, chosen - scores.log_sum


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]


def _argmax(x: jax.Array) -> jax.Array:
    """x [R, V] -> the first index of each row's maximum, int32.

    Block by block: XLA's argmax walks a row value by value on the CPU, its plain maximum does not (5 times as fast).
    """
    rows, vocab = x.shape
    padded = jnp.pad(x, ((0, 0), (0, -vocab % _ARGMAX_BLOCK)), constant_values=_NEVER)
    blocks = padded.reshape(rows, -1, _ARGMAX_BLOCK)
    best = jnp.argmax(blocks.max(axis=-1), axis=-1)
    within = jnp.argmax(jnp.take_along_axis(blocks, best[:, None, None], axis=1)[:, 0], axis=-1)
    return (best * _ARGMAX_BLOCK + within).astype(jnp.int32)


def _sample_random(logits: jax.Array, settings: SamplingArrays, greedy: jax.Array) -> jax.Array:
    random = settings.temperature > 0.0
    scaled = logits / jnp.where(random, settings.temperature, 1.0)[:, None]
    limited = (settings.top_k > 0) | (settings.top_p < 1.0) | (settings.min_p > 0.0)
    scaled = jax.lax.cond(jnp.any(limited & random), lambda: _keep_likely(scaled, settings), lambda: scaled)

    def noise(seed: jax.Array, num_made: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), num_made), (logits.shape[1],), jnp.float32)

    drawn = _argmax(scaled + jax.vmap(noise)(settings.seed, settings.num_made))
    return jnp.where(random, drawn, greedy)


def _keep_likely(scaled: jax.Array, settings: SamplingArrays) -> jax.Array:
    """Applies top-k, then top-p to what is left (renormalised), then min-p; dropped tokens become -inf."""
    vocab = scaled.shape[1]
    top_k = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, vocab), vocab)
    keys = _sortable(scaled)
    kept = keys >= _threshold(keys, jnp.ones_like(scaled), top_k.astype(jnp.float32))[:, None]
    weights = jnp.where(kept, jnp.exp(scaled - scaled.max(axis=-1, keepdims=True)), 0.0)
    nucleus = keys >= _threshold(keys, weights, settings.top_p * weights.sum(axis=-1))[:, None]
    kept &= nucleus | (settings.top_p >= 1.0)[:, None]
    kept &= weights >= settings.min_p[:, None]  # weights are relative to the most likely token
    return jnp.where(kept, scaled, _NEVER)


def _sortable(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is no less than 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _threshold(keys: jax.Array, weights: jax.Array, wanted: jax.Array) -> jax.Array:
    """The greatest key per row such that the tokens at or above it weigh at least `wanted` [R]."""

    def add_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        tried = found | (jnp.uint32(1) << (_KEY_BITS - 1 - i).astype(jnp.uint32))
        weight = jnp.where(keys >= tried[:, None], weights, 0.0).sum(axis=-1)
        return jnp.where(weight >= wanted, tried, found)

    found: jax.Array = jax.lax.fori_loop(0, _KEY_BITS, add_bit, jnp.zeros(keys.shape[0], jnp.uint32))
    return found
