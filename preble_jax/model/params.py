"""The parameter table: for every weight its shape, logical axes, initialiser, and names in each checkpoint format.

One table drives initialisation, sharding, reading and writing. Letters: V vocabulary, E hidden size, K key/value heads,
G query heads per key/value head, D head size, F intermediate size. All matrices are laid out [in..., out...], so that
a layer is `x @ w`; checkpoints store [out, in], and `pack` turns (and fuses) one into the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from preble_jax.model.config import ModelConfig

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

LOGICAL_RULES: Mapping[str, str | None] = {"vocab": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": None}
"""Logical axis -> mesh axis. None: never split."""

_INIT_STDDEV = 0.02  # Llama's `initializer_range`


@dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter.

    path:          its name in the dict of parameters, e.g. "layers.3.qkv".
    axes:          logical axis of each dimension, None for one that is never split.
    init:          (key, shape, dtype) -> array, for random weights.
    hf, gguf:      names of the tensors it is packed from, in order.
    source_shapes: shapes of those tensors, [out, in], the same in both formats.
    pack, unpack:  source tensors -> this parameter, and back (exact inverses; neither computes, both only move).
    in_axes:       those that a product with it sums over (an embedding's, where it is the output matrix too); none
                   where it is no matrix.
    keep_float32:  stays float32 whatever the engine's dtype (norm weights).
    gated:         its output's first axis has a gate and what the gate is for (SwiGLU).
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initializer
    hf: tuple[str, ...]
    gguf: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    pack: Callable[[ModelConfig, Sequence[Array]], Array]
    unpack: Callable[[ModelConfig, Array], tuple[Array, ...]]
    in_axes: tuple[int, ...]
    keep_float32: bool = False
    gated: bool = False

    def dtype(self, engine_dtype: Any) -> np.dtype[Any]:
        """The dtype it is kept in by an engine that computes in `engine_dtype`."""
        dtype: np.dtype[Any] = jnp.dtype(jnp.float32 if self.keep_float32 else engine_dtype)
        return dtype


def param_table(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the model, in the order a forward pass meets them."""
    vocab, embed = config.vocab_size, config.hidden_size
    specs = [
        ParamSpec(
            path="embedding",
            shape=(vocab, embed),
            axes=("vocab", "embed"),
            init=_normal,
            hf=("model.embed_tokens.weight",),
            gguf=("token_embd.weight",),
            source_shapes=((vocab, embed),),
            pack=_first,
            unpack=_alone,
            in_axes=(1,),
        )
    ]
    for i in range(config.num_layers):
        specs += _attention_specs(config, i)
        specs += _mlp_specs(config, i)
    specs.append(_norm_spec(config, "final_norm", "model.norm.weight", "output_norm.weight"))
    if not config.tie_embeddings:
        specs.append(_matrix_spec("lm_head", (embed, vocab), ("embed", "vocab"), "lm_head.weight", "output.weight"))
    return tuple(specs)


def spec_for(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """How an array with these logical axes is split over a mesh of this shape.

    A dimension is split only where the mesh has the axis its rule names and the axis divides it; otherwise every
    device holds all of it (said once in the log, because it costs memory).
    """
    return PartitionSpec(*(_mesh_axis(axis, size, mesh_shape) for axis, size in zip(axes, shape, strict=True)))


def _mesh_axis(axis: str | None, size: int, mesh_shape: Mapping[str, int]) -> str | None:
    mesh_axis = LOGICAL_RULES[axis] if axis is not None else None
    if axis is None or mesh_axis is None or mesh_shape.get(mesh_axis, 1) == 1:
        return None
    if size % mesh_shape[mesh_axis]:
        _log_replicated(axis, size, mesh_axis, mesh_shape[mesh_axis])
        return None
    return mesh_axis


@lru_cache(maxsize=256)  # the cache is what makes it once per kind of axis and not once per layer
def _log_replicated(axis: str, size: int, mesh_axis: str, num_devices: int) -> None:
    logger.warning(
        "axis %r of size %d does not divide over %d devices of mesh axis %r: every device keeps all of it",
        axis,
        size,
        num_devices,
        mesh_axis,
    )


def _attention_specs(config: ModelConfig, i: int) -> list[ParamSpec]:
    embed, kv_heads, head_dim = config.hidden_size, config.num_kv_heads, config.head_dim
    groups = config.num_query_groups
    layer, block = f"model.layers.{i}", f"blk.{i}"
    num_q, num_kv = config.num_heads * head_dim, kv_heads * head_dim
    return [
        _norm_spec(
            config, f"layers.{i}.attention_norm", f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight"
        ),
        ParamSpec(
            path=f"layers.{i}.qkv",
            shape=(embed, kv_heads, (groups + 2) * head_dim),
            axes=("embed", "kv_heads", None),
            init=_normal,
            hf=tuple(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"),
            gguf=tuple(f"{block}.attn_{name}.weight" for name in "qkv"),
            source_shapes=((num_q, embed), (num_kv, embed), (num_kv, embed)),
            pack=_pack_qkv,
            unpack=_unpack_qkv,
            in_axes=(0,),
        ),
        ParamSpec(
            path=f"layers.{i}.out",
            shape=(kv_heads, groups, head_dim, embed),
            axes=("kv_heads", None, None, "embed"),
            init=_normal,
            hf=(f"{layer}.self_attn.o_proj.weight",),
            gguf=(f"{block}.attn_output.weight",),
            source_shapes=((embed, num_q),),
            pack=_pack_out,
            unpack=_unpack_out,
            in_axes=(0, 1, 2),
        ),
    ]


def _mlp_specs(config: ModelConfig, i: int) -> list[ParamSpec]:
    embed, mlp = config.hidden_size, config.intermediate_size
    layer, block = f"model.layers.{i}", f"blk.{i}"
    return [
        _norm_spec(
            config, f"layers.{i}.mlp_norm", f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.weight"
        ),
        ParamSpec(
            path=f"layers.{i}.gate_up",
            shape=(embed, 2, mlp),
            axes=("embed", None, "mlp"),
            init=_normal,
            hf=(f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
            gguf=(f"{block}.ffn_gate.weight", f"{block}.ffn_up.weight"),
            source_shapes=((mlp, embed), (mlp, embed)),
            pack=_pack_gate_up,
            unpack=_unpack_gate_up,
            in_axes=(0,),
            gated=True,
        ),
        _matrix_spec(
            f"layers.{i}.down",
            (mlp, embed),
            ("mlp", "embed"),
            f"{layer}.mlp.down_proj.weight",
            f"{block}.ffn_down.weight",
        ),
    ]


def _norm_spec(config: ModelConfig, path: str, hf: str, gguf: str) -> ParamSpec:
    shape = (config.hidden_size,)
    return ParamSpec(
        path=path,
        shape=shape,
        axes=(None,),
        init=_ones,
        hf=(hf,),
        gguf=(gguf,),
        source_shapes=(shape,),
        pack=_first,
        unpack=_alone,
        in_axes=(),
        keep_float32=True,
    )


def _matrix_spec(path: str, shape: tuple[int, int], axes: tuple[str | None, ...], hf: str, gguf: str) -> ParamSpec:
    """A plain matrix, [in, out] here and [out, in] in checkpoints."""
    return ParamSpec(
        path=path,
        shape=shape,
        axes=axes,
        init=_normal,
        hf=(hf,),
        gguf=(gguf,),
        source_shapes=((shape[1], shape[0]),),
        pack=_pack_transposed,
        unpack=_unpack_transposed,
        in_axes=(0,),
    )


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.float32) * _INIT_STDDEV).astype(dtype)


def _ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    del key
    return jnp.ones(shape, dtype)


def _first(config: ModelConfig, sources: Sequence[Array]) -> Array:
    return sources[0]


def _alone(config: ModelConfig, param: Array) -> tuple[Array, ...]:
    return (param,)


def _pack_transposed(config: ModelConfig, sources: Sequence[Array]) -> Array:
    return sources[0].T


def _unpack_transposed(config: ModelConfig, param: Array) -> tuple[Array, ...]:
    return (param.T,)


def _pack_qkv(config: ModelConfig, sources: Sequence[Array]) -> Array:
    """q [K*G*D, E], k [K*D, E], v [K*D, E] -> [E, K, (G+2)*D]: a key/value head beside the queries that read it.

    Its columns: the first halves of its G queries and its key, their second halves in the same order, its value. Halves
    that rotary embedding turns against each other are then two long runs, not alternating short ones.
    """
    kv_heads, head_dim, embed = config.num_kv_heads, config.head_dim, config.hidden_size
    q, k, v = (w.reshape(kv_heads, -1, head_dim, embed) for w in sources)
    turned = np.concatenate([q, k], axis=1).reshape(kv_heads, -1, 2, head_dim // 2, embed)
    turned = turned.transpose(0, 2, 1, 3, 4).reshape(kv_heads, -1, embed)
    return np.concatenate([turned, v[:, 0]], axis=1).transpose(2, 0, 1)


def _unpack_qkv(config: ModelConfig, param: Array) -> tuple[Array, ...]:
    kv_heads, head_dim, embed = config.num_kv_heads, config.head_dim, config.hidden_size
    columns = param.transpose(1, 2, 0)  # [K, (G+2)*D, E]
    turned = columns[:, :-head_dim].reshape(kv_heads, 2, -1, head_dim // 2, embed)
    turned = turned.transpose(0, 2, 1, 3, 4).reshape(kv_heads, -1, head_dim, embed)
    parts = (turned[:, :-1], turned[:, -1:], columns[:, -head_dim:])
    return tuple(part.reshape(-1, embed) for part in parts)


def _pack_out(config: ModelConfig, sources: Sequence[Array]) -> Array:
    """[E, K*G*D] -> [K, G, D, E]."""
    return sources[0].T.reshape(config.num_kv_heads, config.num_query_groups, config.head_dim, config.hidden_size)


def _unpack_out(config: ModelConfig, param: Array) -> tuple[Array, ...]:
    return (param.reshape(-1, config.hidden_size).T,)


def _pack_gate_up(config: ModelConfig, sources: Sequence[Array]) -> Array:
    """gate [F, E], up [F, E] -> [E, 2, F]."""
    return np.stack([w.T for w in sources], axis=1)


def _unpack_gate_up(config: ModelConfig, param: Array) -> tuple[Array, ...]:
    return (param[:, 0].T, param[:, 1].T)
