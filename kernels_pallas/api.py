"""The calls the model makes; each backend answers them."""

from __future__ import annotations

import math
from typing import Literal, overload

import jax

from kernels_pallas import jnp_attention

BACKENDS = ("jnp",)


def resolve_backend(name: str, platform: str) -> str:
    """The backend that serves `platform` ("cpu", "tpu", "gpu") when the setting is `name`.

    Raises ValueError for a name that is neither "auto" nor a backend's.
    """
    if name == "auto":
        return "jnp"
    if name not in BACKENDS:
        raise ValueError(
            f"attention backend: expected auto or one of {', '.join(BACKENDS)}, got {name!r} on {platform}"
        )
    return name


def write_kv(kv_pages: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes a step's new keys and values into their pages; donate `kv_pages` and nothing is copied.

    k, v [T, Hkv, D]; slots [T] int32 = page * page_size + offset in the page. A slot past the last page is padding
    and dropped. Returns the page array.
    """
    return jnp_attention.write_kv(kv_pages, k, v, slots)


@overload
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = ...,
    sm_scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> jax.Array: ...
@overload
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = ...,
    sm_scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[jax.Array, jax.Array]: ...
def paged_attention(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    cu_q_lens: jax.Array,
    kv_lens: jax.Array,
    num_seqs: jax.Array,
    *,
    num_decode_slots: int = 0,
    sm_scale: float | None = None,
    return_lse: bool = False,
    backend: str = "jnp",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of a ragged batch over pages that already hold the step's own keys and values.

    q          [T, Hq, D]            the batch's tokens, sequence after sequence, padded at the end
    kv_pages   one layer's pages     made by a `PageLayout`; bfloat16 or float32
    page_table [S, pages_per_seq]    int32; entry j of a row covers keys j * page_size and on
    cu_q_lens  [S + 1]               int32; sequence s owns tokens cu_q_lens[s] : cu_q_lens[s + 1]
    kv_lens    [S]                   int32; keys of the sequence, its own new ones too: the last query sees all
    num_seqs   [1]                   int32; rows from there on are ignored

    num_decode_slots (static): the first so many sequences own exactly one token each, token i being sequence i's; a
    slot with kv_lens 0 is empty. They take a path without query tiles.

    Returns out [T, Hq, D] in q's dtype and, when asked, lse [T, Hq] float32: the natural logarithm of the sum of
    exp(scores). A query that sees no key gets zeros and -inf. Tokens past the last sequence are undefined but finite.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if sm_scale is None else sm_scale
    if backend != "jnp":
        raise ValueError(f"attention backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    out, lse = jnp_attention.paged_attention(
        q, kv_pages, page_table, cu_q_lens, kv_lens, num_seqs, num_decode_slots=num_decode_slots, sm_scale=scale
    )
    return (out, lse) if return_lse else out
