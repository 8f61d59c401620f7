"""`preble-jax profile`: measures what work costs a device group on this machine, for the scheduler's cost model."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from preble_jax.bench.machine import num_cores, processor
from preble_jax.config import Config
from preble_jax.cost_file import write_costs
from preble_jax.errors import ConfigError
from preble_jax.progress import make_progress
from preble_jax.sched.step_costs import StepKind
from serve.cores import cores_by_group, pin_to_cores
from serve.neighbours import Neighbours

if TYPE_CHECKING:
    from preble_jax.engine.profile import Profile


def run_profile(
    config: Config, output: Path | None, cores: tuple[int, ...] | None, num_rounds: int, num_neighbours: int | None
) -> int:
    """cores: None takes those that the first worker of the deployment would get. num_neighbours: of the deployment's
    other groups that have cores of their own, beside which steps are measured a second time; None: all, or with
    `cores` none. Prints the costs, and what was measured; with `output` they are written there too."""
    shares = cores_by_group(config.serve.groups) or []
    others = [share for share in shares if not set(share) & set(cores or shares[0])]
    if num_neighbours is None:
        num_neighbours = 0 if cores else len(others)
    if not 0 <= num_neighbours <= len(others):
        raise ConfigError(
            f"--neighbours: expected at most {len(others)}, of serve.groups={config.serve.groups} those with cores of "
            f"their own beside this one, got {num_neighbours}"
        )
    cores = cores or (shares[0] if shares else None)
    progress = make_progress()
    if cores:
        pin_to_cores(cores)  # before JAX is imported
    from preble_jax.engine.engine import Engine
    from preble_jax.engine.profile import measure

    engine = Engine.create(config, progress)
    with Neighbours(config, others[:num_neighbours]) as neighbours:  # now that the programs have been compiled
        profile = measure(engine, num_rounds, progress, neighbours)
    costs = profile.costs()
    console = Console()
    console.print(_table(profile))
    console.print(_step_table(profile.step_s, profile.step_errors(), "seconds of one step"))
    if profile.num_neighbours:
        title = f"seconds of one step, {profile.num_neighbours} other groups busy"
        console.print(_step_table(profile.crowded_step_s, profile.crowded_step_errors(), title))
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


def _step_table(step_s: Mapping[StepKind, float], errors: Mapping[StepKind, float], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("decoding", "of tokens", "shared", "in a dispatch", "chunks", "measured", "fitted"):
        table.add_column(column, justify="left" if column == "chunks" else "right")
    for kind, error in errors.items():
        seconds = step_s[kind]
        chunks = ", ".join(f"{extend} up to {length}" for extend, length in kind.chunks)
        sizes = (str(kind.num_decode), f"{kind.longest_decode:g}", f"{kind.num_shared:g}", str(kind.num_steps))
        table.add_row(*sizes, chunks, f"{seconds:.4f}", f"{seconds * (1 + error):.4f}")
    return table


def _circumstances(config: Config, profile: Profile, num_rounds: int) -> dict[str, object]:
    crowded = profile.crowded_step_costs
    return {
        "prefill_s_by_tokens": profile.prefill_s,
        "prefill_relative_errors": {num: round(error, 3) for num, error in profile.prefill_errors().items()},
        "decode_step_s_by_batch": profile.decode_step_s,
        "context_tokens": profile.context_tokens,
        "engine": dict(profile.engine),
        "step_costs": None if profile.step_costs is None else profile.step_costs.to_json(),
        "steps": _steps(profile.step_s, profile.step_errors()),
        "num_neighbours": profile.num_neighbours,
        "crowded_step_costs": None if crowded is None else crowded.to_json(),
        "crowded_steps": _steps(profile.crowded_step_s, profile.crowded_step_errors()),
        "rounds": num_rounds,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "devices": profile.devices,
        "cores": num_cores(),
        "machine": f"{platform.machine()}, {processor()}",
    }


def _steps(step_s: Mapping[StepKind, float], errors: Mapping[StepKind, float]) -> list[dict[str, object]]:
    return [
        {**kind._asdict(), "seconds": step_s[kind], "relative_error": round(error, 3)} for kind, error in errors.items()
    ]
