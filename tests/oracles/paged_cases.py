"""Ragged cases for any attention backend: pages packed by numpy, poison in every slot nobody may read, and checks.

case = make_case(0, backend="tpu-interpret", q_lens=[1, 1, 40], kv_lens=[33, 0, 90], num_decode=2, ...)
check_attend(case, causal=True)          # the backend's own `attend` against the float64 oracle
check_paged_attention(case, shared=...)  # the public call
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Geometry, PageLayout, paged_attention
from kernels_pallas.backends import load
from oracles import attention as oracle

TOLERANCE = {jnp.dtype(jnp.float32): 1e-5, jnp.dtype(jnp.bfloat16): 1e-2}


@dataclass(frozen=True, kw_only=True, eq=False)
class PagedCase:
    """Arrays of one call (numpy but for `kv_pages`), and the numbers behind them for the oracle.

    page_table, cu_q_lens, kv_starts, kv_lens, num_seqs are padded; q_lens, keys, values are not. keys, values: per
    sequence [kv_len, Hkv, D] float64, exactly what the pages hold, times its scale; NaN before kv_starts.
    """

    backend: str
    layout: PageLayout
    num_decode: int
    q: np.ndarray
    kv_pages: jax.Array
    page_table: np.ndarray
    cu_q_lens: np.ndarray
    kv_starts: np.ndarray
    kv_lens: np.ndarray
    num_seqs: np.ndarray
    kv_scales: np.ndarray | None
    q_lens: tuple[int, ...]
    keys: list[np.ndarray]
    values: list[np.ndarray]

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(self.q_lens)

    @property
    def tolerance(self) -> float:
        """Relative, by norm: float32's for float32 queries, whatever the pages; the gpu kernel rounds them."""
        exact = self.q.dtype == np.float32 and self.layout.platform != "gpu"
        return TOLERANCE[jnp.dtype(jnp.float32 if exact else jnp.bfloat16)]

    def geometry(self, *, causal: bool = True) -> Geometry:
        return Geometry.from_arrays(
            self.q, self.kv_pages, self.page_table, num_decode_slots=self.num_decode if causal else 0, causal=causal
        )

    def want(self, *, scale: float | None = None, scaled: bool = True, **how) -> tuple[np.ndarray, np.ndarray]:
        """The oracle's out [num_tokens, Hq, D] and lse. how: causal, sliding_window, soft_cap.

        scaled=False: pages as they are, without their scales, which is what a backend's own `attend` sees.
        """
        num = len(self.q_lens)
        keys, values = self.keys, self.values
        if self.kv_scales is not None and not scaled:
            keys = [k / self.kv_scales[0][None, :, None] for k in keys]
            values = [v / self.kv_scales[1][None, :, None] for v in values]
        return oracle.attend(
            self.q[: self.num_tokens],
            keys,
            values,
            self.q_lens,
            self.kv_lens[:num].tolist(),
            1 / math.sqrt(self.q.shape[2]) if scale is None else scale,
            kv_starts=self.kv_starts[:num].tolist(),
            **how,
        )


def make_case(
    seed: int,
    *,
    q_lens: list[int],
    kv_lens: list[int],
    num_decode: int,
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    backend: str = "jnp",
    q_dtype=jnp.float32,
    page_dtype=None,
    kv_starts: list[int] | None = None,
    parents: list[tuple[int, int] | None] | None = None,
    token_padding: int = 0,
    seq_padding: int = 0,
    pages_per_seq: int | None = None,
    first_readable: list[int] | None = None,
) -> PagedCase:
    """Normal-distributed queries and pages, in shuffled pages.

    parents: for a sequence (s, n): its first n pages are those of the earlier sequence s. first_readable: keys before
    it are poisoned as well (a sliding window's lower end); default kv_starts. pages_per_seq: columns of the table;
    default: what the longest needs and one more. With it, sizes depend on no length, and one program serves many cases.
    """
    rng = np.random.default_rng(seed)
    num = len(kv_lens)
    needed = [-(-n // page_size) for n in kv_lens]
    columns = pages_per_seq or max(1, *needed) + 1
    num_pages = (num * pages_per_seq if pages_per_seq else sum(needed)) + 2
    layout = PageLayout(
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=page_dtype or q_dtype,
        backend=backend,
    )
    order = list(rng.permutation(num_pages - 1) + 1)  # page 0 stays poisoned and fills the table's unused entries
    table = np.zeros((num + seq_padding, columns), np.int32)
    for s in range(num):
        parent, shared = (parents and parents[s]) or (0, 0)
        assert shared * page_size <= min(kv_lens[parent], kv_lens[s]), "shared pages have to be full"
        table[s, :shared] = table[parent, :shared]
        for column in range(shared, needed[s]):
            table[s, column] = order.pop()
    scales = None
    if layout.dtype.itemsize == 1:
        scales = rng.uniform(0.02, 0.03, (2, kv_heads)).astype(np.float32)
        if layout.dtype != jnp.int8:
            scales *= 40  # fp8 has room for 448, but three bits of mantissa anywhere
    halves = [_poison((num_pages, kv_heads, page_size, head_dim), layout.dtype) for _ in range(2)]
    starts = kv_starts or [0] * num
    first = [max(both) for both in zip(starts, first_readable or starts, strict=True)]
    readable = sorted(
        {(table[s, j // page_size], j % page_size) for s in range(num) for j in range(first[s], kv_lens[s])}
    )
    if readable:
        pages, offsets = map(np.array, zip(*readable, strict=True))
        for half, scale in zip(halves, (None, None) if scales is None else scales, strict=True):
            numbers = rng.normal(size=(len(pages), kv_heads, head_dim))
            half[pages, :, offsets] = _quantise(numbers, scale, layout.dtype)
    keys, values = (
        [_read(half, scale, table[s], kv_lens[s], page_size) for s in range(num)]
        for half, scale in zip(halves, (None, None) if scales is None else scales, strict=True)
    )
    num_tokens = sum(q_lens)
    q = rng.normal(size=(num_tokens + token_padding, kv_heads * group, head_dim)).astype(q_dtype)
    padding = np.zeros(seq_padding, np.int32)
    return PagedCase(
        backend=backend,
        layout=layout,
        num_decode=num_decode,
        q=q,
        kv_pages=jnp.asarray(pack(layout, *halves)),
        page_table=table,
        cu_q_lens=np.concatenate([[0], np.cumsum(q_lens), padding + num_tokens]).astype(np.int32),
        kv_starts=np.concatenate([starts, padding]).astype(np.int32),
        kv_lens=np.concatenate([kv_lens, padding]).astype(np.int32),
        num_seqs=np.array([num], np.int32),
        kv_scales=scales,
        q_lens=tuple(q_lens),
        keys=keys,
        values=values,
    )


def pack(layout: PageLayout, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """K and V of every page, [num_pages, Hkv, page_size, D] in the page dtype, as the backend stores them."""
    if layout.platform == "tpu":
        both = np.concatenate([keys, values], axis=-1)  # [.., page_size, 2 * D]: a key, then its value
        lanes = layout.shape[-1]
        packed = np.stack(np.split(both, both.shape[-1] // lanes, axis=-1), axis=2)
    else:
        packed = np.stack([keys, values], axis=2)
    assert packed.shape == layout.shape
    return packed.view(layout.storage_dtype)


def unpack(layout: PageLayout, kv_pages) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `pack`: what a test of `write_kv` compares."""
    packed = np.asarray(kv_pages).view(layout.dtype)
    if layout.platform == "tpu":
        both = np.concatenate(list(np.moveaxis(packed, 2, 0)), axis=-1)
        keys, values = np.split(both, 2, axis=-1)
        return keys, values
    return packed[:, :, 0], packed[:, :, 1]


def check_attend(
    case: PagedCase, *, causal: bool = True, sliding_window: int | None = None, soft_cap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The backend's `attend`, with its schedule, against the oracle; returns what it gave."""
    backend, geometry = load(case.backend), case.geometry(causal=causal)
    backend.check(geometry, sliding_window=sliding_window, soft_cap=soft_cap)
    scale = 1 / math.sqrt(geometry.head_dim) * (1 if case.kv_scales is None else float(case.kv_scales[0].mean()))
    how = {"sliding_window": sliding_window, "soft_cap": soft_cap, "causal": causal}
    lengths = [jnp.asarray(x) for x in (case.cu_q_lens, case.kv_starts, case.kv_lens, case.num_seqs)]
    schedule = jax.jit(partial(backend.make_schedule, geometry=geometry))(*lengths)
    run = jax.jit(partial(backend.attend, geometry=geometry, sm_scale=scale, **how))
    out, lse = run(jnp.asarray(case.q), case.kv_pages, jnp.asarray(case.page_table), *lengths, schedule)
    assert out.dtype == lse.dtype == jnp.float32
    assert_close(case, out, lse, *case.want(scale=scale, scaled=False, **how))
    return np.asarray(out), np.asarray(lse)


def check_paged_attention(case: PagedCase, *, shared=None, scale=None, **how) -> tuple[np.ndarray, np.ndarray]:
    """The public call against the oracle; how: sliding_window, soft_cap. kv_starts of the case have to be 0."""
    run = _public_call(case.backend, case.num_decode, scale, tuple(how.items()))
    out, lse = run(
        jnp.asarray(case.q),
        case.kv_pages,
        *(jnp.asarray(x) for x in (case.page_table, case.cu_q_lens, case.kv_lens, case.num_seqs)),
        kv_scales=None if case.kv_scales is None else jnp.asarray(case.kv_scales),
        shared=shared,
    )
    assert out.dtype == case.q.dtype and lse.dtype == jnp.float32
    assert_close(case, out, lse, *case.want(scale=scale, **how))
    return np.asarray(out), np.asarray(lse)


@cache
def _public_call(backend: str, num_decode: int, scale: float | None, how: tuple[tuple[str, float], ...]):
    return jax.jit(
        partial(
            paged_attention,
            num_decode_slots=num_decode,
            sm_scale=scale,
            return_lse=True,
            backend=backend,
            **dict(how),
        )
    )


def assert_close(case: PagedCase, out, lse, want, want_lse) -> None:
    """Relative error by norm within the case's tolerance; -inf in the same places; nothing undefined."""
    assert np.isfinite(np.asarray(out, np.float64)).all(), "a masked or unwritten slot was read"
    got = np.asarray(out, np.float64)[: case.num_tokens]
    got_lse = np.asarray(lse, np.float64)[: case.num_tokens]
    seen = np.isfinite(want_lse)
    assert (np.isfinite(got_lse) == seen).all(), "queries that see no key: expected lse -inf there and only there"
    assert not got[~seen].any(), "queries that see no key: expected zeros"
    for name, a, b in (("out", got, want), ("lse", got_lse[seen], want_lse[seen])):
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        assert error <= case.tolerance, f"{name}: relative error {error:.2e}, tolerance {case.tolerance:.0e}"


def _poison(shape: tuple[int, ...], dtype) -> np.ndarray:
    """NaN; int8 has none: its largest number, which a mean of normal numbers never comes near."""
    return np.full(shape, 127 if dtype == jnp.int8 else np.nan).astype(dtype)


def _quantise(numbers: np.ndarray, scale: np.ndarray | None, dtype) -> np.ndarray:
    if scale is not None:
        numbers = numbers / scale[None, :, None]
    if dtype == jnp.int8:
        numbers = np.clip(np.rint(numbers), -127, 127)
    return numbers.astype(np.float32).astype(dtype)


def _read(half: np.ndarray, scale: np.ndarray | None, row: np.ndarray, kv_len: int, page_size: int) -> np.ndarray:
    position = np.arange(kv_len)
    numbers = half[row[position // page_size], :, position % page_size].astype(np.float64)
    return numbers if scale is None else numbers * scale[None, :, None]
