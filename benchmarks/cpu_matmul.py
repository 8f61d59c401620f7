"""Matrix products on the CPU: the project's kernels beside XLA's operations, with what goes before and after them.

SmolLM2-135M's matrices in bfloat16: queries, keys and values behind a norm; attention's output onto a residual; the
MLP's two, SwiGLU in the first; the output matrix behind a norm. One compiled program goes through so many matrices of
a kind that no cache holds them; the two sides run in alternation; medians. GB/s counts the weights, once.

    python benchmarks/cpu_matmul.py [--seconds 1] [--rows 1,8,64,512] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from preble_jax.bench.machine import describe_machine
from preble_jax.model.packed import pack_matrix
from preble_jax.model.products import RMSNorm, matmul_added, normed_matmul, swiglu
from preble_jax.model.quantize import Weight

EPS = 1e-5
SET_BYTES = 96 << 20

State = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Product:
    """kind: "normed", "added" or "swiglu", as in `preble_jax.model.products`."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def numbers(self) -> int:
        return int(np.prod(self.shape))

    def __call__(self, state: State, w: Weight, norm: RMSNorm, live: jax.Array) -> State:
        """Each product waits for the one before it, as in a model, and next to nothing else is done."""
        x, residual = state
        if self.kind == "added":
            return x, matmul_added(x, w, residual, live)
        y = (normed_matmul if self.kind == "normed" else swiglu)(x, norm, w, live)
        return x.at[0, 0].set(y.reshape(-1)[0].astype(x.dtype)), residual


PRODUCTS = (
    Product(name="queries, keys, values", shape=(576, 960), kind="normed"),
    Product(name="attention's output", shape=(576, 576), kind="added"),
    Product(name="MLP, first", shape=(576, 2, 1536), kind="swiglu"),
    Product(name="MLP, second", shape=(1536, 576), kind="added"),
    Product(name="output matrix", shape=(576, 49152), kind="normed"),
)


@dataclass(frozen=True)
class Result:
    product: str
    rows: int
    side: str
    us: float
    gbytes_per_s: float
    gflops: float


def programs(product: Product, rows: int) -> dict[str, Callable[[], State]]:
    """By side: something that goes through all matrices once."""
    random = np.random.default_rng(0)
    count = max(2, SET_BYTES // (2 * product.numbers))
    plain = [(random.standard_normal(product.shape, np.float32) / 30).astype(jnp.bfloat16) for _ in range(count)]
    packed = [pack_matrix(w, (0,), interleaved=product.kind == "swiglu") for w in plain]
    norm = RMSNorm(jnp.ones(product.shape[0], jnp.float32), EPS)
    x = jnp.asarray(random.standard_normal((rows, product.shape[0]), np.float32))
    if product.kind == "added":
        x = x.astype(jnp.bfloat16)
    residual = jnp.zeros((rows, product.shape[1]), jnp.float32)
    live = jnp.array([0, rows, rows, rows], jnp.int32)

    @jax.jit
    def through(state: State, weights: list[Weight]) -> State:
        for w in weights:
            state = product(state, w, norm, live)
        return state

    sides = {"kernels": jax.device_put(packed), "XLA": jax.device_put(plain)}
    return {
        side: lambda weights=weights: jax.block_until_ready(through((x, residual), weights))
        for side, weights in sides.items()
    }


def measure(product: Product, rows: int, seconds: float) -> list[Result]:
    sides = programs(product, rows)
    times: dict[str, list[float]] = {side: [] for side in sides}
    for run in sides.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["XLA"]) < 3:
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            times[side].append(time.perf_counter() - start)
    count = max(2, SET_BYTES // (2 * product.numbers))
    results = []
    for side, values in times.items():
        each = statistics.median(values) / count
        results.append(
            Result(
                product.name,
                rows,
                side,
                each * 1e6,
                2e-9 * product.numbers / each,
                2e-9 * rows * product.numbers / each,
            )
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each product and number of rows")
    parser.add_argument("--rows", default="1,8,64,512")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for product in PRODUCTS:
        for rows in map(int, args.rows.split(",")):
            if product.shape[1] > 4096 and rows > 64:
                continue  # logits are wanted for last tokens only
            own, xla = measure(product, rows, args.seconds)
            results += [own, xla]
            print(
                f"{product.name:22} {rows:4} rows: {own.us:7.0f} us ({own.gbytes_per_s:4.1f} GB/s, {own.gflops:4.0f} "
                f"GFLOP/s), XLA {xla.us:7.0f} us, ratio {xla.us / own.us:.2f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(
            json.dumps({"machine": describe_machine(), "results": [asdict(r) for r in results]}, indent=1)
        )


if __name__ == "__main__":
    main()
