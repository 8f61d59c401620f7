"""Everything about a call of attention that is fixed when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels_pallas.layout import page_dtype


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The static side of one `attend`. Hashable, so that it can be a static argument and a cache key.

    The first `num_decode_slots` sequences own exactly one token each, token i being sequence i's.
    causal: a sequence's last query sits at its last key and sees no later one; False: every query sees every key of
    its sequence's range, which is what a shared prefix is to those who continue it.
    page_dtype: of the numbers in a page, whatever array type a backend keeps them in.
    """

    num_tokens: int
    num_seqs: int
    pages_per_seq: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_decode_slots: int
    page_dtype: jnp.dtype
    q_dtype: jnp.dtype
    causal: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "page_dtype", jnp.dtype(self.page_dtype))
        object.__setattr__(self, "q_dtype", jnp.dtype(self.q_dtype))
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"heads: expected query heads in whole groups for each key head, got {self.num_q_heads} query heads "
                f"and {self.num_kv_heads} key heads"
            )
        if self.q_dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"q dtype: expected bfloat16 or float32, got {self.q_dtype}; cast the queries")
        slots = self.num_decode_slots
        if not 0 <= slots <= min(self.num_seqs, self.num_tokens):
            raise ValueError(
                f"num_decode_slots: expected 0 to the number of sequences ({self.num_seqs}) and of tokens "
                f"({self.num_tokens}), got {slots}"
            )

    @classmethod
    def from_arrays(
        cls, q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, *, num_decode_slots: int, causal: bool = True
    ) -> Geometry:
        """q [T, Hq, D], kv_pages of any backend's layout, page_table [S, pages_per_seq].

        Raises ValueError where ranks are wrong, the head dim of queries and pages differs, or a limit is broken.
        """
        for name, array, rank in (("q", q, 3), ("kv_pages", kv_pages, 5), ("page_table", page_table, 2)):
            if array.ndim != rank:
                raise ValueError(f"{name}: expected {rank} axes, got shape {array.shape}")
        head_dim, in_a_page = q.shape[2], kv_pages.shape[2] * kv_pages.shape[4]
        if in_a_page != 2 * head_dim:
            raise ValueError(
                f"q: head_dim {head_dim} does not fit pages of shape {kv_pages.shape}, which hold a key and a value of "
                f"{in_a_page // 2} each"
            )
        return cls(
            num_tokens=q.shape[0],
            num_seqs=page_table.shape[0],
            pages_per_seq=page_table.shape[1],
            num_q_heads=q.shape[1],
            num_kv_heads=kv_pages.shape[1],
            head_dim=head_dim,
            page_size=kv_pages.shape[3],
            num_decode_slots=num_decode_slots,
            page_dtype=page_dtype(kv_pages.dtype),
            q_dtype=q.dtype,
            causal=causal,
        )

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def quantised(self) -> bool:
        return self.page_dtype.itemsize == 1
