"""Searches block sizes for a TPU generation: `python -m kernels_pallas.tpu.search --generation v6e --variant prefill`.

With --on-chip each candidate is timed on the TPU at hand. Without, libtpu compiles it, which says whether it fits, and
the compiler's schedule is read: how many instruction bundles a block of keys takes, without stalls. That ranks
candidates, no more; the copies of a block run beside it, so a decode block only has to take no longer than its bytes
do. Prints entries of `block_sizes.json`, best first.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.aot.topology import GENERATIONS, TpuCompileError, TpuTopology
from kernels_pallas.geometry import Geometry
from kernels_pallas.layout import PageLayout
from kernels_pallas.tpu import attend, make_schedule
from kernels_pallas.tpu.blocks import BlockSizes, Variant, current_chip
from kernels_pallas.tpu.tiles import Tile

_LINE = re.compile(r"\s*0x[0-9a-f]+\s+(LB)?[A-Z]*:?\s*:?\s*(>*)")
_REPEATS = 10


@dataclass(frozen=True, kw_only=True)
class Result:
    """cost: seconds of a call where timed, else bundles for each key (decode) or each 1,000 scores (prefill)."""

    sizes: BlockSizes
    vmem_bytes: int
    cost: float | None
    why_not: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    variant: Variant
    geometry: Geometry

    @classmethod
    def of(cls, args: argparse.Namespace) -> Problem:
        decode = args.variant == "decode"
        num_seqs = 256 if decode else 8
        return cls(
            variant=args.variant,
            geometry=Geometry(
                num_tokens=num_seqs if decode else 2048,
                num_seqs=num_seqs,
                pages_per_seq=args.context // args.page_size,
                num_q_heads=args.heads * args.group,
                num_kv_heads=args.heads,
                head_dim=args.head_dim,
                page_size=args.page_size,
                num_decode_slots=num_seqs if decode else 0,
                page_dtype=jnp.dtype(args.page_dtype),
                q_dtype=jnp.dtype(args.q_dtype),
            ),
        )

    def candidates(self) -> Iterator[BlockSizes]:
        if self.variant == "decode":
            for keys, buffers, heads in itertools.product((256, 512, 1024), (4,), (4, 8)):
                yield BlockSizes(rows=8, keys=keys, buffers=buffers, heads=heads)
        else:
            for rows, keys in itertools.product((256, 512, 1024), (512, 1024)):
                yield BlockSizes(rows=rows, keys=keys, buffers=2, heads=1)

    def program(self, sizes: BlockSizes) -> Callable[..., Any]:
        geometry = self.geometry

        def run(q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, *lengths: jax.Array) -> Any:
            cu_q_lens, kv_starts, kv_lens, num_seqs = lengths
            schedule = make_schedule(*lengths, geometry=geometry, decode_sizes=sizes, prefill_sizes=sizes)
            return attend(
                q,
                kv_pages,
                page_table,
                cu_q_lens,
                kv_starts,
                kv_lens,
                num_seqs,
                schedule,
                geometry=geometry,
                causal=True,
                sm_scale=geometry.head_dim**-0.5,
                sliding_window=None,
                soft_cap=None,
            )

        return run

    def arrays(self) -> tuple[jax.Array, ...]:
        """Every sequence at full length, in pages of its own as far as 4 GiB hold them."""
        g = self.geometry
        sizes: dict[str, Any] = {"page_size": g.page_size, "num_kv_heads": g.num_kv_heads, "head_dim": g.head_dim}
        page_bytes = PageLayout(num_pages=1, dtype=g.page_dtype, backend="tpu", **sizes).page_bytes
        num_pages = min(g.num_seqs * g.pages_per_seq, (4 << 30) // page_bytes)
        layout = PageLayout(num_pages=num_pages, dtype=g.page_dtype, backend="tpu", **sizes)
        entries = jnp.arange(g.num_seqs * g.pages_per_seq, dtype=jnp.int32) % num_pages
        each = g.num_tokens // g.num_seqs
        return (
            jnp.ones((g.num_tokens, g.num_q_heads, g.head_dim), g.q_dtype),
            jnp.ones(layout.shape, layout.storage_dtype),
            entries.reshape(g.num_seqs, g.pages_per_seq),
            jnp.arange(g.num_seqs + 1, dtype=jnp.int32) * each,
            jnp.zeros(g.num_seqs, jnp.int32),
            jnp.full(g.num_seqs, g.pages_per_seq * g.page_size, jnp.int32),
            jnp.full(1, g.num_seqs, jnp.int32),
        )


def search(problem: Problem, measure: Callable[[Problem, BlockSizes], float]) -> list[Result]:
    """The candidates, best first; those that do not fit last, with the reason."""
    results = []
    for sizes in problem.candidates():
        tile = Tile.of(problem.geometry, problem.variant, sizes)
        try:
            cost, why_not = measure(problem, sizes), ""
        except (ValueError, TpuCompileError, jax.errors.JaxRuntimeError) as error:
            cost, why_not = None, str(error).splitlines()[0][:200]
        results.append(Result(sizes=sizes, vmem_bytes=tile.vmem_bytes, cost=cost, why_not=why_not))
    return sorted(results, key=lambda result: (result.cost is None, result.cost))


def time_on_chip(problem: Problem, sizes: BlockSizes) -> float:
    run = jax.jit(problem.program(sizes))
    arrays = problem.arrays()
    jax.block_until_ready(run(*arrays))
    started = time.perf_counter()
    for _ in range(_REPEATS):
        result = run(*arrays)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / _REPEATS


def read_schedule(problem: Problem, sizes: BlockSizes, *, topology: TpuTopology, dumps: Path) -> float:
    """Compiles and counts bundles; `dumps` is where libtpu was told to leave its schedules."""
    for old in dumps.iterdir():
        old.unlink()
    topology.compile(problem.program(sizes), *jax.eval_shape(problem.arrays))
    found = [path for path in dumps.glob("*paged_attention*final_bundles.txt") if "analysis" not in path.name]
    if not found:
        raise ValueError(f"no schedule of the kernel in {dumps}: this libtpu does not write them")
    tile = Tile.of(problem.geometry, problem.variant, sizes)
    bundles = bundles_of_a_block(found[0].read_text(), tile)
    return bundles / tile.block_keys if problem.variant == "decode" else 1000 * bundles / (tile.rows * tile.block_keys)


def bundles_of_a_block(schedule: str, tile: Tile) -> float:
    """Bundles to fetch a full block of keys and to add it to the softmax, for each key head in prefill.

    A bundle's depth of loops is drawn in front of it: tiles are ">", their blocks ">>", and in those ">>>" are the
    pages to fetch, to wait for and to clear, and then the heads unless they all go at once.
    """
    loops: list[list[int]] = []  # [depth, bundles]
    for line in schedule.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match[2])
        if match[1]:
            loops.append([depth, 0])
        inside = [loop for loop in loops if loop[0] == depth] if depth else loops
        if inside:
            inside[-1][1] += 1
    first_inner = next(i for i, (depth, _) in enumerate(loops) if depth == 3)
    inner = [bundles for depth, bundles in loops if depth == 3]
    pages = (inner[0] + inner[1]) * tile.block_pages
    block = loops[first_inner - 1][1]
    head_steps = tile.num_kv_heads // tile.heads
    one_pass = block + pages + (inner[-1] * head_steps if head_steps > 1 or tile.variant == "prefill" else 0)
    return one_pass if tile.variant == "decode" else one_pass / tile.num_kv_heads


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tpu.search", description=__doc__)
    parser.add_argument("--generation", default="v6e", choices=[*GENERATIONS], help="to compile for")
    parser.add_argument("--on-chip", action="store_true", help="time the candidates on the TPU here")
    parser.add_argument("--variant", default="decode", choices=["decode", "prefill"])
    parser.add_argument("--head-dim", type=int, default=128, choices=[64, 128, 256])
    parser.add_argument("--page-dtype", default="bfloat16", choices=["bfloat16", "float32", "int8", "float8_e4m3fn"])
    parser.add_argument("--q-dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--heads", type=int, default=8, help="key heads of one device")
    parser.add_argument("--group", type=int, default=4, help="query heads a key head")
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--context", type=int, default=8192, help="tokens of a sequence")
    return parser


def main() -> None:
    args = _parser().parse_args()
    problem = Problem.of(args)
    if args.on_chip:
        unit, results, generation = "seconds", search(problem, time_on_chip), current_chip().generation
    else:
        generation = args.generation
        unit = "bundles a key" if problem.variant == "decode" else "bundles a head and 1,000 scores"
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LIBTPU_INIT_ARGS"] = (  # read when libtpu is loaded
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                "--xla_jf_dump_llo_pass_label_regex=final_bundles"
            )
            topology = TpuTopology.of(generation)
            results = search(problem, partial(read_schedule, topology=topology, dumps=Path(folder)))
    print(
        f"{generation} {args.variant} head_dim {args.head_dim} {args.page_dtype}: [rows, keys, buffers, heads], {unit}"
    )
    for result in results:
        s = result.sizes
        cost = f"does not fit: {result.why_not}" if result.cost is None else f"{result.cost:.4g}"
        print(f"[{s.rows}, {s.keys}, {s.buffers}, {s.heads}]  VMEM about {result.vmem_bytes >> 20} MiB  {cost}")


if __name__ == "__main__":
    main()
