"""Where a step's time goes on the CPU: host work by part, the model by part, and each beside its floor.

    python benchmarks/step_breakdown.py [WORKLOAD ...] [--config FILE] [--json OUT] [--bandwidth 63] [--gflops 900]

Each workload runs once untraced, for the host's parts and the steps' seconds, and once under JAX's profiler with few
output tokens. A traced operation is attributed by the source lines it comes from, which the compiled program names
(hlo_parts.py). Traced seconds include the tracing: compare their sum with the untraced device time a step.

The floor of a part is the larger of two times: its bytes, every weight and every distinct page of a step read once, at
the machine's bandwidth; and its operations, of the tokens that had to be computed, at its peak. `--bandwidth` is in
GB/s, `--gflops` in GFLOP/s; the defaults are those of 2 cores with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hlo_parts import PARTS, module_name, trace_parts
from rich import box
from rich.console import Console
from rich.table import Table

from preble_jax import env
from preble_jax.bench.machine import describe_machine
from preble_jax.bench.rounds import Round, measure
from preble_jax.bench.workloads import Workload, find_workload
from preble_jax.config import Config
from preble_jax.config_files import OFFLINE_CONFIG, load_config, parse_overrides
from preble_jax.engine.engine import Engine
from preble_jax.engine.shapes import StepShape
from preble_jax.model import registry
from preble_jax.model.config import ModelConfig
from preble_jax.model.weights import open_checkpoint
from preble_jax.progress import make_progress
from preble_jax.request import Request
from preble_jax.sampling_params import SamplingParams
from preble_jax.sched.sequence import StepPlan

WORKLOADS = ("decode1", "decode8", "decode64", "prefill", "shared")
TRACED_TOKENS = 8  # a request: a trace of more has millions of events


@dataclass(frozen=True)
class Peaks:
    bytes_per_s: float
    flops_per_s: float

    def seconds(self, num_bytes: float, flops: float) -> float:
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)


@dataclass
class Steps:
    """All dispatches of one shape. seconds: by part, traced. floor_s: by part."""

    num_steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    floor_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def floors(plan: StepPlan, model: ModelConfig, peaks: Peaks, num_steps: int, page_size: int) -> dict[str, float]:
    """Seconds by part that these steps cannot take less than. Weights and pages count as bfloat16."""
    tokens = len(plan.decode) + sum(row.num_tokens for row in plan.prefill)
    seqs = len(plan.decode) + len(plan.prefill)
    pages = {page for row in plan.rows if row.sequence.pages for page in row.sequence.pages.pages}
    kv_bytes = len(pages) * page_size * model.num_layers * 4 * model.num_kv_heads * model.head_dim
    context = sum((row.start + row.num_tokens) * row.num_tokens for row in plan.prefill)
    context += sum(row.start + 1 for row in plan.decode)
    hidden, heads, layers = model.hidden_size, model.num_heads * model.head_dim, model.num_layers
    matrices = {  # weights of one layer; of the whole model for the last
        "qkv": layers * hidden * (heads + 2 * model.num_kv_heads * model.head_dim),
        "out": layers * heads * hidden,
        "mlp": layers * 3 * hidden * model.intermediate_size,
        "lm head": hidden * model.vocab_size,
    }
    rows = {"lm head": seqs}
    found = {
        part: peaks.seconds(2 * weights, 2 * weights * rows.get(part, tokens)) for part, weights in matrices.items()
    }
    found["attention"] = peaks.seconds(kv_bytes, 4 * layers * heads * context)
    return {part: seconds * num_steps for part, seconds in found.items()}


class Recorder:
    """Notes the plans that an engine's runner is given, in order."""

    def __init__(self, engine: Engine) -> None:
        self._runner: Any = engine.runner
        self.plans: list[tuple[StepShape, StepPlan, int]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        dispatch = self._runner.dispatch

        def noting(plan: StepPlan, *more: Any) -> Any:
            self.plans.append((self._runner.shapes.fit(plan), plan, plan.num_steps))
            return dispatch(plan, *more)

        self._runner.dispatch = noting
        try:
            yield
        finally:
            self._runner.dispatch = dispatch


def serve(engine: Engine, workload: Workload) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.max_tokens, ignore_eos=True)
    for number, prompt in enumerate(workload.prompts):
        engine.add(Request(request_id=f"traced-{number}", prompt_token_ids=prompt, sampling=sampling))
    while engine.has_work:
        engine.step()


def breakdown(engine: Engine, workload: Workload, model: ModelConfig, peaks: Peaks) -> dict[StepShape, Steps]:
    """Traces the workload with few output tokens. The engine has run it before."""
    recorder = Recorder(engine)
    short = replace(workload, max_tokens=min(workload.max_tokens, TRACED_TOKENS))
    found: dict[StepShape, Steps] = defaultdict(Steps)
    texts = {shape: program.as_text() for shape, program in engine.runner.programs.items()}

    engine.reset_prefix_cache()
    with recorder.recording():
        runs = trace_parts(
            lambda: serve(engine, short),
            {module_name(text) for text in texts.values()},
            lambda number: texts[recorder.plans[number][0]],
        )
    engine.reset_prefix_cache()
    page_size = engine.config.kv.page_size
    for (shape, plan, num_steps), seconds in zip(recorder.plans, runs, strict=True):
        steps = found[shape]
        steps.num_steps += num_steps
        for part, value in seconds.items():
            steps.seconds[part] += value
        for part, value in floors(plan, model, peaks, num_steps, page_size).items():
            steps.floor_s[part] += value
    return dict(found)


def host_table(rounds: dict[str, Round]) -> Table:
    table = Table(title="host and device, milliseconds a step, untraced", title_justify="left", box=box.SIMPLE)
    names = ("plan_s", "arrays_s", "dispatch_s", "settle_s", "host_s", "wait_s", "device_s")
    for column in ("workload", "steps", "dispatches", *(name.removesuffix("_s") for name in names), "host/device"):
        table.add_column(column, justify="left" if column == "workload" else "right")
    for name, seen in rounds.items():
        cells = [f"{1e3 * getattr(seen, part) / seen.num_steps:.3f}" for part in names]
        share = f"{seen.host_s / seen.device_s:.1%}"
        table.add_row(name, str(seen.num_steps), str(seen.num_dispatches), *cells, share)
    return table


def part_table(workload: str, found: dict[StepShape, Steps]) -> Table:
    table = Table(title=f"{workload}: the model, milliseconds a step", title_justify="left", box=box.SIMPLE)
    for column in ("step", "part", "traced", "share", "floor", "times floor"):
        table.add_column(column, justify="left" if column in ("step", "part") else "right")
    for shape, steps in sorted(found.items()):
        total, count = sum(steps.seconds.values()), steps.num_steps
        name = f"{shape.num_decode_slots} decoding + {shape.num_prefill_tokens} prompt tokens, {count} steps"
        for part in (*PARTS, "all"):
            seconds = total if part == "all" else steps.seconds.get(part, 0.0)
            floor = sum(steps.floor_s.values()) if part == "all" else steps.floor_s.get(part, 0.0)
            if seconds:
                times = (f"{1e3 * floor / count:.2f}", f"{seconds / floor:.1f}") if floor else ("", "")
                table.add_row(name, part, f"{1e3 * seconds / count:.2f}", f"{seconds / total:.0%}", *times)
                name = ""
    return table


def document(rounds: dict[str, Round], found: dict[str, dict[StepShape, Steps]], peaks: Peaks) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "bytes_per_s": peaks.bytes_per_s,
        "flops_per_s": peaks.flops_per_s,
        "rounds": {name: seen.to_json() for name, seen in rounds.items()},
        "parts": {
            name: [
                {"decode_slots": shape.num_decode_slots, "prompt_tokens": shape.num_prefill_tokens}
                | {"steps": steps.num_steps, "traced_s": dict(steps.seconds), "floor_s": dict(steps.floor_s)}
                for shape, steps in sorted(shapes.items())
            ]
            for name, shapes in found.items()
        },
    }


def main() -> None:
    overrides, rest = parse_overrides(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    parser.add_argument("--config", default=OFFLINE_CONFIG)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--bandwidth", type=float, default=63.0, help="GB/s")
    parser.add_argument("--gflops", type=float, default=900.0, help="GFLOP/s in bfloat16")
    arguments = parser.parse_args(rest)
    peaks = Peaks(arguments.bandwidth * 1e9, arguments.gflops * 1e9)
    config: Config = load_config(arguments.config, overrides)
    progress = make_progress()
    engine = Engine.create(config, progress)
    model = open_checkpoint(registry.resolve(config.model.name, progress)).model_config
    workloads = [find_workload(name, 0, engine.limits.vocab_size) for name in arguments.workloads]
    rounds = {r.workload.name: r.median for r in measure(engine, workloads, 3, progress)}
    found = {workload.name: breakdown(engine, workload, model, peaks) for workload in workloads}
    console = Console()
    console.print(host_table(rounds))
    for name, shapes in found.items():
        console.print(part_table(name, shapes))
    if arguments.json:
        arguments.json.write_text(json.dumps(document(rounds, found, peaks), indent=2) + "\n")
        console.print(f"compiled programs are kept in {env.cache_dir()}; written: {arguments.json}")


if __name__ == "__main__":
    main()
