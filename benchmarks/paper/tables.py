"""The tables of docs/experiments.md, made of the result files.

    python -m benchmarks.paper.tables [--results FOLDER] [--page FILE]

Prints each table, and puts it in the place of the one that begins with the same line in the page.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.experiment import HASHING, PREBLE, RESULTS, SGLANG, select
from benchmarks.paper.tournament import DEFAULT, E2

PAGE = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"
Row = dict[str, Any]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)).replace(
        "|  |", "| |"
    )


def mean(row: Row, measure: str, form: str) -> str:
    """With half of the 95% interval where there are several seeds."""
    value, half = row["summary"][measure]
    return f"{value:{form}}" + (f" ± {half:{form}}" if row["seeds"] > 1 else "")


def truth(document: Mapping[str, Any]) -> str:
    """The real cluster beside the simulator."""
    lines, before = [], None
    for row in sorted(document["means"], key=lambda row: row["rate"]):
        real, simulated = row["real"], row["simulated"]
        latencies = (real["latency_mean_s"], simulated["latency_mean_s"])
        error = f"{latencies[1] / latencies[0] - 1:+.0%}"
        hits = [f"{100 * side['hit_ratio']:.1f}%" for side in (real, simulated)]
        rate = f"{row['rate']:g}/s" if row["rate"] != before else ""
        policy = row["policy"].replace("_", " ")
        lines.append([rate, policy, *(f"{latency:.2f} s" for latency in latencies), error, *hits])
        before = row["rate"]
    head = ["rate", "policy", "mean latency, real", "simulated", "error", "hit ratio, real", "simulated"]
    return table(head, lines)


def figure3(document: Mapping[str, Any]) -> str:
    """Of each cluster and workload: the rate at which E2 gains most over round robin, and all rates together."""
    gains: dict[tuple[str, ...], list[Row]] = {}
    for gain in document["gains"]:
        gains.setdefault((f"{gain['groups']} x {gain['cost']}", gain["workload"]), []).append(gain)
    mean_key, p99_key = f"{SGLANG.name} latency_mean", f"{SGLANG.name} latency_p99"
    lines = []
    for labels, rates in gains.items():
        known = [gain for gain in rates if gain[mean_key]]
        most = max(known, key=lambda gain: gain[mean_key])
        together = math.exp(sum(math.log(gain[mean_key]) for gain in known) / len(known))
        hashing = max(rates, key=lambda gain: gain["rate"])[f"{HASHING.name} latency_mean"]
        numbers = (f"{most[mean_key]:.1f}x", f"{most['rate']:g}/s", f"{most[p99_key]:.1f}x", f"{together:.2f}x")
        lines.append([*labels, *numbers, f"{hashing:.2f}x"])
    head = ["cluster", "workload", "mean, most", "at", "p99 there", "mean over all rates"]
    return table([*head, "consistent hashing over E2, mean, at the highest rate"], lines)


def figure4(document: Mapping[str, Any]) -> str:
    """Mean latency by rate."""
    rates = sorted({row["rate"] for row in document["rows"]})
    lines = []
    for policies in (PREBLE, SGLANG, HASHING):
        rows = {row["rate"]: row for row in select(document["rows"], variant=policies.name)}
        lines.append([policies.name, *(mean(rows[rate], "latency_mean_s", ".2f") for rate in rates)])
    return table(["", *(f"{rate:g}/s" for rate in rates)], lines)


def figure5(document: Mapping[str, Any]) -> str:
    """Mean and p99 latency by part of Preble and point."""
    points = list(dict.fromkeys((row["workload"], row["rate"]) for row in document["rows"]))
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in document["rows"]):
        cells = []
        for workload, rate in points:
            (row,) = select(document["rows"], variant=variant, workload=workload, rate=rate)
            cells.append(f"{mean(row, 'latency_mean_s', '.1f')} / {row['summary']['latency_p99_s'][0]:.0f}")
        lines.append([variant, *cells])
    return table(["", *(f"{workload}, {rate:g}/s" for workload, rate in points)], lines)


def d2lpm(document: Mapping[str, Any]) -> str:
    """At the highest rate."""
    rate = max(row["rate"] for row in document["rows"])
    lines = []
    for client in select(document["clients"], rate=rate):
        labels = {key: client[key] for key in ("workload", "rate", "variant")}
        (row,) = select(document["rows"], **labels)
        times = (f"{client[f'{who} latency_mean_s']:.1f} s" for who in ("others' mean", "greedy"))
        counts = [f"{row['summary'][key][0]:,.0f}" for key in ("throughput_tokens_per_s", "largest_service_gap")]
        shares = (f"{row['summary']['hit_ratio'][0]:.2f}", mean(row, "jain_index", ".3f"))
        lines.append(
            [
                labels["workload"].removeprefix("d2lpm_").upper(),
                labels["variant"],
                *times,
                counts[0],
                *shares,
                counts[1],
            ]
        )
    head = ["set", "policy", "mean latency of the others", "of the greedy one", "tokens/s", "hit ratio", "Jain"]
    return table([*head, "largest gap"], lines)


def tournament(document: Mapping[str, Any]) -> str:
    """Capacities of the default policy, E2 and the best other one, in the cases that have one."""
    lines = []
    for mine in select(document["capacities"], placement=DEFAULT):
        if mine["capacity"] is None:
            continue
        labels = [mine["workload"], f"{mine['target'].split('=')[1]} s"]
        of_case = {row["placement"]: row["capacity"] for row in select(document["capacities"], workload=labels[0])}
        best = mine["best_baseline"]
        capacities = [_spread(mine["capacity"], ".1f"), _spread(of_case[E2], ".1f"), _spread(mine["over_e2"], ".2f")]
        lines.append(
            [*labels, *capacities, f"{best} {of_case[best][0]:.1f}", _spread(mine["over_best_baseline"], ".2f")]
        )
    return table(["workload", "p99 TTFT within", "default", "E2", "over E2", "best other", "over it"], lines)


def tournament_totals(document: Mapping[str, Any]) -> str:
    """Of every policy over all cases, the best first."""
    lines = []
    for total in sorted(document["totals"], key=lambda total: -total["over_e2"]):
        over_best = _spread(total["worst_over_best_baseline"], ".2f")
        lines.append([total["placement"], f"{total['over_e2']:.2f}", over_best, total["worst_workload"]])
    return table(["placement", "capacity over E2's, geometric mean", "over the best other, at worst", "on"], lines)


def tournament_fixed(document: Mapping[str, Any]) -> str:
    """p99 of the time to first token at each fixed rate: default, E2, and whichever other is best there."""
    lines = []
    for mine in select(document["fixed_rates"], placement=DEFAULT):
        here = select(document["fixed_rates"], workload=mine["workload"], rate=mine["rate"])
        p99 = {row["placement"]: row["ttft_p99_s"] for row in here}
        others = {name: value for name, value in p99.items() if name != DEFAULT}
        best = min(others, key=lambda name: others[name][0])
        numbers = [_spread(p99[name], ".2f") for name in (DEFAULT, E2)]
        lines.append([mine["workload"], f"{mine['rate']:g}/s", *numbers, f"{best} {_spread(others[best], '.2f')}"])
    return table(["workload", "rate", "p99 TTFT of the default, s", "of E2", "of the best other"], lines)


def tournament_at_once(document: Mapping[str, Any]) -> str:
    """Cases without a capacity: of each measure the default's, how many times better it is than E2's, and than the best
    other one's."""
    lines = []
    for mine in select(document["at_once"], placement=DEFAULT):
        cells = [mine["workload"], f"{mine['requests']:,}"]
        for measure, form in (("throughput_per_s", ".1f"), ("ttft_p99_s", ".2f"), ("ttft_mean_s", ".3f")):
            found = mine[measure]
            over = found["over_best_baseline"]
            cells += [
                _spread(found["mean"], form),
                f"{found['over_e2'][0]:.2f}",
                f"{found['best_baseline']} {over[0]:.2f}",
            ]
        lines.append(cells)
    head = ["all at once", "requests"]
    for measure in ("requests/s", "p99 TTFT, s", "mean TTFT, s"):
        head += [measure, "over E2", "over the best other"]
    return table(head, lines)


def scale(document: Mapping[str, Any]) -> str:
    """Latency, hit ratio and the scheduler's own time by number of groups."""
    lines = []
    for row in document["rows"]:
        latency = (f"{row['summary'][key][0]:.2f} s" for key in ("latency_mean_s", "latency_p99_s"))
        hit_ratio, place_s = (row["summary"][key][0] for key in ("hit_ratio", "place_s"))
        lines.append([f"{row['groups']:,}", row["variant"], *latency, f"{hit_ratio:.2f}", f"{place_s * 1e6:.0f} us"])
    return table(["groups", "policy", "mean latency", "p99", "hit ratio", "real time of a placement"], lines)


def ablation(document: Mapping[str, Any]) -> str:
    """Capacity of each variant over that of the whole policy."""
    workloads = list(dict.fromkeys(row["workload"] for row in document["rows"]))
    lines = []
    for total in document["totals"][1:]:
        rows = {row["workload"]: row["over_default"] for row in select(document["rows"], variant=total["variant"])}
        numbers = [*(rows[workload] for workload in workloads), total["over_default"]]
        lines.append([total["variant"], *(f"{number:.2f}" for number in numbers)])
    return table(["variant", *workloads, "all"], lines)


def _spread(value: Sequence[float], form: str) -> str:
    return f"{value[0]:{form}} ± {value[1]:{form}}"


TABLES = (
    ("validation_epyc_2core", (truth,)),
    ("tournament", (tournament, tournament_totals, tournament_fixed, tournament_at_once)),
    ("default_ablation", (ablation,)),
    ("preble_figure3", (figure3,)),
    ("figure4", (figure4,)),
    ("figure5", (figure5,)),
    ("d2lpm", (d2lpm,)),
    ("scale", (scale,)),
)


def made(results: Path) -> list[tuple[str, str]]:
    """The command that made the results, and a table of them."""
    found = []
    for name, makers in TABLES:
        document = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        found += [(document["command"], make(document)) for make in makers]
    return found


def replaced(page: str, text: str) -> str:
    """The page with the table in place of the one that has its first line."""
    lines, head = page.split("\n"), text.split("\n", 1)[0]
    first = lines.index(head)
    last = next(index for index in range(first, len(lines)) if not lines[index].startswith("|"))
    return "\n".join([*lines[:first], text, *lines[last:]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    arguments = parser.parse_args()
    page = arguments.page.read_text(encoding="utf-8")
    for command, text in made(arguments.results):
        print(f"{command}\n{text}\n")
        page = replaced(page, text)
    arguments.page.write_text(page, encoding="utf-8")
