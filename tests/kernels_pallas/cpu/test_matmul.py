"""Products with packed weights against NumPy in float64: shapes that fill no panel or tile, rows that are dead."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.cpu import call
from kernels_pallas.cpu.embedding import embedding_rows
from kernels_pallas.cpu.matmul import matmul, pack_panels

EPS = 1e-5
# Of the largest value: float32 sums in another order; activations rounded to bfloat16, a few of them to the other side.
EXACT, ROUNDED = 2e-6, 1e-2


def random(*shape: int, dtype: str = "bfloat16") -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(jnp.dtype(dtype))


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(jnp.bfloat16).astype(np.float64)


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return rounded(x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS) * weight)


def alive(live: list[int], num_rows: int) -> np.ndarray:
    rows = np.arange(num_rows)
    return ((rows >= live[0]) & (rows < live[1])) | ((rows >= live[2]) & (rows < live[3]))


def with_dead(x: np.ndarray, live: list[int]) -> np.ndarray:
    """What nobody has computed may be anything."""
    return np.where(alive(live, len(x))[:, None], x, np.nan).astype(x.dtype)


def close(got: jax.Array, want: np.ndarray, live: list[int], error: float, dead: float = 0) -> None:
    rows = alive(live, len(want))
    got_ = np.asarray(got)[:, : want.shape[1]].astype(np.float64)
    np.testing.assert_allclose(got_[rows], want[rows], rtol=0, atol=error * np.abs(want).max())
    assert (got_[~rows] == dead).all()


def test_every_number_of_rows() -> None:
    x, w = random(37, 50), random(1, 70, 50)
    want = x.astype(np.float64) @ w[0].T.astype(np.float64)
    product = jax.jit(matmul)
    for count in range(38):
        for live in ([0, count, count, count], [count // 2, count, 37, 37], [0, count // 3, count // 2, count]):
            got = product(with_dead(x, live), jnp.asarray(pack_panels(w)), jnp.asarray(live, jnp.int32))
            close(got, want, live, EXACT)


def test_rows_of_an_embedding() -> None:
    """In panels like an output matrix. What is asked for beside it is taken from its edge."""
    w, indices = random(1, 96, 50), np.random.default_rng(0).integers(0, 96, 37).astype(np.int32)
    indices[:2] = -1, 96
    got = np.asarray(jax.jit(embedding_rows)(pack_panels(w), indices))
    np.testing.assert_array_equal(got[:, :50], w[0, indices.clip(0, 95)].astype(np.float32))


def test_rows_of_several_blocks_with_a_norm() -> None:
    x, weight, w = random(300, 33, dtype="float32"), random(33, dtype="float32"), random(1, 40, 33)
    want = normed(x, weight) @ w[0].T.astype(np.float64)
    product = jax.jit(lambda x, live: matmul(x, jnp.asarray(pack_panels(w)), live, norm=(jnp.asarray(weight), EPS)))
    for live in ([0, 300, 300, 300], [0, 5, 64, 290], [0, 0, 0, 0]):
        close(product(with_dead(x, live), jnp.asarray(live, jnp.int32)), want, live, ROUNDED)


def test_a_residual_is_added() -> None:
    x, w, residual = random(20, 64), random(1, 40, 64), random(20, 40, dtype="float32")
    live = [0, 3, 8, 15]
    got = np.asarray(
        jax.jit(lambda x, residual: matmul(x, pack_panels(w), np.array(live, np.int32), residual=residual))(x, residual)
    )[:, :40]
    want = residual + alive(live, 20)[:, None] * (x.astype(np.float64) @ w[0].T.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=0, atol=EXACT * np.abs(want).max())


@pytest.mark.parametrize("features", ["host", "none"])
def test_swiglu(features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = {"host": 31, "none": 30}[features]  # kernels of their own
    if features == "none":
        monkeypatch.setattr(call, "host_features", frozenset)
    x, weight, w = random(num_rows, 80, dtype="float32") * 3, random(80, dtype="float32"), random(2, 24, 80)
    w = (w.astype(np.float32) / 8).astype(jnp.bfloat16)
    gate, up = (normed(x, weight) @ half.T.astype(np.float64) for half in w)
    live = [0, 9, 12, 29]
    got = jax.jit(lambda x: matmul(x, pack_panels(w), np.array(live, np.int32), norm=(weight, EPS), swiglu=True))(
        with_dead(x, live)
    )
    assert got.dtype == jnp.bfloat16
    close(got, gate / (1 + np.exp(-gate)) * up, live, ROUNDED)
