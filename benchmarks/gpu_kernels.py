"""The Hopper kernels on a card, in one go: numbers against the float64 oracle, then times against the card's limits.

    PYTHONPATH=. python3 benchmarks/gpu_kernels.py [--out benchmarks/results] [--only SECTION ...] [--seed N]

Needs JAX with CUDA and a card of compute capability 9.0; without one it says so, exits 2 and writes no figures. Every
section is guarded: one that fails leaves its error in the results and the others run. Results are written as they come,
to OUT/gpu_kernels_<card>.json. Under ten minutes.

Times: many calls are enqueued before the host waits, and the host's clock is divided by their number; calls of less
than LOOP_BELOW_S are also run by a loop inside one program, as the layers of a model are, and the faster way counts.
Median, least and most of several rounds. Bytes are those of the keys and values read once, operations 4 * D for each
query head and visible key; both are set against the card's own copy bandwidth and matrix rate, measured first. The
peers get keys and values gathered into dense arrays beforehand: gathering is not in their times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's process wants memory too

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernels_pallas import Geometry, paged_attention
from kernels_pallas.api import make_schedule
from kernels_pallas.backends import load
from kernels_pallas.families import FamilyPlanner
from kernels_pallas.family_costs import COSTS
from oracles.paged_cases import check_attend, make_case

ROOT = Path(__file__).resolve().parents[1]
MAX_CALLS, REPEATS, ROUND_S, LOOP_BELOW_S = 64, 9, 0.03, 300e-6
CHECK_THREADS = 8
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64  # Llama-3-8B
SCALE = 1 / math.sqrt(DIM)
KEY_BYTES = 2 * KV_HEADS * DIM * 2
TARGETS = {  # at least so much of the ceiling; of shared_prefix: times as fast as plain decode on pages of their own
    "decode_64x8k": 0.80,
    "prefill_2k_over_8k": 0.55,
    "shared_prefix": 8.0,
}


class Results:
    """Everything measured so far, written to `path` after every change."""

    def __init__(self, path: Path, head: dict) -> None:
        self.path = path
        targets = {name: {"target": least, "measured": None, "met": None} for name, least in TARGETS.items()}
        self.data = {**head, "targets": targets, "ceilings": {}, "checks": [], "timings": [], "errors": []}

    def add(self, kind: str, **row: object) -> None:
        self.data[kind].append(row)
        self.flush()
        print(f"{kind[:-1]}: " + "  ".join(f"{k} {_short(v)}" for k, v in row.items()), flush=True)

    def hold(self, name: str, measured: float | None) -> dict[str, object]:
        """Sets a figure against its target, among `targets` too. met is None where nothing was measured."""
        row = self.data["targets"][name]
        row.update(measured=measured, met=None if measured is None else measured >= row["target"])
        return {"target": row["target"], "met": row["met"]}

    def flush(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def guarded(self, name: str, run, *args, **kw):
        """run(...)'s result, or None and its error among the results."""
        started = time.monotonic()
        try:
            return run(*args, **kw)
        except Exception as error:  # whatever it is, the other sections are to run
            self.add("errors", name=name, error=f"{type(error).__name__}: {error}"[:4000])
            traceback.print_exc(limit=-4)
            return None
        finally:
            print(f"  {name}: {time.monotonic() - started:.1f} s", flush=True)


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def measure(run, *args) -> dict[str, object]:
    """One run(*args): median, least and most seconds, and how that was found. args[0] goes from call to call."""
    enqueued = _rounds(jax.jit(run), args, calls_inside=1)
    if enqueued["median_s"] > LOOP_BELOW_S:
        return {**enqueued, "how": "enqueued"}

    def loop(first, *rest):
        def body(carry, _):
            first, _ = carry
            return lax.optimization_barrier((first, run(first, *rest))), None

        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(run, first, *rest))
        return lax.scan(body, (first, start), length=MAX_CALLS)[0][1]

    looped = _rounds(jax.jit(loop), args, calls_inside=MAX_CALLS)
    if looped["median_s"] < enqueued["median_s"]:
        return {**looped, "how": "looped", "enqueued_s": enqueued["median_s"]}
    return {**enqueued, "how": "enqueued", "looped_s": looped["median_s"]}


def _rounds(run, args, *, calls_inside: int) -> dict[str, float]:
    jax.block_until_ready(run(*args))  # compiles
    started = time.perf_counter()
    jax.block_until_ready(run(*args))
    once_s = time.perf_counter() - started
    calls = max(1, min(MAX_CALLS, round(ROUND_S / once_s)))
    seconds = []
    for _ in range(REPEATS if once_s < 0.1 else 3):
        started = time.perf_counter()
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - started) / (calls * calls_inside))
    return {"median_s": float(np.median(seconds)), "least_s": min(seconds), "most_s": max(seconds)}


# ---- ceilings ----


def ceilings(results: Results) -> None:
    words = jax.random.bits(jax.random.key(0), (1 << 30,), jnp.uint32)  # 4 GiB, many times the L2
    copy_s = measure(lambda x: x ^ jnp.uint32(0x5A5A5A5A), words)["median_s"]
    bandwidth = 2 * words.nbytes / copy_s
    del words
    a, b = (jax.random.normal(jax.random.key(i), (8192, 8192), jnp.bfloat16) for i in range(2))
    rate = 2 * 8192**3 / measure(jnp.dot, a, b)["median_s"]
    results.data["ceilings"] = {"copy_bytes_per_s": bandwidth, "bf16_flop_per_s": rate}
    results.flush()
    print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s", flush=True)


# ---- checks ----


def _cases() -> dict[str, tuple[dict, dict]]:
    """name -> (the case, how to attend). Every variant of the kernel, at odd lengths; NaN in what nobody may read."""
    decode = {"q_lens": [1] * 9, "kv_lens": [1, 15, 0, 16, 17, 63, 64, 65, 3000], "num_decode": 9}
    chunks = {"q_lens": [1, 127, 40, 200, 64], "kv_lens": [1, 128, 900, 333, 64], "num_decode": 0}
    mixed = {"q_lens": [1, 1, 1, 45, 130], "kv_lens": [700, 0, 129, 45, 2100], "num_decode": 3, "token_padding": 9}
    cases = {}
    for head_dim in (64, 128, 256):
        for page_size in (16, 64, 128):
            shape = {"head_dim": head_dim, "page_size": page_size, "kv_heads": 2}
            name = f"D{head_dim} page {page_size}"
            cases[f"decode {name}"] = ({**decode, **shape, "group": 4}, {})
            cases[f"chunks {name}"] = ({**chunks, **shape, "group": 3}, {})
        shape = {"head_dim": head_dim, "page_size": 32, "kv_heads": 2, "seq_padding": 2}
        cases[f"mixed D{head_dim}"] = ({**mixed, **shape, "group": 5}, {})
        low = {"first_readable": [544, 0, 0, 0, 1856]}
        cases[f"window and cap D{head_dim}"] = (
            {**mixed, **shape, "group": 2, **low},
            {"sliding_window": 100, "soft_cap": 20.0},
        )
        family = {"q_lens": [70, 3], "kv_lens": [2048, 256], "kv_starts": [0, 128], "num_decode": 0}
        cases[f"families D{head_dim}"] = ({**family, **shape, "group": 4}, {"causal": False})
    wide = {"head_dim": 128, "page_size": 64, "kv_heads": 1}
    cases["decode, group 64"] = ({**decode, **wide, "group": 64}, {})
    cases["decode, group 71"] = ({**decode, **wide, "group": 71}, {})
    cases["decode of one long sequence"] = (
        {"q_lens": [1], "kv_lens": [40001], "num_decode": 1, **wide, "group": 8},
        {},
    )
    cases["window over split keys"] = (
        {
            "q_lens": [1, 130],
            "kv_lens": [4000, 2100],
            "num_decode": 1,
            **wide,
            "group": 4,
            "first_readable": [2944, 960],
        },
        {"sliding_window": 1000},
    )
    cases["float32 queries"] = ({**mixed, **wide, "group": 8, "q_dtype": jnp.float32}, {})
    return cases


def checks(results: Results, seed: int) -> None:
    cases = _cases()
    with ThreadPoolExecutor(CHECK_THREADS) as pool:  # most of it is compiling
        futures = {
            name: pool.submit(_check, case, how, seed + i) for i, (name, (case, how)) in enumerate(cases.items())
        }
        for i, (name, future) in enumerate(futures.items()):
            errors = results.guarded(f"check {name}", future.result)
            results.add("checks", name=name, passed=errors is not None, seed=seed + i, **(errors or {}))


def _check(case_kw: dict, how: dict, seed: int) -> dict[str, float]:
    """Relative errors by norm of one case; AssertionError where one is past the tolerance or a NaN came through."""
    case = make_case(seed, backend="gpu", page_dtype=jnp.bfloat16, **{"q_dtype": jnp.bfloat16, **case_kw})
    out, lse = check_attend(case, **how)
    want, want_lse = case.want(scale=1 / math.sqrt(case.layout.head_dim), **{"causal": True, **how})
    got, got_lse = np.asarray(out, np.float64)[: case.num_tokens], lse[: case.num_tokens]
    seen = np.isfinite(want_lse)
    return {
        "out_error": float(np.linalg.norm(got - want) / np.linalg.norm(want)),
        "lse_error": float(np.linalg.norm(got_lse[seen] - want_lse[seen]) / np.linalg.norm(want_lse[seen])),
        "tolerance": case.tolerance,
    }


# ---- timings ----


class Workload:
    """Random queries and pages of one layer. q_lens, kv_lens: the sequences. shared: their first so many keys are the
    same pages; else every sequence has pages of its own, in random order."""

    def __init__(self, q_lens: list[int], kv_lens: list[int], *, num_decode: int, shared: int = 0) -> None:
        pages, first = [-(-n // PAGE) for n in kv_lens], shared // PAGE
        num_pages = first + sum(n - first for n in pages)
        order = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        self.table = np.zeros((len(kv_lens), max(pages)), np.int32)
        used = first
        for row, count in zip(self.table, pages, strict=True):
            row[:first] = order[:first]
            row[first:count] = order[used : used + count - first]
            used += count - first
        self.q_lens, self.kv_lens, self.num_decode = q_lens, kv_lens, num_decode
        self.cu_q_lens = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        keys = jax.random.split(jax.random.key(1), 2)
        self.q = jax.random.normal(keys[0], (sum(q_lens), HEADS, DIM), jnp.bfloat16)
        make = jax.jit(lambda key: jax.random.normal(key, (num_pages, KV_HEADS, 2, PAGE, DIM), jnp.bfloat16))
        self.kv_pages = make(keys[1])

    @property
    def lengths(self) -> list[jax.Array]:
        return [jnp.asarray(x, jnp.int32) for x in (self.cu_q_lens, self.kv_lens, [len(self.kv_lens)])]

    def attention(self, backend: str, *, families: bool = False):
        """A function of (q, pages, ...) and its arguments; the schedule is computed beforehand, as a step does."""
        table, lengths = jnp.asarray(self.table), self.lengths
        pages = self.kv_pages
        if backend == "jnp":
            pages = lax.bitcast_convert_type(pages, jnp.uint16)
        geometry = Geometry.from_arrays(self.q, pages, table, num_decode_slots=self.num_decode)
        shared = None
        if families:
            planner = FamilyPlanner(page_size=PAGE, costs=COSTS["gpu"], levels=1)
            plan = planner.plan(
                self.table,
                self.cu_q_lens,
                np.array(self.kv_lens, np.int32),
                num_decode_slots=self.num_decode,
                num_tokens=len(self.q),
            )
            assert plan.num_families[0] == 1, "the planner found no family"
            shared = jax.tree.map(jnp.asarray, plan)
        schedule = jax.jit(partial(make_schedule, geometry=geometry, backend=backend))(*lengths, shared=shared)
        run = partial(paged_attention, num_decode_slots=self.num_decode, sm_scale=SCALE, backend=backend)

        def attend(q, pages, table, lengths, shared, schedule):
            return run(q, pages, table, *lengths, shared=shared, schedule=schedule)

        return attend, (self.q, pages, table, lengths, shared, schedule)

    def dense(self) -> tuple[jax.Array, jax.Array]:
        """K and V [S, keys, Hkv, D], all sequences of one length."""
        gather = jax.jit(lambda pages, table: pages[table].transpose(3, 0, 1, 4, 2, 5))  # [2, S, pages, PAGE, Hkv, D]
        both = gather(self.kv_pages, jnp.asarray(self.table)).reshape(2, len(self.kv_lens), -1, KV_HEADS, DIM)
        return both[0], both[1]


def cudnn(work: Workload):
    """cuDNN's fused attention by jax.nn on dense keys; a chunk's queries are the last of its keys."""
    k, v = work.dense()
    num, q_len, keys = len(work.q_lens), work.q_lens[0], k.shape[1]
    q = work.q.reshape(num, q_len, HEADS, DIM)

    def attend(q, k, v):
        bias = None
        if q_len > 1:  # causal, counted from the end: cuDNN's own mask counts from the start
            visible = jnp.arange(keys)[None, :] <= jnp.arange(q_len)[:, None] + keys - q_len
            bias = jnp.where(visible, 0.0, -1e30).astype(q.dtype)[None, None]
        return jax.nn.dot_product_attention(q, k, v, bias=bias, scale=SCALE, implementation="cudnn")

    return attend, (q, k, v)


def cudnn_square(work: Workload):
    """The same number of operations in the form cuDNN likes best: causal, as many queries as keys."""
    flop_ratio = _flops(work) / (4 * DIM * HEADS)
    length = round(math.sqrt(2 * flop_ratio) / 64) * 64
    q = jax.random.normal(jax.random.key(2), (1, length, HEADS, DIM), jnp.bfloat16)
    k, v = (jax.random.normal(jax.random.key(i), (1, length, KV_HEADS, DIM), jnp.bfloat16) for i in (3, 4))
    attend = partial(jax.nn.dot_product_attention, is_causal=True, scale=SCALE, implementation="cudnn")
    return attend, (q, k, v)


def _flops(work: Workload) -> float:
    visible = sum(n * (kv - n) + n * (n + 1) / 2 for n, kv in zip(work.q_lens, work.kv_lens, strict=True))
    return 4 * DIM * HEADS * visible


def timing(results: Results, name: str, contender: str, make, *, of: dict[str, float], **more) -> float | None:
    """Times make() -> (function, arguments) and adds the row. of: {"bytes"|"flops": how many one call takes}."""

    def run() -> float:
        attend, args = make()
        row = {"name": name, "contender": contender, **measure(attend, *args), **more}
        for unit, amount in of.items():
            ceiling = results.data["ceilings"].get({"bytes": "copy_bytes_per_s", "flops": "bf16_flop_per_s"}[unit])
            row[f"{unit}_per_s"] = amount / row["median_s"]
            if ceiling:
                row["of_ceiling"] = amount / row["median_s"] / ceiling
        if contender == "gpu" and name in TARGETS:
            row.update(results.hold(name, row.get("of_ceiling")))
        results.add("timings", **row)
        return row["median_s"]

    return results.guarded(f"time {name} {contender}", run)


def decode(results: Results) -> None:
    for name, num, keys, peers in (
        ("decode_64x8k", 64, 8192, True),
        ("decode_256x2k", 256, 2048, False),
        ("decode_1x128k", 1, 131072, True),
        ("decode_8x32k", 8, 32768, False),
    ):
        work = Workload([1] * num, [keys] * num, num_decode=num)
        of = {"bytes": num * keys * KEY_BYTES}
        timing(results, name, "gpu", partial(work.attention, "gpu"), of=of)
        if peers:
            timing(results, name, "jnp", partial(work.attention, "jnp"), of=of)
            timing(results, name, "cudnn", partial(cudnn, work), of=of)
        del work


def prefill(results: Results) -> None:
    for name, new, cached, peers in (
        ("prefill_2k_over_8k", 2048, 8192, True),
        ("prefill_8k", 8192, 0, False),
        ("prefill_512_over_32k", 512, 32768, False),
    ):
        work = Workload([new], [new + cached], num_decode=0)
        of = {"flops": _flops(work)}
        timing(results, name, "gpu", partial(work.attention, "gpu"), of=of)
        if peers:
            timing(results, name, "jnp", partial(work.attention, "jnp"), of=of)
            timing(results, name, "cudnn", partial(cudnn, work), of=of)
            timing(results, name, "cudnn, square", partial(cudnn_square, work), of=of)


def shared_prefix(results: Results) -> None:
    """64 sequences, 8k shared and 256 of their own, against decode that reads every sequence's 8k for itself."""
    keys = [8192 + 256] * 64
    of = {"bytes": (8192 + 64 * 256) * KEY_BYTES}
    work = Workload([1] * 64, keys, num_decode=64, shared=8192)
    best = timing(results, "shared_prefix", "families", partial(work.attention, "gpu", families=True), of=of)
    same = timing(results, "shared_prefix", "plain, the same pages (L2 helps)", partial(work.attention, "gpu"), of=of)
    jnp_families = partial(work.attention, "jnp", families=True)
    timing(results, "shared_prefix", "jnp families", jnp_families, of=of)
    error = results.guarded("shared_prefix agreement", _agreement, work)
    del work
    work = Workload([1] * 64, keys, num_decode=64)
    plain = timing(results, "shared_prefix", "plain, pages of their own", partial(work.attention, "gpu"), of={})
    if best and same and plain:
        row = {"speedup_own_pages": plain / best, "speedup_same_pages": same / best}
        row.update(results.hold("shared_prefix", plain / best))
        results.add("timings", name="shared_prefix", contender="families over plain", difference=error, **row)


def _agreement(work: Workload) -> float:
    """Relative difference by norm of the two ways to the same numbers."""
    outs = []
    for families in (False, True):
        attend, args = work.attention("gpu", families=families)
        outs.append(np.asarray(jax.jit(attend)(*args), np.float64))
    difference = float(np.linalg.norm(outs[1] - outs[0]) / np.linalg.norm(outs[0]))
    assert difference < 1e-2, f"families and plain decode differ by {difference:.2e}"
    return difference


def surroundings(results: Results) -> None:
    """What a layer pays around the kernel: the schedule (once a step) and the write of new keys."""
    work = Workload([1] * 64, [8192] * 64, num_decode=64)
    table, lengths = jnp.asarray(work.table), work.lengths
    geometry = Geometry.from_arrays(work.q, work.kv_pages, table, num_decode_slots=64)

    def schedule(kv_lens):
        return jax.tree.leaves(
            make_schedule(lengths[0], kv_lens, lengths[2], geometry=geometry, backend="gpu"),
        )

    timing(results, "schedule, 64 slots", "gpu", lambda: (schedule, (lengths[1],)), of={})
    write = jax.jit(load("gpu").write_kv, donate_argnums=0)
    new = jax.random.normal(jax.random.key(5), (2, 64, KV_HEADS, DIM), jnp.bfloat16)
    pages, slots = work.kv_pages, jnp.arange(64, dtype=jnp.int32) * PAGE
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        for _ in range(MAX_CALLS):
            pages = write(pages, new[0], new[1], slots)
        jax.block_until_ready(pages)
        seconds.append((time.perf_counter() - started) / MAX_CALLS)
    results.add("timings", name="write_kv, 64 tokens", contender="gpu", median_s=float(np.median(seconds[1:])))


def torch_peers(results: Results) -> None:
    """PyTorch and FlashInfer in a process of their own; one JSON row a line."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_attention_torch.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            results.add("errors" if "error" in row else "timings", **row)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-2000:]}")


SECTIONS = {
    "ceilings": ceilings,
    "checks": None,
    "decode": decode,
    "prefill": prefill,
    "shared_prefix": shared_prefix,
    "surroundings": surroundings,
    "torch": torch_peers,
}


def hopper() -> jax.Device | None:
    """The first device, where it is a Hopper card."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    return device if device.platform == "gpu" and capability == "9.0" else None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({error})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seed", type=int, default=None, help="of the checks; default: from the clock")
    args = parser.parse_args()
    device = hopper()
    if device is None:
        print(f"no Hopper card here (found {jax.devices()[0]}): nothing was measured", file=sys.stderr)
        return 2
    card = device.device_kind.lower().replace(" ", "_")
    head = {
        "card": device.device_kind,
        "driver": _driver(),
        "jax": jax.__version__,
        "command": shlex.join(["python3", "benchmarks/gpu_kernels.py", *sys.argv[1:]]),
        "heads": {"query": HEADS, "key": KV_HEADS, "head_dim": DIM, "page_size": PAGE},
    }
    results = Results(args.out / f"gpu_kernels_{card}.json", head)
    results.flush()
    seed = int(time.time()) if args.seed is None else args.seed
    for name in args.only:
        section = SECTIONS[name] or partial(checks, seed=seed)
        results.guarded(name, section, results)
    failed = [row["name"] for row in results.data["checks"] if not row["passed"]]
    print(f"{results.path}: {len(results.data['checks'])} checks, failed: {failed or 'none'}")
    print_targets(results)
    return 1 if failed or results.data["errors"] else 0


def print_targets(results: Results) -> None:
    """The targets missed, and those of which nothing was measured."""
    for name, row in results.data["targets"].items():
        if row["met"] is None:
            print(f"target {name}: not measured, at least {row['target']:g} wanted")
        elif not row["met"]:
            print(f"target {name}: MISSED, {row['measured']:.3g} where at least {row['target']:g} was wanted")


if __name__ == "__main__":
    sys.exit(main())
