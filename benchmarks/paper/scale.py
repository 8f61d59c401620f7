"""From 4 to 1,024 groups at the same load a group: latency, hit ratio, and what a placement costs the scheduler.

    python -m benchmarks.paper.scale [--placements e2,default]

ToolBench, with prefixes and rate in proportion to the groups. A placement's cost is real time, so nothing else should
run: one process unless --processes says otherwise. The largest clusters run for a shorter time.
"""

from __future__ import annotations

import argparse

from benchmarks.paper.experiment import Policies, averaged, make_parser, make_scenario, run_variants, save, scaled
from preble_jax.config import QueueSettings
from preble_jax.sim.panels import describe
from preble_jax.sim.plots import Curve, Panel
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.sweep import Row

COST, RATE_A_GROUP = "mistral7b_a6000", 5.0
# Groups, and seconds; after 20 s every prefix has come once.
POINTS = ((4, 120.0), (16, 120.0), (64, 90.0), (256, 40.0), (1024, 30.0))
MEASURES = ("latency_mean_s", "latency_p99_s", "hit_ratio", "place_s")


def scenarios(placements: list[str], scale: float) -> list[tuple[str, Scenario]]:
    chosen = []
    for groups, duration_s in POINTS:
        source = Source(workload="toolbench", rate=RATE_A_GROUP * groups, duration_s=duration_s)
        for placement in placements:
            policies = Policies(name=placement, placement=placement, queue=QueueSettings().policy)
            chosen.append((placement, make_scenario(policies, scaled(source, scale), groups=groups, cost=COST)))
    return chosen


def panels(rows: list[Row]) -> list[Panel]:
    drawn = []
    for measure in MEASURES:
        curves = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            points = [(row["groups"], row["summary"][measure][0]) for row in rows if row["variant"] == variant]
            curves.append(Curve(label=variant, x=[x for x, _ in points], y=[y for _, y in points]))
        y_label = "seconds a placement" if measure == "place_s" else describe(measure)
        drawn.append(Panel(title="toolbench", x_label="groups", y_label=y_label, curves=curves, log_x=True))
    return drawn


def main(arguments: argparse.Namespace) -> None:
    rows = averaged(run_variants(scenarios(arguments.placements.split(","), arguments.scale), arguments))
    save("scale", arguments, {"rows": rows}, panels(rows))


if __name__ == "__main__":
    parser = make_parser(__doc__, num_seeds=1)
    parser.set_defaults(processes=1)
    parser.add_argument("--placements", default="e2,default,round_robin", help="with commas between them")
    main(parser.parse_args())
