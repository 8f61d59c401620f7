"""Where a step's time goes on the CPU, item by item: every item of every kernel stamped on the thread that runs it.

    python benchmarks/kernel_items.py [WORKLOAD] [--config FILE] [--json OUT]

A step's work is handed to kernels_pallas.cpu in calls, a call's items to all threads. Here each kernel notes the
processor's cycle counter around every item, which costs a hundredth of a second a round. Of the steps of each kind it
tells, by kernel: calls; *ms*, from the call to its last item's end; *busy*, what its items took, shared evenly among
the threads; *late*, until the second thread began its first item; *idle*, what a thread had no item of the call for.
The rest of a step is between the calls: XLA's own operations, and nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from step_breakdown import Recorder, serve

from kernels_pallas.cpu import call, ffi, jit
from kernels_pallas.cpu.ir import I64, PTR, Function, Module, Value
from kernels_pallas.cpu.matmul import MatMul
from preble_jax.bench.machine import describe_machine
from preble_jax.bench.workloads import find_workload
from preble_jax.config_files import OFFLINE_CONFIG, load_config, parse_overrides
from preble_jax.engine.engine import Engine
from preble_jax.progress import make_progress
from preble_jax.sched.sequence import StepPlan

MOST_STAMPS = 1 << 22
FIRST_KERNEL = "embedding"  # of a step
WIDTH = 5  # kernel; a call's items or -1; begin; end; thread, by where its stack lies
STACK_BITS = 22


class Stamps:
    """Kernels that are compiled while this is installed leave a row for each call and each item."""

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self._rows = np.zeros((MOST_STAMPS + 1, WIDTH), np.int64)  # the first counts the others

    def install(self) -> None:
        write_handler = ffi.write_handler

        def stamped(module: Module, name: str, num_args: int, num_results: int, body: Any, count: Any) -> None:
            kernel = len(self.kernels)
            self.kernels.append(_label(body.__self__))

            def stamped_body(f: Function, buffers: list[Value], item: Value) -> None:
                begin = _cycles(f)
                body(f, buffers, item)
                self._stamp(f, kernel, f.int64(-1), begin)

            def stamped_count(f: Function, buffers: list[Value]) -> Value:
                num_items = count(f, buffers)
                self._stamp(f, kernel, num_items, _cycles(f))
                return num_items

            write_handler(module, name, num_args, num_results, stamped_body, stamped_count)

        call.write_handler = stamped
        jit._place = lambda text: None  # an address of this process is in the code

    def clear(self) -> None:
        self._rows[0, 0] = 0

    def take(self) -> np.ndarray:
        """Rows in the order in which what they stamp began."""
        number = int(self._rows[0, 0])
        if number >= MOST_STAMPS:
            raise SystemExit(f"expected at most {MOST_STAMPS} stamps, got {number}: choose a smaller workload")
        rows = self._rows[1 : number + 1]
        return rows[np.lexsort((rows[:, 1] < 0, rows[:, 2]))]

    def _stamp(self, f: Function, kernel: int, num_items: Value, begin: Value) -> None:
        base = f.int64(self._rows.ctypes.data).convert("inttoptr", PTR)
        place = f.atomic_add(base, 1) + 1
        thread = f.intrinsic("llvm.frameaddress.p0", PTR, f.constant(0, "i32")).convert("ptrtoint", I64)
        with f.when(place.is_("<", MOST_STAMPS)):
            row = base.at(place * (8 * WIDTH))
            for number, value in enumerate((f.int64(kernel), num_items, begin, _cycles(f), thread)):
                row.at(8 * number).store(value)


def _label(kernel: Any) -> str:
    """A product's rows are many things; what it multiplies by tells which it is."""
    if not isinstance(kernel, MatMul):
        return str(kernel.name)
    return f"product {kernel.num_in} x {kernel.num_panels} panels, {kernel.epilogue}"


def _cycles(f: Function) -> Value:
    return f.intrinsic("llvm.readcyclecounter", I64)


class Calls:
    """Of a kernel, in steps of one kind. Milliseconds in all."""

    def __init__(self) -> None:
        self.number, self.ms, self.busy, self.late = 0, 0.0, 0.0, 0.0

    def add(self, rows: np.ndarray, ms_per_cycle: float, num_threads: int) -> float:
        """rows: of a call and its items. Returns when its last item had ended."""
        begin, items = rows[0, 2], rows[1:]
        if not len(items):
            return float(begin)
        threads = items[:, 4] >> STACK_BITS
        first = sorted(items[threads == thread, 2].min() for thread in np.unique(threads))
        end = items[:, 3].max()
        self.number += 1
        self.ms += (end - begin) * ms_per_cycle
        self.busy += (items[:, 3] - items[:, 2]).sum() * ms_per_cycle / num_threads
        self.late += ((first[1] if len(first) > 1 else end) - begin) * ms_per_cycle
        return float(end)


def kind(plan: StepPlan) -> str:
    if not plan.prefill:
        return "decoding only"
    return "prompts, few decode" if len(plan.decode) < 5 else "prompts, 5 and more decode"


def account(rows: np.ndarray, kernels: list[str], kinds: list[str], seconds: float) -> dict[str, dict[str, Any]]:
    """By kind of step: steps, ms a step, and calls by kernel. seconds: from the first stamp to the last one's end."""
    ms_per_cycle = 1e3 * seconds / (rows[:, 3].max() - rows[0, 2])
    num_threads = len(os.sched_getaffinity(0))
    (calls,) = np.nonzero(rows[:, 1] >= 0)
    edges = [*calls, len(rows)]
    steps = [i for i, at in enumerate(calls) if kernels[rows[at, 0]].startswith(FIRST_KERNEL)]
    if len(steps) != len(kinds):
        raise SystemExit(f"expected a call of {FIRST_KERNEL!r} a step, got {len(steps)} for {len(kinds)} steps")
    found: dict[str, dict[str, Any]] = {}
    for name, first, last in zip(kinds, steps, [*steps[1:], len(calls)], strict=True):
        of_kind = found.setdefault(name, {"steps": 0, "ms": 0.0, "kernels": defaultdict(Calls)})
        for i in range(first, last):
            which = kernels[rows[calls[i], 0]]
            end = of_kind["kernels"][which].add(rows[edges[i] : edges[i + 1]], ms_per_cycle, num_threads)
        following = rows[calls[last], 2] if last < len(calls) else end
        of_kind["steps"] += 1
        of_kind["ms"] += (following - rows[calls[first], 2]) * ms_per_cycle
    return found


def rows_of(of_kind: dict[str, Any]) -> list[dict[str, Any]]:
    """By kernel, the dearest first: milliseconds a step."""
    steps = of_kind["steps"]
    return [
        {
            "kernel": name,
            "calls": round(calls.number / steps, 2),
            "ms": round(calls.ms / steps, 3),
            "busy_ms": round(calls.busy / steps, 3),
            "late_ms": round(calls.late / steps, 3),
            "idle_ms": round((calls.ms - calls.busy) / steps, 3),
        }
        for name, calls in sorted(of_kind["kernels"].items(), key=lambda entry: -entry[1].ms)
    ]


def table(name: str, of_kind: dict[str, Any]) -> Table:
    rows, steps = rows_of(of_kind), of_kind["steps"]
    a_step = of_kind["ms"] / steps
    shown = Table(title=f"{name}: {steps} steps, {a_step:.1f} ms each", title_justify="left", box=box.SIMPLE)
    columns = ("kernel", "calls", "ms", "busy_ms", "late_ms", "idle_ms")
    for column in columns:
        shown.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        shown.add_row(*(str(row[column]) for column in columns))
    shown.add_row("between calls", "", f"{a_step - sum(row['ms'] for row in rows):.3f}")
    return shown


def main() -> None:
    overrides, rest = parse_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", default="agent")
    parser.add_argument("--config", default=OFFLINE_CONFIG)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args(rest)
    stamps = Stamps()
    stamps.install()
    engine = Engine.create(load_config(arguments.config, overrides), make_progress())
    workload = find_workload(arguments.workload, 0, engine.limits.vocab_size)
    serve(engine, workload)
    engine.reset_prefix_cache()
    recorder = Recorder(engine)
    stamps.clear()
    with recorder.recording():
        began = time.perf_counter()
        serve(engine, workload)
        seconds = time.perf_counter() - began
    kinds = [kind(plan) for _, plan, num_steps in recorder.plans for _ in range(num_steps)]
    found = account(stamps.take(), stamps.kernels, kinds, seconds)
    console = Console()
    console.print(f"{workload.name}: {seconds:.2f} s, {len(kinds)} steps")
    for name, of_kind in found.items():
        console.print(table(name, of_kind))
    if arguments.json:
        kept = {
            name: {"steps": v["steps"], "ms": v["ms"] / v["steps"], "kernels": rows_of(v)} for name, v in found.items()
        }
        document = {"machine": describe_machine(), "workload": workload.name, "seconds": seconds, "kinds": kept}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
