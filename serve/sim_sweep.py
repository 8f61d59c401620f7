"""`preble-jax sim sweep`: every combination of lists of settings, on all cores; or the SLO capacity of each."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from preble_jax.errors import ConfigError
from preble_jax.progress import make_progress
from serve.output_file import require_writable
from serve.sim import make_console, scale_text, show
from serve.sim_arguments import (
    DEFAULT_SLO,
    DEFAULT_TOLERANCE,
    refuse_idle,
    scenarios_of,
    slo_of,
)

if TYPE_CHECKING:
    from preble_jax.sim.slo import Target

# What every table has, and beside it what else differs; the seeds are averaged over.
_RATELESS = ("workload", "groups", "placement", "queue")
_LABELS = (*_RATELESS, "rate")
_MEASURES = ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "hit_ratio", "imbalance", "jain_index")


def run_sweep(arguments: argparse.Namespace) -> int:
    """Exit status 0. Raises ConfigError and InvalidRequestError, before anything is simulated where that can be."""
    from preble_jax.sim.capacity import find_capacities
    from preble_jax.sim.slo import Target
    from preble_jax.sim.sweep import Job, RowFile, make_workers, run_grid

    require_writable("--json", arguments.json)
    refuse_idle(arguments)
    tolerance = DEFAULT_TOLERANCE if arguments.tolerance is None else arguments.tolerance
    if not 0.001 <= tolerance <= 1.0:
        raise ConfigError(f"--tolerance: expected a share in [0.001, 1], got {tolerance}")
    num_processes = arguments.processes or 0
    if num_processes < 0:
        raise ConfigError(f"--processes: expected at least 1, or 0 for one a core, got {num_processes}")
    target = Target.parse(DEFAULT_SLO if arguments.slo is None else arguments.slo)
    if arguments.capacity:
        arguments.rate = (1.0,)  # what is looked for
    scenarios = scenarios_of(arguments)
    slo = slo_of(arguments)
    file = RowFile(arguments.json)
    progress = make_progress()
    with make_workers(num_processes) as workers:
        if arguments.capacity:
            rows = find_capacities(
                [Job(scenario=scenario, target=target) for scenario in scenarios],
                tolerance=tolerance,
                workers=workers,
                file=file,
                progress=progress,
            )
            table = capacity_table(rows, str(target))
            notes = too_short(rows, target)
        else:
            rows = run_grid([Job(scenario=scenario, slo=slo) for scenario in scenarios], workers, file, progress)
            table, notes = grid_table(rows), []
    console = make_console()
    console.print(table)
    for note in notes + rounded_scales(rows):
        console.print(note, soft_wrap=True)
    return 0


def grid_table(rows: Sequence[dict[str, Any]]) -> Table:
    from preble_jax.sim.intervals import mean_and_half_width

    num_seeds = len({row["seed"] for row in rows})
    title = f"means over {num_seeds} seeds" if num_seeds > 1 else None
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    names, groups = _by_label(rows, _LABELS)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in ("latency mean", "p99", "TTFT mean", "p99", "hit", "imbalance", "Jain"):
        table.add_column(column, justify="right")
    for label, group in groups.items():
        cells = []
        for measure in _MEASURES:
            values = [row["summary"][measure] for row in group]
            known = [value for value in values if value is not None]
            cells.append(show(mean_and_half_width(known)[0] if known else None))
        table.add_row(*label, *cells)
    return table


def capacity_table(rows: Sequence[dict[str, Any]], target: str) -> Table:
    from preble_jax.sim.capacity import lasts
    from preble_jax.sim.intervals import mean_and_half_width

    table = Table(title=f"highest rate with {target}", title_justify="left", box=box.SIMPLE)
    names, groups = _by_label(rows, _RATELESS)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in ("requests/s", "95%", "hit", "probes"):
        table.add_column(column, justify="right")
    for label, group in groups.items():
        mean, half_width = mean_and_half_width([row["capacity"] for row in group])
        hits = [row["summary"]["hit_ratio"] for row in group if row["summary"]]
        hit = f"{mean_and_half_width(hits)[0]:.1%}" if hits else "-"
        probes = sum(row["probes"] for row in group)
        found = min(map(lasts, group)) >= 1.0
        interval = f"±{half_width:.2f}" if len(group) > 1 else "-"  # of a single seed there is none
        table.add_row(*label, *((f"{mean:.2f}", interval, hit) if found else "---"), f"{probes}")
    return table


def too_short(rows: Sequence[dict[str, Any]], target: Target) -> list[str]:
    """A sentence for each setting whose requests are over before the target can be missed."""
    from preble_jax.sim.capacity import lasts

    notes = []
    for label, group in _by_label(rows, _RATELESS)[1].items():
        shortest = min(group, key=lasts)
        if lasts(shortest) < 1.0:
            notes.append(
                f"{', '.join(label)}: no capacity found: the {shortest['summary']['requests']} requests are over "
                f"before {target.limit_s:g} s, the limit, have passed; give more of them (--requests, a longer trace)"
            )
    return notes


def rounded_scales(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each trace whose lengths are not times what was asked for."""
    found = {
        f"{row['workload']}: lengths are {scale_text(asked, exact)}"
        for row in rows
        if (asked := row["settings"].get("length_scale", 1.0)) != (exact := row["summary"].get("length_scale", asked))
    }
    return sorted(found)


def _by_label(
    rows: Sequence[dict[str, Any]], known: Sequence[str]
) -> tuple[list[str], dict[tuple[str, ...], list[dict[str, Any]]]]:
    """(names of the labels: the known ones and what else differs; {their texts: rows, which differ in the seed})."""
    from preble_jax.sim.labels import distinctions, text_of

    others = distinctions(rows, known)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row, own in zip(rows, others, strict=True):
        groups.setdefault((*(text_of(row[key]) for key in known), *own.values()), []).append(row)
    return [*known, *(others[0] if others else ())], groups
