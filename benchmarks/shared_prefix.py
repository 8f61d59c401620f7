"""What reading a shared prefix once saves on the jnp backend: attention with the step's families and without them.

Decoding sequences of SmolLM2's heads (9 query and 3 key heads of 64, bfloat16 pages of 16), spread evenly over the
families. Both programs run in alternation; medians, and the outputs' relative distance as a check. The planner's own
time is beside them.

    python benchmarks/shared_prefix.py [--seconds 2] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import Geometry, PageLayout, SharedPrefixes, make_schedule, paged_attention
from kernels_pallas.families import FamilyPlanner
from preble_jax.bench.machine import describe_machine

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 9, 3, 64, 16, 8192, 6
# sequences, families, shared tokens, own tokens
CASES = ((8, 1, 1024, 76), (16, 4, 1024, 76), (64, 4, 1024, 76), (64, 1, 1024, 76), (64, 8, 1552, 300), (64, 1, 0, 80))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring, each case")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [measure(*case, seconds=args.seconds) for case in CASES]
    if args.json:
        args.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=1) + "\n")


def measure(num_seqs: int, num_families: int, shared: int, own: int, *, seconds: float) -> dict[str, Any]:
    """Prints and returns milliseconds a layer."""
    table, kv_lens = page_table(num_seqs, num_families, shared, own)
    cu_q_lens = np.arange(num_seqs + 1, dtype=np.int32)
    planner = FamilyPlanner(page_size=PAGE_SIZE)
    plan_us = []
    for _ in range(50):
        began = time.perf_counter()
        families = planner.plan(table, cu_q_lens, kv_lens, num_decode_slots=num_seqs, num_tokens=num_seqs)
        plan_us.append((time.perf_counter() - began) * 1e6)
    programs = {
        "plain": layers(None, table, cu_q_lens, kv_lens),
        "shared": layers(families, table, cu_q_lens, kv_lens),
    }
    outs = {name: np.asarray(run(), np.float32) for name, run in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append((time.perf_counter() - began) * 1e3 / NUM_LAYERS)
    row: dict[str, Any] = {
        "sequences": num_seqs,
        "families": int(families.num_families[0]),
        "shared_tokens": shared,
        "own_tokens": own,
        "planner_us": round(statistics.median(plan_us), 1),
        "distance": float(np.linalg.norm(outs["shared"] - outs["plain"]) / np.linalg.norm(outs["plain"])),
    }
    for name, values in times.items():
        low, *_, high = statistics.quantiles(values, n=10)
        row[f"{name}_ms"] = {"median": round(statistics.median(values), 3), "p10": round(low, 3), "p90": round(high, 3)}
    row["ratio"] = round(row["plain_ms"]["median"] / row["shared_ms"]["median"], 2)
    print(
        f"{num_seqs:3d} sequences, {row['families']} families of {shared} tokens, {own} own: plain "
        f"{row['plain_ms']['median']:.2f} ms a layer, shared {row['shared_ms']['median']:.2f} ms, ratio "
        f"{row['ratio']:.2f}; planner {row['planner_us']:.0f} us, distance {row['distance']:.0e}",
        flush=True,
    )
    return row


def page_table(num_seqs: int, num_families: int, shared: int, own: int) -> tuple[np.ndarray, np.ndarray]:
    """Shuffled pages: the families' first, then everybody's own."""
    pages = iter(np.random.default_rng(0).permutation(NUM_PAGES).tolist())
    prefixes = [[next(pages) for _ in range(shared // PAGE_SIZE)] for _ in range(num_families)]
    rows = [[*prefixes[s % num_families], *(next(pages) for _ in range(-(-own // PAGE_SIZE)))] for s in range(num_seqs)]
    return np.asarray(rows, np.int32), np.full(num_seqs, shared + own, np.int32)


def layers(families: SharedPrefixes | None, table: np.ndarray, cu_q_lens: np.ndarray, kv_lens: np.ndarray) -> Any:
    """A compiled stack of attentions, each with pages of its own, as in a model; bound to its arguments."""
    num_seqs = len(kv_lens)
    layout = PageLayout(
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    keys = jax.random.split(jax.random.key(0), NUM_LAYERS)
    pages = [
        jax.lax.bitcast_convert_type(jax.random.normal(key, layout.shape, jnp.bfloat16), jnp.uint16) for key in keys
    ]
    queries = jax.random.normal(jax.random.key(1), (NUM_LAYERS, num_seqs, NUM_Q_HEADS, HEAD_DIM), jnp.bfloat16)
    geometry = Geometry.from_arrays(queries[0], pages[0], table, num_decode_slots=num_seqs)
    arrays = jax.tree.map(jnp.asarray, (table, cu_q_lens, kv_lens, np.array([num_seqs], np.int32)))

    @jax.jit
    def run(queries: Any, pages: Any, arrays: Any, families: Any) -> jax.Array:
        schedule = make_schedule(*arrays[1:], geometry=geometry, shared=families)
        return jnp.stack(
            [
                paged_attention(q, kv, *arrays, num_decode_slots=num_seqs, shared=families, schedule=schedule)
                for q, kv in zip(queries, pages, strict=True)
            ]
        )

    shared = None if families is None else SharedPrefixes(*map(jnp.asarray, families))
    return lambda: run(queries, pages, arrays, shared)


if __name__ == "__main__":
    main()
