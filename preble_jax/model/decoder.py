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
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels_pallas import (
    Geometry,
    SharedPrefixes,
    StepSchedule,
    make_schedule,
    paged_attention,
    write_kv,
)
from kernels_pallas.cpu.rotate import can_rotate, rotate_and_write
from kernels_pallas.layout import page_dtype as stored_page_dtype
from preble_jax.model.config import ModelConfig
from preble_jax.model.params import spec_for
from preble_jax.model.products import RMSNorm, embedding_rows, matmul_added, normed_matmul, normed_scores, swiglu
from preble_jax.model.rope import rotate
from preble_jax.model.sampling import HostOrDeviceArray, Scores


class StepArrays(NamedTuple):
    """One step's ragged batch, all int32. The first `num_decode_slots` sequences own one token each.

    token_ids, positions, slots [T]: slots = where a token's keys and values go; past the last page: nowhere.
    page_table [S, pages_per_seq], cu_q_lens [S + 1], kv_lens [S], num_seqs [1]: see `kernels_pallas.paged_attention`.
    last_token [S]: index of each sequence's last token in the batch, whose logits are wanted.
    shared: families of sequences that share cached pages, which are read once a family; None: each reads its own.
    """

    token_ids: HostOrDeviceArray
    positions: HostOrDeviceArray
    slots: HostOrDeviceArray
    page_table: HostOrDeviceArray
    cu_q_lens: HostOrDeviceArray
    kv_lens: HostOrDeviceArray
    num_seqs: HostOrDeviceArray
    last_token: HostOrDeviceArray
    shared: SharedPrefixes | None = None


class AttentionCall(NamedTuple):
    """What is fixed when a step is compiled: the devices, how many decode slots lead the batch, the attention
    backend, the dtype of queries, keys and values, and (None: as many as in the array) how many pages a layer has."""

    mesh: Mesh
    num_decode_slots: int
    backend: str
    dtype: jnp.dtype
    num_pages: int | None = None

    def geometry(
        self,
        model: ModelConfig,
        *,
        num_tokens: int,
        num_seqs: int,
        pages_per_seq: int,
        page_size: int,
        page_dtype: jnp.dtype,
    ) -> Geometry:
        """Of a step, on each device."""
        heads = spec_for(("kv_heads",), (model.num_kv_heads,), self.mesh.shape)[0]
        num_kv_heads = model.num_kv_heads // (self.mesh.shape[heads] if heads else 1)
        return Geometry(
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            pages_per_seq=pages_per_seq,
            num_q_heads=num_kv_heads * model.num_query_groups,
            num_kv_heads=num_kv_heads,
            head_dim=model.head_dim,
            page_size=page_size,
            num_decode_slots=self.num_decode_slots,
            page_dtype=page_dtype,
            q_dtype=self.dtype,
        )

    def schedule(self, model: ModelConfig, step: StepArrays, kv_pages: jax.Array) -> StepSchedule:
        """The kernels' loops for a step, on pages like `kv_pages` (see `Decoder`); the same on each device and in each
        layer."""
        geometry = self.geometry(
            model,
            num_tokens=step.token_ids.shape[0],
            num_seqs=step.page_table.shape[0],
            pages_per_seq=step.page_table.shape[1],
            page_size=kv_pages.shape[3],
            page_dtype=stored_page_dtype(kv_pages.dtype),
        )
        return make_schedule(
            step.cu_q_lens, step.kv_lens, step.num_seqs, geometry=geometry, shared=step.shared, backend=self.backend
        )


class LayerInputs(NamedTuple):
    """What every layer of a step takes beside its activations; computed once.

    cos_sin [T, D] float32: of the tokens' positions. schedule: the attention kernels' loops. live_tokens, live_seqs [4]
    int32: which tokens and sequences there are, see `products`. first_page [] int32: where the layer's own pages begin
    in an array of several layers', the only thing that differs between layers; None: the array is one layer's.
    """

    step: StepArrays
    cos_sin: jax.Array
    schedule: StepSchedule
    live_tokens: jax.Array
    live_seqs: jax.Array
    first_page: jax.Array | None


class Attention(nnx.Module):
    def __init__(self, norm: RMSNorm, qkv: Any, out: Any) -> None:
        self.norm = norm
        self.qkv = nnx.Param(qkv)  # [E, K, (G + 2) * D]: see `params`
        self.out = nnx.Param(out)  # [K, G, D, E]

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: LayerInputs,
        call: AttentionCall,
        rows: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """x [T, E] float32, an array with the layer's pages -> x (or `rows` of it) and what it attended to, added; the
        array with the step's keys and values."""
        qkv = normed_matmul(x, self.norm, self.qkv.get_value(), inputs.live_tokens)  # [T, K, (G + 2) * D]
        attended, kv_pages = _attend(qkv, kv_pages, inputs, call)
        if rows is None:
            return matmul_added(attended, self.out.get_value(), x, inputs.live_tokens), kv_pages
        return matmul_added(attended[rows], self.out.get_value(), x[rows], inputs.live_seqs), kv_pages


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, norm: RMSNorm, gate_up: Any, down: Any) -> None:
        self.norm = norm
        self.gate_up = nnx.Param(gate_up)  # [E, 2, F]
        self.down = nnx.Param(down)  # [F, E]

    def __call__(self, x: jax.Array, live: jax.Array) -> jax.Array:
        """x [T, E] float32 -> x with its own added."""
        return matmul_added(swiglu(x, self.norm, self.gate_up.get_value(), live), self.down.get_value(), x, live)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, weight: Callable[[str], Any]) -> None:
        attention_norm, mlp_norm = (
            RMSNorm(weight(f"{part}_norm"), config.rms_norm_eps) for part in ("attention", "mlp")
        )
        self.attention = Attention(attention_norm, weight("qkv"), weight("out"))
        self.mlp = MLP(mlp_norm, weight("gate_up"), weight("down"))

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: LayerInputs,
        call: AttentionCall,
        rows: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """rows: of the result, all that is wanted; every token's key and value is written all the same."""
        x, kv_pages = self.attention(x, kv_pages, inputs, call, rows)
        return self.mlp(x, inputs.live_tokens if rows is None else inputs.live_seqs), kv_pages


class Decoder(nnx.Module):
    """Built from the parameter dict that `load_params` and `random_params` make (`params.param_table` names it), and
    `rope.rotation_table` for as many positions as will be met."""

    def __init__(self, config: ModelConfig, params: Mapping[str, Any], rotation: Any) -> None:
        self.config = config
        self.rotation = nnx.Variable(rotation)  # [num_positions, D] float32
        self.embedding = nnx.Param(params["embedding"])  # [V, E]
        # Unrolled, not scanned over stacked layers: on the CPU a scan copies each layer's weights at every step.
        self.layers = nnx.List([Layer(config, partial(_layer_weight, params, i)) for i in range(config.num_layers)])
        self.final_norm = RMSNorm(params["final_norm"], config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else nnx.Param(params["lm_head"])  # [E, V]

    def __call__(
        self,
        step: StepArrays,
        kv_pages: Sequence[jax.Array],
        call: AttentionCall,
        logits_wanted: jax.Array,
    ) -> tuple[Scores, tuple[jax.Array, ...]]:
        """Returns what follows each sequence's last token (S rows), and every layer's pages.

        kv_pages: arrays of pages, see `kv.device.allocate_pages`. logits_wanted: bool []; if not, the scores' logits
        may mean nothing.
        """
        x = embedding_rows(self.embedding.get_value(), step.token_ids)
        live_tokens, live_seqs = _live(step, call.num_decode_slots)
        inputs = LayerInputs(
            step=step,
            cos_sin=self.rotation[...][step.positions],
            schedule=call.schedule(self.config, step, kv_pages[0]),
            live_tokens=live_tokens,
            live_seqs=live_seqs,
            first_page=None,
        )
        pages = list(kv_pages)
        layers_an_array = len(self.layers) // len(pages)
        if layers_an_array > 1:
            call = call._replace(num_pages=pages[0].shape[0] // layers_an_array)
        for i, layer in enumerate(self.layers):
            # The last layer and the wide output matrix: only for the rows that are sampled.
            rows = step.last_token if i == len(self.layers) - 1 else None
            array, place = divmod(i, layers_an_array)
            if call.num_pages is not None:
                inputs = inputs._replace(first_page=jnp.int32(place * call.num_pages))
            graph, weights = nnx.split(layer)
            x, pages[array] = _run_layer(graph, call, weights, x, pages[array], inputs, rows)
        lm_head, in_axis = (self.embedding, 1) if self.lm_head is None else (self.lm_head, 0)
        everywhere = NamedSharding(call.mesh, PartitionSpec())
        scores = normed_scores(x, self.final_norm, lm_head.get_value(), live_seqs, logits_wanted, everywhere, in_axis)
        return scores, tuple(pages)


@partial(jax.jit, static_argnums=(0, 1))
def _run_layer(
    graph: Any,
    call: AttentionCall,
    weights: Any,
    x: jax.Array,
    kv_pages: jax.Array,
    inputs: LayerInputs,
    rows: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """A layer. Compiled as part of the step; a function of its own so that equal layers are traced and lowered once."""
    layer: Layer = nnx.merge(graph, weights)
    return layer(x, kv_pages, inputs, call, rows)


def _live(step: StepArrays, num_decode_slots: int) -> tuple[jax.Array, jax.Array]:
    """[4] int32 each, of tokens and of sequences: begin and end of the decode slots in use (an unused one behind the
    last of them is none) and of what computes prompts."""
    slots = jnp.arange(1, num_decode_slots + 1, dtype=jnp.int32)
    decoding = jnp.max(jnp.where(step.kv_lens[:num_decode_slots] > 0, slots, 0), initial=0)

    def edges(end: jax.Array) -> jax.Array:
        return jnp.stack([jnp.int32(0), decoding, jnp.int32(num_decode_slots), jnp.maximum(end, num_decode_slots)])

    return edges(step.cu_q_lens[-1]), edges(step.num_seqs[0])


def _qkv_columns(width: int, head_dim: int) -> tuple[int, int]:
    """Where second halves and values begin among a key head's columns."""
    turned = width - head_dim
    return turned // 2, turned


def _layer_weight(params: Mapping[str, Any], layer: int, name: str) -> Any:
    return params[f"layers.{layer}.{name}"]


def _rotate_and_write(
    qkv: jax.Array, kv_pages: jax.Array, inputs: LayerInputs, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """qkv [T, K, (G + 2) * D] float32 -> turned queries [T, K, G, D], and the pages with turned keys and values."""
    head_dim, slots, first_page = inputs.cos_sin.shape[1], inputs.step.slots, inputs.first_page
    if (
        call.backend == "cpu"
        and stored_page_dtype(kv_pages.dtype) == call.dtype == jnp.bfloat16
        and can_rotate(head_dim)
    ):
        return rotate_and_write(
            qkv, inputs.cos_sin, kv_pages, slots, inputs.live_tokens, first_page=first_page, num_pages=call.num_pages
        )
    first, second, v = jnp.split(qkv, _qkv_columns(qkv.shape[2], head_dim), axis=2)
    heads = (*qkv.shape[:2], -1, head_dim // 2)
    q_and_k = rotate(first.reshape(heads), second.reshape(heads), inputs.cos_sin, call.dtype)
    q, k = q_and_k[:, :, :-1], q_and_k[:, :, -1]
    if first_page is not None and call.num_pages is not None:
        page_size = kv_pages.shape[3]
        nowhere = kv_pages.shape[0] * page_size
        is_somewhere = (slots >= 0) & (slots < call.num_pages * page_size)
        slots = jnp.where(is_somewhere, slots + first_page * page_size, nowhere)  # else it would be another layer's
    return q, write_kv(kv_pages, k, v, slots, backend=call.backend)


def _attend(
    qkv: jax.Array, kv_pages: jax.Array, inputs: LayerInputs, call: AttentionCall
) -> tuple[jax.Array, jax.Array]:
    """qkv [T, K, (G + 2) * D] -> attended [T, K, G, D], and the pages with the step's keys and values; each device does
    its own key heads."""
    heads = spec_for(("kv_heads",), qkv.shape[1:2], call.mesh.shape)[0]

    def local(qkv: jax.Array, kv_pages: jax.Array, inputs: LayerInputs) -> tuple[jax.Array, jax.Array]:
        step = inputs.step
        q, kv_pages = _rotate_and_write(qkv, kv_pages, inputs, call)
        out = paged_attention(
            q.reshape(q.shape[0], -1, q.shape[-1]),
            kv_pages,
            step.page_table,
            step.cu_q_lens,
            step.kv_lens,
            step.num_seqs,
            num_decode_slots=call.num_decode_slots,
            shared=step.shared,
            schedule=inputs.schedule,
            first_page=inputs.first_page,
            backend=call.backend,
        )
        return out.reshape(q.shape), kv_pages

    by_head = PartitionSpec(None, heads)
    each_device = jax.shard_map(
        local,
        mesh=call.mesh,
        in_specs=(by_head, by_head, PartitionSpec()),
        out_specs=(by_head, by_head),
        check_vma=False,  # the loops' carried zeros have no varying axes
    )
    attended, kv_pages = each_device(qkv, kv_pages, inputs)
    return attended, kv_pages
