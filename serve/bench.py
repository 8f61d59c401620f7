"""`preble-jax bench engine`: workloads on one engine in this process, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from preble_jax.bench.machine import describe_machine
from preble_jax.bench.workloads import SHAPES, find_workload
from preble_jax.config import Config
from preble_jax.errors import ConfigError
from preble_jax.progress import make_progress
from serve.output_file import require_writable, write_file

if TYPE_CHECKING:
    from preble_jax.bench.rounds import Result

_FILE_WIDTH = 160
_COLUMNS = (
    *("requests", "seconds", "min..max", "req/s", "prompt tok/s", "output tok/s"),
    *("TTFT", "token", "hit", "host", "device", "compiled"),
)


def run_bench(config: Config, names: Sequence[str], seed: int, num_rounds: int, output: Path | None) -> int:
    """names: of workloads, or their files; none: all the named ones. Exit status 0."""
    if num_rounds < 1:
        raise ConfigError(f"--rounds: expected at least 1, got {num_rounds}; leave it out for 3")
    require_writable("--json", output)
    names = names or tuple(SHAPES)
    for name in names:  # bad ones are known before minutes of reading and compiling
        find_workload(name, seed)
    progress = make_progress()
    with progress.task("importing JAX"):
        from preble_jax.bench.rounds import measure
        from preble_jax.engine.engine import Engine

    engine = Engine.create(config, progress)
    workloads = [find_workload(name, seed, engine.limits.vocab_size) for name in names]
    results = measure(engine, workloads, num_rounds, progress)
    document = {
        "machine": describe_machine(),
        "config": {name: asdict(getattr(config, name)) for name in ("model", "kv", "engine", "mesh", "queue")},
        "num_pages": engine.runner.num_pages,
        "rounds": num_rounds,
        "workloads": [result.to_json() for result in results],
    }
    try:
        if output is not None:  # before what is printed, whose reader may go away
            write_file("--json", output, json.dumps(document, indent=2) + "\n")
    finally:
        console = Console()
        if not console.is_terminal:  # in a file a row stays a line
            console = Console(width=_FILE_WIDTH)
        console.print(bench_table(results, num_rounds))
    return 0


def bench_table(results: Sequence[Result], num_rounds: int) -> Table:
    """Medians of the rounds; latencies in milliseconds."""
    rounds = "1 round" if num_rounds == 1 else f"medians of {num_rounds} rounds"
    title = f"engine, {rounds}, each from an empty prefix cache; TTFT and token: p50/p90 in ms"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    table.add_column("workload")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(result.workload.name, *_cells(result))
    return table


def _cells(result: Result) -> list[str]:
    seen = result.median
    least, most = result.seconds_range
    return [
        f"{seen.num_requests}",
        f"{seen.seconds:.2f}",
        f"{least:.2f}..{most:.2f}",
        f"{seen.requests_per_s:.1f}",
        f"{seen.prompt_tokens_per_s:.0f}",
        f"{seen.output_tokens_per_s:.0f}",
        _milliseconds(seen.ttft_p50_s, seen.ttft_p90_s),
        _milliseconds(seen.inter_token_p50_s, seen.inter_token_p90_s),
        f"{seen.hit_ratio:.0%}",
        f"{seen.host_s / seen.seconds:.1%}",
        f"{seen.device_s / seen.seconds:.1%}",
        f"{max(r.num_compiles for r in result.rounds)}",
    ]


def _milliseconds(p50_s: float, p90_s: float) -> str:
    return f"{p50_s * 1e3:.1f}/{p90_s * 1e3:.1f}" if p90_s else "-"
