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


def rotation_table(config: ModelConfig, num_positions: int) -> np.ndarray:
    """[num_positions, head_dim] float32: a position's cosines, then its sines.

    A table, not arithmetic in the step: XLA on the CPU computes the angles anew, value by value, inside every layer's
    rotation (a twelfth of a prompt step), and an optimization barrier does not hold it back.
    """
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * inverse_frequencies(config)[None, :]
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def rotate(first: jax.Array, second: jax.Array, cos_sin: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Halves of heads, first and second [T, ..., D / 2], turned by cos_sin [T, D] -> [T, ..., D] in `dtype`."""
    half = (cos_sin.shape[0], *(1,) * (first.ndim - 2), cos_sin.shape[1] // 2)
    cos, sin = (part.reshape(half) for part in jnp.split(cos_sin, 2, axis=1))
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)
    return jnp.concatenate(turned, axis=-1)
