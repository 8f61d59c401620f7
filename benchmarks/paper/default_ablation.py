"""What each term of the default placement policy is worth: SLO capacity with one of them left out.

    python -m benchmarks.paper.default_ablation [--traces FOLDER] [--requests 1500] [--rows FILE]

Four groups of Mistral-7B on an A6000, queue `fair` for all; 99 of 100 requests are to have their first token within the
limit that the tournament sets for the workload. "wait only": neither the price of work nor that of decoding, which is
nearly the predicted time to the first token alone. "longest match only": who holds less counts as holding nothing.
"waits for all queued": a tenant is thought to wait for another's flood. "standing counts for nothing": what tenants
were given on all groups is left out.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.paper.experiment import Policies, make_parser, rounded, save
from benchmarks.paper.tournament import TOLERANCE, UNBOUNDED, Case, cases
from preble_jax.progress import make_progress
from preble_jax.sim.capacity import find_capacities
from preble_jax.sim.intervals import geometric_mean, mean_and_half_width
from preble_jax.sim.plots import Panel
from preble_jax.sim.sweep import RowFile, make_workers

WORKLOADS = ("toolbench", "zipf", "hot_prefix", "loogle", "chat", "unshared", "d2lpm_s1", "noisy_tenant")
TRACES = ("AzureLLMInferenceTrace_conv", "vtc_real_trace")
QUEUE = "fair"
WHOLE = "default"
VARIANTS = (
    Policies(name=WHOLE, placement="default", queue=QUEUE),
    Policies(name="no price of work", placement="default", queue=QUEUE, settings={"delay_others": 0.0}),
    Policies(name="work twice as dear", placement="default", queue=QUEUE, settings={"delay_others": 0.5}),
    Policies(name="no price of decoding", placement="default", queue=QUEUE, settings={"delay_decoding": 0.0}),
    Policies(name="decoding twice as dear", placement="default", queue=QUEUE, settings={"delay_decoding": 0.5}),
    Policies(name="wait only", placement="default", queue=QUEUE, settings={"delay_others": 0.0, "delay_decoding": 0.0}),
    *(
        Policies(name=name, placement="default", queue=QUEUE, settings={"delay_without": term})
        for name, term in (
            ("longest match only", "shorter"),
            ("no wanted copies", "copies"),
            ("waits for all queued", "tenants"),
            ("overtakes for nothing", "overtaken"),
            ("standing counts for nothing", "standing"),
            ("no decode slots", "slots"),
        )
    ),
)


def capacities(case: Case, arguments: argparse.Namespace, file: RowFile) -> dict[str, tuple[float, float]]:
    """By variant: mean over the seeds, and half of its 95% interval."""
    jobs = [case.job(variant, seed) for variant in VARIANTS for seed in range(arguments.seeds)]
    with make_workers(arguments.processes) as workers:
        rows = find_capacities(jobs, tolerance=TOLERANCE, workers=workers, file=file, progress=make_progress())
    found = {}
    for number, variant in enumerate(VARIANTS):
        members = rows[number * arguments.seeds : (number + 1) * arguments.seeds]
        found[variant.name] = mean_and_half_width([row["capacity"] for row in members])
    return found


def main(arguments: argparse.Namespace) -> None:
    chosen = cases(arguments.traces, round(arguments.requests * arguments.scale), (*WORKLOADS, *TRACES))
    file = RowFile(arguments.rows)
    rows: list[dict[str, Any]] = []
    panels = []
    for case in chosen:
        found = capacities(case, arguments, file)
        whole = found[WHOLE][0]
        if not 0.0 < whole < UNBOUNDED:
            continue
        for name, (mean, half_width) in found.items():
            rows.append(
                {
                    "workload": case.name,
                    "target": str(case.target),
                    "variant": name,
                    "capacity": [rounded(mean), rounded(half_width)],
                    "over_default": rounded(mean / whole),
                }
            )
        panels.append(Panel(title=case.name, y_label=f"requests/s, {case.target}", bars=found))
    totals = [
        {
            "variant": variant.name,
            "over_default": rounded(
                geometric_mean([row["over_default"] for row in rows if row["variant"] == variant.name])
            ),
        }
        for variant in VARIANTS
    ]
    save("default_ablation", arguments, {"totals": totals, "rows": rows}, panels)
    for row in totals:
        print(*row.values())


if __name__ == "__main__":
    parser = make_parser(__doc__, num_seeds=3)
    parser.add_argument("--requests", type=int, default=1500, help="of a run")
    main(parser.parse_args())
