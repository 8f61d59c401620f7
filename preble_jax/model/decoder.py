"""The Llama-family decoder as Flax modules: one ragged step over paged keys and values.

Letters: T tokens of the step, S sequences, E hidden size, K key/value heads, G query heads a key head, D head size,
F intermediate size, V vocabulary. The residual stream is float32; matrix products take the weights' dtype and
accumulate in float32 (on the CPU a bfloat16 result would cost 2-4 times as much).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import paged_attention, resolve_backend, write_kv
from preble_jax.model.config import ModelConfig
from preble_jax.model.params import spec_for
from preble_jax.model.rope import inverse_frequencies, rotate, rotation
from preble_jax.model.sampling import HostOrDeviceArray


class StepArrays(NamedTuple):
    """One step's ragged batch, all int32. The first `num_decode_slots` sequences own one token each.

    token_ids, positions, slots [T]: slots = where a token's keys and values go; past the last page: nowhere.
    page_table [S, pages_per_seq], cu_q_lens [S + 1], kv_lens [S], num_seqs [1]: see `kernels_pallas.paged_attention`.
    last_token [S]: index of each sequence's last token in the batch, whose logits are wanted.
    """

    token_ids: HostOrDeviceArray
    positions: HostOrDeviceArray
    slots: HostOrDeviceArray
    page_table: HostOrDeviceArray
    cu_q_lens: HostOrDeviceArray
    kv_lens: HostOrDeviceArray
    num_seqs: HostOrDeviceArray
    last_token: HostOrDeviceArray


class AttentionCall(NamedTuple):
    """What is fixed when a step is compiled: how many decode slots lead the batch, where, and by which backend."""

    mesh: Mesh
    num_decode_slots: int
    backend: str

    @classmethod
    def resolve(cls, mesh: Mesh, num_decode_slots: int, backend: str) -> AttentionCall:
        """backend: "auto" or a name. Raises ValueError for one that is unknown."""
        return cls(mesh, num_decode_slots, resolve_backend(backend, mesh.devices.flat[0].platform))


class RMSNorm(nnx.Module):
    def __init__(self, weight: Any, eps: float) -> None:
        self.weight = nnx.Param(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale * self.weight[...][None, :]


class Attention(nnx.Module):
    def __init__(self, qkv: Any, out: Any) -> None:
        self.qkv = nnx.Param(qkv)  # [E, K, G + 2, D]: a key head's queries, then its key, then its value
        self.out = nnx.Param(out)  # [K, G, D, E]

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        step: StepArrays,
        cos_sin: tuple[jax.Array, jax.Array],
        call: AttentionCall,
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, E] float32, one layer's pages -> [T, E] float32, the pages with this step's keys and values."""
        qkv = _matmul(x, self.qkv[...], 1)  # [T, K, G + 2, D]
        q_and_k = rotate(qkv[:, :, :-1], *cos_sin)
        q, k, v = q_and_k[:, :, :-1], q_and_k[:, :, -1], qkv[:, :, -1]
        attended, kv_pages = _attend(q, k, v, kv_pages, step, call)
        return _matmul(attended, self.out[...], 3), kv_pages


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, gate_up: Any, down: Any) -> None:
        self.gate_up = nnx.Param(gate_up)  # [E, 2, F]
        self.down = nnx.Param(down)  # [F, E]

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up = _matmul(x, self.gate_up[...], 1)
        return _matmul(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], self.down[...], 1)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, weight: Callable[[str], Any]) -> None:
        self.attention_norm = RMSNorm(weight("attention_norm"), config.rms_norm_eps)
        self.attention = Attention(weight("qkv"), weight("out"))
        self.mlp_norm = RMSNorm(weight("mlp_norm"), config.rms_norm_eps)
        self.mlp = MLP(weight("gate_up"), weight("down"))

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        step: StepArrays,
        cos_sin: tuple[jax.Array, jax.Array],
        call: AttentionCall,
    ) -> tuple[jax.Array, jax.Array]:
        attended, kv_pages = self.attention(self.attention_norm(x), kv_pages, step, cos_sin, call)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), kv_pages


class Decoder(nnx.Module):
    """Built from the parameter dict that `load_params` and `random_params` make (`params.param_table` names it)."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]) -> None:
        self.config = config
        self.embedding = nnx.Param(params["embedding"])  # [V, E]
        # Unrolled, not scanned over stacked layers: on the CPU a scan copies each layer's weights at every step.
        self.layers = nnx.List([Layer(config, partial(_layer_weight, params, i)) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(params["final_norm"], config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else nnx.Param(params["lm_head"])  # [E, V]

    def __call__(
        self, step: StepArrays, kv_pages: Sequence[jax.Array], call: AttentionCall
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Returns logits [S, V] float32 of each sequence's last token, and every layer's pages."""
        x = self.embedding[...][step.token_ids].astype(jnp.float32)
        cos_sin = rotation(step.positions, inverse_frequencies(self.config))
        new_pages = []
        for layer, pages in zip(self.layers, kv_pages, strict=True):
            x, pages = layer(x, pages, step, cos_sin, call)
            new_pages.append(pages)
        x = self.final_norm(x[step.last_token])  # the output matrix is wide: only the rows that are sampled
        if self.lm_head is None:
            embedding = self.embedding[...]
            logits = jax.lax.dot_general(
                x.astype(embedding.dtype),
                embedding,
                (((1,), (1,)), ((), ())),
                precision=_precision(embedding),
                preferred_element_type=jnp.float32,
            )
        else:
            logits = _matmul(x, self.lm_head[...], 1)
        return logits, tuple(new_pages)


def _layer_weight(params: Mapping[str, Any], layer: int, name: str) -> Any:
    return params[f"layers.{layer}.{name}"]


def _precision(weights: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if weights.dtype == jnp.float32 else None


def _matmul(x: jax.Array, w: jax.Array, num_in: int) -> jax.Array:
    """Contracts x's last `num_in` axes with w's first, [T, in...] @ [in..., out...] -> [T, out...] float32."""
    axes = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    return jax.lax.dot_general(
        x.astype(w.dtype), w, (axes, ((), ())), precision=_precision(w), preferred_element_type=jnp.float32
    )


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, kv_pages: jax.Array, step: StepArrays, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """q [T, K, G, D], k, v [T, K, D] -> attended [T, K, G, D] and the pages; each device does its own key heads."""
    heads = spec_for(("kv_heads",), k.shape[1:2], call.mesh.shape)[0]
    dtype = jnp.bfloat16 if kv_pages.dtype == jnp.uint16 else kv_pages.dtype

    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, kv_pages: jax.Array, step: StepArrays
    ) -> tuple[jax.Array, jax.Array]:
        kv_pages = write_kv(kv_pages, k, v, step.slots)
        out = paged_attention(
            q.astype(dtype).reshape(q.shape[0], -1, q.shape[-1]),
            kv_pages,
            step.page_table,
            step.cu_q_lens,
            step.kv_lens,
            step.num_seqs,
            num_decode_slots=call.num_decode_slots,
            backend=call.backend,
        )
        return out.reshape(q.shape), kv_pages

    by_head = PartitionSpec(None, heads)
    replicated = StepArrays(*(PartitionSpec() for _ in step))
    each_device = jax.shard_map(
        local,
        mesh=call.mesh,
        in_specs=(by_head, by_head, by_head, by_head, replicated),
        out_specs=(by_head, by_head),
        check_vma=False,  # the loops' carried zeros have no varying axes
    )
    attended, kv_pages = each_device(q, k, v, kv_pages, step)
    return attended, kv_pages
