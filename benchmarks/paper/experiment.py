"""What the experiments of this folder have in common: arguments, settings, and the files they leave.

Each is one command, `python -m benchmarks.paper.NAME`, which writes NAME.json and NAME.svg to --results. Runs that are
in --rows are not done again. --traces names a folder of real traces and of the published numbers; without it, what
needs them is left out.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preble_jax.bench.machine import command_line, git_commit, num_cores, processor
from preble_jax.config import Config
from preble_jax.config_files import from_keywords
from preble_jax.progress import make_progress
from preble_jax.sim.intervals import mean_and_half_width
from preble_jax.sim.plots import Panel, draw
from preble_jax.sim.scenario import Scenario, Source, make_sim_settings
from preble_jax.sim.sweep import Job, Row, RowFile, make_workers, run_grid

RESULTS = Path(__file__).resolve().parents[1] / "results" / "paper"
# What is kept of a run's summary.
MEASURES = (
    *("latency_mean_s", "latency_p50_s", "latency_p90_s", "latency_p99_s", "ttft_mean_s", "ttft_p50_s", "ttft_p99_s"),
    *("tpot_mean_s", "tpot_p50_s", "tpot_p99_s", "norm_latency_p50_s", "norm_latency_p90_s", "norm_latency_p99_s"),
    *("hit_ratio", "imbalance", "jain_index"),
    *("largest_service_gap", "throughput_per_s", "throughput_tokens_per_s", "place_s", "requests", "finished"),
)


@dataclass(frozen=True, kw_only=True)
class Policies:
    """A pair of placement and queue under a name, with settings (`from_keywords`) of its own."""

    name: str
    placement: str
    queue: str
    settings: Mapping[str, object] | None = None


# As the papers' names for them. SGLang: round robin over instances that serve the longest match first.
SGLANG = Policies(name="round robin", placement="round_robin", queue="lpm")
PREBLE = Policies(name="E2", placement="e2", queue="priority_groups")
HASHING = Policies(name="consistent hashing", placement="consistent_hashing", queue="lpm")


def make_parser(description: str | None, *, num_seeds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, metavar="FOLDER", help="real traces and published numbers")
    parser.add_argument("--seeds", type=int, default=num_seeds, help=f"of each run; default {num_seeds}")
    parser.add_argument("--scale", type=float, default=1.0, help="of every run's length, to try it")
    parser.add_argument("--processes", type=int, default=0, help="at a time; default: one a core")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines that an interrupted run goes on from")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the files go")
    return parser


def make_scenario(
    policies: Policies, source: Source, *, groups: int, cost: str, seed: int = 0, **more: object
) -> Scenario:
    """more: further settings, by name (`from_keywords`)."""
    chosen: dict[str, object] = {"placement": policies.placement, "queue": {"policy": policies.queue}}
    chosen |= dict(policies.settings or {}) | more
    sim = make_sim_settings(from_keywords(Config(), None, **chosen), cost, {}, num_groups=groups, seed=seed)
    return Scenario(source=source, cost=cost, sim=sim)


def run_variants(
    variants: Sequence[tuple[str, Scenario]], arguments: argparse.Namespace, keep: Sequence[str] = ()
) -> list[Row]:
    """Every scenario with every seed. Rows as of a sweep, with the `variant` they are one of, and of the summary
    MEASURES only. keep: further parts of the summary, beside it in the row."""
    jobs = [
        (variant, Job(scenario=scenario.with_seed(seed)))
        for variant, scenario in variants
        for seed in range(arguments.seeds)
    ]
    file = RowFile(arguments.rows)
    with make_workers(arguments.processes) as workers:
        rows = run_grid([job for _, job in jobs], workers, file, make_progress())
    return [{**_compact(row, keep), "variant": variant} for (variant, _), row in zip(jobs, rows, strict=True)]


def _compact(row: Row, keep: Sequence[str]) -> Row:
    summary = {key: rounded(row["summary"][key]) for key in MEASURES if key in row["summary"]}
    labels = {key: value for key, value in row.items() if key not in ("key", "settings")}
    return {**labels, **{key: row["summary"][key] for key in keep}, "summary": summary}


def without(rows: Sequence[Row], key: str) -> list[Row]:
    return [{name: value for name, value in row.items() if name != key} for row in rows]


def rounded(value: Any) -> Any:
    """Five digits: no more are meant."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def scaled(source: Source, scale: float) -> Source:
    """Of a workload: so many times as long. source: with a duration."""
    assert source.duration_s is not None
    return replace(source, duration_s=source.duration_s * scale)


def averaged(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting: of every measure its mean over the seeds and half of the 95% interval."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        labels = {key: value for key, value in row.items() if key not in ("seed", "summary")}
        groups.setdefault(json.dumps(labels), []).append(row)
    found = []
    for label, members in groups.items():
        summary = {}
        for measure in members[0]["summary"]:
            values = [row["summary"][measure] for row in members if row["summary"].get(measure) is not None]
            summary[measure] = [rounded(value) for value in mean_and_half_width(values)] if values else None
        found.append({**json.loads(label), "seeds": len(members), "summary": summary})
    return found


def average(rows: Sequence[Row], measure: str) -> float | None:
    """Over the rows in which there is such a number."""
    values = [row["summary"][measure] for row in rows if row["summary"].get(measure) is not None]
    return mean_and_half_width(values)[0] if values else None


def select(rows: Sequence[Row], **labels: object) -> list[Row]:
    return [row for row in rows if all(row[key] == value for key, value in labels.items())]


def save(
    name: str, arguments: argparse.Namespace, document: Mapping[str, Any], panels: Sequence[Panel], columns: int = 4
) -> None:
    """NAME.json and NAME.svg; without matplotlib, or anything to draw, only the first."""
    arguments.results.mkdir(parents=True, exist_ok=True)
    head = {
        "command": command_line([f"-m benchmarks.paper.{name}", *_given(arguments)]),
        "git_commit": git_commit(),
        "cpu": processor(),
        "cores": num_cores(),
        "python": platform.python_version(),
    }
    path = arguments.results / f"{name}.json"
    path.write_text(_one_row_a_line({**head, **document}), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path}; {name}.svg needs matplotlib: pip install 'preble-jax[plot]'")
    elif not panels:
        print(f"{path}; nothing to draw")
    else:
        draw(panels, arguments.results / f"{name}.svg", columns=columns)
        print(f"{path} and {name}.svg")


def _given(arguments: argparse.Namespace) -> list[str]:
    """What decides the result; where files lie does not."""
    given = [f"--seeds {arguments.seeds}", f"--scale {arguments.scale:g}"]
    for name in ("requests", "placements", "queue"):
        if getattr(arguments, name, ""):
            given.append(f"--{name} {getattr(arguments, name)}")
    return given + (["--traces FOLDER"] if arguments.traces else [])


def _one_row_a_line(document: Mapping[str, Any]) -> str:
    """JSON in which a list of objects has a line for each, so that a difference can be read."""
    parts = []
    for key, value in document.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            parts.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def published(traces: Path | None) -> list[dict[str, Any]]:
    """Preble's own numbers: workload, gpus, metric, policy, and a value at each of the rates."""
    if traces is None:
        return []
    with (traces / "preble_reference" / "digitized.csv").open(encoding="utf-8") as file:
        curves = [
            {
                "workload": row["workload"],
                "groups": int(row["gpus"]),
                "mode": row["mode"],
                "metric": row["metric"],
                "policy": row["policy"],
                "rates": [float(rate) for rate in row["rps_values"].split("|")],
                "values": [float(value) for value in row["values"].split("|")],
            }
            for row in csv.DictReader(file)
        ]
    return curves + _exact(traces / "preble_reference" / "programming_sim_2gpu.csv")


def _exact(path: Path) -> list[dict[str, Any]]:
    """One rate a row, a column a metric: of the programming workload on two groups, simulated by Preble's authors."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "workload": "programming",
            "groups": 2,
            "mode": "sim",
            "metric": metric,
            "policy": policy,
            "rates": [float(row["rps"]) for row in rows if row["policy"] == policy],
            "values": [float(row[metric]) for row in rows if row["policy"] == policy],
        }
        for policy in dict.fromkeys(row["policy"] for row in rows)
        for metric in rows[0]
        if metric not in ("policy", "rps")
    ]
