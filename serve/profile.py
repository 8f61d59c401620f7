"""`preble-jax profile`: measures what work costs a device group on this machine, for the scheduler's cost model."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from preble_jax.bench.machine import num_cores, processor
from preble_jax.config import Config
from preble_jax.cost_file import write_costs
from preble_jax.progress import make_progress
from serve.cores import cores_by_group, pin_to_cores

if TYPE_CHECKING:
    from preble_jax.engine.profile import Profile


def run_profile(config: Config, output: Path | None, cores: tuple[int, ...] | None, num_rounds: int) -> int:
    """cores: None takes those that the first worker of the deployment would get. Prints the costs, and what was
    measured; with `output` they are written there too."""
    shares = cores_by_group(config.serve.groups)
    cores = cores or (shares[0] if shares else None)
    if cores:
        pin_to_cores(cores)  # before JAX is imported
    from preble_jax.engine.engine import Engine
    from preble_jax.engine.profile import measure

    progress = make_progress()
    profile = measure(Engine.create(config, progress), num_rounds, progress)
    costs = profile.costs()
    console = Console()
    console.print(_table(profile))
    console.print(_step_table(profile))
    console.print(" ".join(f"--config.sched.{name}={value:g}" for name, value in costs.items()), soft_wrap=True)
    if output is not None:
        write_costs(output, {**costs, **_circumstances(config, profile, num_rounds)})
        console.print(f"written; make a deployment use it: --config.sched.cost_file={output}", soft_wrap=True)
    return 0


def _table(profile: Profile) -> Table:
    table = Table(title="seconds of one device group", title_justify="left")
    for column in ("work", "measured", "fitted"):
        table.add_column(column, justify="left" if column == "work" else "right")
    for num, error in profile.prefill_errors().items():
        seconds = profile.prefill_s[num]
        table.add_row(f"prompt of {num} tokens", f"{seconds:.4f}", f"{seconds * (1 + error):.4f}")
    for num, seconds in profile.decode_step_s.items():
        table.add_row(f"step of {num} decoding sequences", f"{seconds:.4f}", "")
    return table


def _step_table(profile: Profile) -> Table:
    table = Table(title="seconds of one step", title_justify="left")
    for column in ("decoding", "of tokens", "shared", "chunks", "measured", "fitted"):
        table.add_column(column, justify="left" if column == "chunks" else "right")
    for kind, error in profile.step_errors().items():
        seconds = profile.step_s[kind]
        chunks = ", ".join(f"{extend} up to {length}" for extend, length in kind.chunks)
        sizes = (str(kind.num_decode), f"{kind.longest_decode:g}", f"{kind.num_shared:g}", chunks)
        table.add_row(*sizes, f"{seconds:.4f}", f"{seconds * (1 + error):.4f}")
    return table


def _circumstances(config: Config, profile: Profile, num_rounds: int) -> dict[str, object]:
    return {
        "prefill_s_by_tokens": profile.prefill_s,
        "prefill_relative_errors": {num: round(error, 3) for num, error in profile.prefill_errors().items()},
        "decode_step_s_by_batch": profile.decode_step_s,
        "context_tokens": profile.context_tokens,
        "engine": dict(profile.engine),
        "step_costs": None if profile.step_costs is None else profile.step_costs.to_json(),
        "steps": [
            {**kind._asdict(), "seconds": profile.step_s[kind], "relative_error": round(error, 3)}
            for kind, error in profile.step_errors().items()
        ],
        "rounds": num_rounds,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "devices": profile.devices,
        "cores": num_cores(),
        "machine": f"{platform.machine()}, {processor()}",
    }
