"""Rotary position embedding in Hugging Face's rotate-half layout: component i turns with component i + head_dim / 2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from preble_jax.model.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians a position, [head_dim / 2] float32, after the model's scaling."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.asarray(1.0 / np.float32(config.rope_theta) ** exponents, np.float32)
    if isinstance(config.rope_scaling, LinearRopeScaling):
        frequencies = np.asarray(frequencies / config.rope_scaling.factor, np.float32)
    elif isinstance(config.rope_scaling, Llama3RopeScaling):
        frequencies = _scale_llama3(frequencies, config.rope_scaling)
    if config.rope_freq_factors is not None:
        frequencies = np.asarray(frequencies / np.asarray(config.rope_freq_factors, np.float32), np.float32)
    return np.asarray(frequencies, np.float32)


def _scale_llama3(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    """Source: the Llama 3.1 release; wavelengths longer than the original context are stretched, short ones kept."""
    turns = scaling.original_max_position * frequencies / (2 * math.pi)  # over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return np.asarray((1 - blend) * frequencies / scaling.factor + blend * frequencies)


def rotation(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin, [T, head_dim / 2] float32, for positions [T]. The same for all layers."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [T, ..., head_dim] turned by its token's angles; same dtype."""
    shape = (cos.shape[0], *(1,) * (x.ndim - 2), cos.shape[1])
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
