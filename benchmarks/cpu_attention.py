"""Attention on the CPU: milliseconds a layer of the backends "cpu" and "jnp", and what that is in arithmetic and bytes.

SmolLM2's heads (9 query and 3 key heads of 64, bfloat16 pages of 16). A stack of layers, each with pages of its own, is
one compiled program; the backends run in alternation; medians. GFLOP/s counts the products of what is visible, with
families as well; GB/s the keys and values, a family's once.

    python benchmarks/cpu_attention.py [--seconds 2] [--backends cpu,jnp] [--cases decode,512] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Geometry, PageLayout, SharedPrefixes, make_schedule, paged_attention
from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import family_costs
from preble_jax.bench.machine import describe_machine

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_LAYERS = 9, 3, 64, 16, 6


@dataclass(frozen=True, kw_only=True)
class Case:
    """`seqs` sequences of `queries` each over `keys` of their own behind `shared` of one of `families`."""

    name: str
    seqs: int
    queries: int
    keys: int
    families: int = 1
    shared: int = 0

    @property
    def pages(self) -> tuple[np.ndarray, np.ndarray]:
        """Page table, shuffled, and lengths."""
        prefix, own = self.shared // PAGE_SIZE, -(-self.keys // PAGE_SIZE)
        order = np.random.default_rng(0).permutation(self.num_pages).astype(np.int32)
        prefixes = order[: self.families * prefix].reshape(self.families, prefix)
        owns = order[self.families * prefix :].reshape(self.seqs, own)
        table = np.concatenate([prefixes[np.arange(self.seqs) % self.families], owns], axis=1)
        return table, np.full(self.seqs, self.shared + self.keys, np.int32)

    @property
    def num_pages(self) -> int:
        return self.families * self.shared // PAGE_SIZE + self.seqs * -(-self.keys // PAGE_SIZE)

    @property
    def flops(self) -> float:
        visible = self.seqs * sum(self.shared + self.keys - i for i in range(self.queries))
        return 4.0 * visible * NUM_Q_HEADS * HEAD_DIM

    @property
    def kv_bytes(self) -> float:
        return 4.0 * (self.families * self.shared + self.seqs * self.keys) * NUM_KV_HEADS * HEAD_DIM


CASES = (
    Case(name="1 decodes", seqs=1, queries=1, keys=1100),
    Case(name="8 decode", seqs=8, queries=1, keys=1100),
    Case(name="64 decode, short", seqs=64, queries=1, keys=80),
    Case(name="64 decode", seqs=64, queries=1, keys=1100),
    Case(name="64 decode, 4 families", seqs=64, queries=1, keys=76, families=4, shared=1024),
    Case(name="64 decode, 8 families", seqs=64, queries=1, keys=300, families=8, shared=1552),
    Case(name="512 new", seqs=1, queries=512, keys=512),
    Case(name="512 behind 1,536", seqs=1, queries=512, keys=2048),
    Case(name="8 x 64 behind 1,024", seqs=8, queries=64, keys=1088),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, each case")
    parser.add_argument("--backends", default="cpu,jnp")
    parser.add_argument("--cases", default="", help="only those whose names contain one of these, comma-separated")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [
        measure(case, args.backends.split(","), args.seconds)
        for case in CASES
        if any(part in case.name for part in args.cases.split(","))
    ]
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def measure(case: Case, backends: list[str], seconds: float) -> dict[str, Any]:
    """Prints and returns a case's figures."""
    programs = {}
    for backend in backends:
        programs[backend] = layers(case, backend, families=False)
        if case.shared:
            programs[f"{backend}, families"] = layers(case, backend, families=True)
    outs = {name: np.asarray(run(), np.float32) for name, run in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - began) * 1e3 / NUM_LAYERS)
    first = next(iter(outs.values()))
    row: dict[str, Any] = {"case": case.name}
    for name, values in times.items():
        median = statistics.median(values)
        distance = float(np.linalg.norm(outs[name] - first) / np.linalg.norm(first))
        row[name] = {
            "ms": round(median, 4),
            "gflops": round(case.flops / median / 1e6, 1),
            "gbytes_per_s": round(case.kv_bytes / median / 1e6, 1),
            "distance": distance,
        }
        print(
            f"{case.name:28s} {name:14s} {median:7.3f} ms a layer {row[name]['gflops']:6.0f} GFLOP/s "
            f"{row[name]['gbytes_per_s']:5.1f} GB/s  distance {distance:.0e}",
            flush=True,
        )
    return row


def layers(case: Case, backend: str, *, families: bool) -> Callable[[], jax.Array]:
    """A compiled stack of attentions, each with pages of its own, bound to its arguments."""
    table, kv_lens = case.pages
    cu_q_lens = np.arange(case.seqs + 1, dtype=np.int32) * case.queries
    slots, num_tokens = case.seqs if case.queries == 1 else 0, int(cu_q_lens[-1])
    shared: SharedPrefixes | None = None
    if families:
        planner = FamilyPlanner(page_size=PAGE_SIZE, costs=family_costs(backend))
        planned = planner.plan(table, cu_q_lens, kv_lens, num_decode_slots=slots, num_tokens=num_tokens)
        shared = SharedPrefixes(*map(jnp.asarray, planned))
    layout = PageLayout(
        num_pages=case.num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=jnp.dtype(jnp.bfloat16),
        backend=backend,
    )
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
    pages = [jax.random.normal(key, layout.shape, jnp.bfloat16).view(layout.storage_dtype) for key in keys]
    queries = jax.random.normal(jax.random.key(1), (NUM_LAYERS, num_tokens, NUM_Q_HEADS, HEAD_DIM), jnp.bfloat16)
    geometry = Geometry.from_arrays(queries[0], pages[0], table, num_decode_slots=slots)
    arrays = jax.tree.map(jnp.asarray, (table, cu_q_lens, kv_lens, np.array([case.seqs], np.int32)))

    @jax.jit
    def run(queries: Any, pages: Any, arrays: Any, shared: Any) -> jax.Array:
        schedule = make_schedule(*arrays[1:], geometry=geometry, shared=shared, backend=backend)
        call = partial(paged_attention, num_decode_slots=slots, shared=shared, schedule=schedule, backend=backend)
        return jnp.stack([call(q, kv, *arrays) for q, kv in zip(queries, pages, strict=True)])

    return lambda: run(queries, pages, arrays, shared)


if __name__ == "__main__":
    main()
