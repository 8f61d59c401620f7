"""Real and simulated runs of the same requests beside one another: figures, what was wanted of them, and a table."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from real_cluster import Outcome
from rich.console import Console
from rich.table import Table

LATENCY_WITHIN, HIT_WITHIN = 0.2, 0.03


def figures(counted: Sequence[Outcome]) -> dict[str, float]:
    latencies = sorted(outcome.latency_s for outcome in counted)
    prompts = sum(outcome.prompt_tokens for outcome in counted)
    groups = [sum(o.group == group for o in counted) for group in {o.group for o in counted}]
    return {
        "latency_mean_s": statistics.mean(latencies),
        "latency_p99_s": latencies[max(0, -(-99 * len(latencies) // 100) - 1)],
        "ttft_mean_s": statistics.mean(outcome.ttft_s for outcome in counted),
        "tpot_mean_s": statistics.mean(
            (o.latency_s - o.ttft_s) / (o.output_tokens - 1) for o in counted if o.output_tokens > 1
        ),
        "hit_ratio": sum(outcome.cached_tokens for outcome in counted) / prompts,
        "largest_share": max(groups) / len(counted),
    }


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each rate and policy: means over its seeds."""
    found = []
    for rate, policy in dict.fromkeys((row["rate"], row["policy"]) for row in rows):
        here = [row for row in rows if (row["rate"], row["policy"]) == (rate, policy)]
        mean: dict[str, Any] = {"rate": rate, "policy": policy, "seeds": [row["seed"] for row in here]}
        for side in ("real", "simulated"):
            mean[side] = {name: statistics.mean(row[side][name] for row in here) for name in here[0][side]}
        variants = zip(*(row["variant_latencies_s"] for row in here), strict=True)
        mean["variant_latencies_s"] = [statistics.mean(latencies) for latencies in variants]
        found.append(mean)
    return found


def compare(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was wanted, and whether it came out. rankings: quickest first; ranking_misses: pairs in another order than
    in the real cluster, with how far apart they are in either, and in how many variants they are as in the real one;
    first_in_variants: how often a policy came first."""
    latency = {_name(row): row["simulated"]["latency_mean_s"] / row["real"]["latency_mean_s"] - 1 for row in rows}
    hits = {_name(row): row["simulated"]["hit_ratio"] - row["real"]["hit_ratio"] for row in rows}
    rankings, firsts, turned = {}, {}, list[str]()
    for rate in sorted({row["rate"] for row in rows}):
        here = [row for row in rows if row["rate"] == rate]
        rankings[f"{rate:g}"] = {
            side: [row["policy"] for row in sorted(here, key=lambda row: row[side]["latency_mean_s"])]
            for side in ("real", "simulated")
        }
        turned += _reversed(here)
        variants = zip(*(row["variant_latencies_s"] for row in here), strict=True)
        best = (here[latencies.index(min(latencies))]["policy"] for latencies in variants)
        firsts[f"{rate:g}"] = dict(Counter(best))
    return {
        "latency_relative_error": latency,
        "latency_misses": [name for name, error in latency.items() if abs(error) > LATENCY_WITHIN],
        "hit_ratio_error": hits,
        "hit_ratio_misses": [name for name, error in hits.items() if abs(error) > HIT_WITHIN],
        "rankings": rankings,
        "first_in_variants": firsts,
        "ranking_misses": turned,
    }


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['policy']} at {row['rate']:g}/s"


def _reversed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for one, other in itertools.combinations(rows, 2):
        real, simulated = (
            one[side]["latency_mean_s"] / other[side]["latency_mean_s"] - 1 for side in ("real", "simulated")
        )
        if real * simulated < 0:
            variants = list(zip(one["variant_latencies_s"], other["variant_latencies_s"], strict=True))
            as_real = sum((mine < its) == (real < 0) for mine, its in variants)
            found.append(
                f"{_name(one)} to {other['policy']}: {real:+.1%} real, {simulated:+.1%} simulated, as in reality in "
                f"{as_real} of {len(variants)} variants"
            )
    return found


def show(rows: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table(title="real and simulated", title_justify="left")
    for column in (
        "rate",
        "policy",
        "latency, s",
        "",
        "range",
        "error",
        "TTFT, s",
        "",
        "TPOT, s",
        "",
        "hit",
        "",
        "error",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        real, sim = row["real"], row["simulated"]
        pairs = [f"{side[name]:.3f}" for name in ("ttft_mean_s", "tpot_mean_s", "hit_ratio") for side in (real, sim)]
        error = sim["latency_mean_s"] / real["latency_mean_s"] - 1
        spread = f"{min(row['variant_latencies_s']):.2f}-{max(row['variant_latencies_s']):.2f}"
        latencies = (f"{real['latency_mean_s']:.2f}", f"{sim['latency_mean_s']:.2f}", spread, f"{error:+.0%}")
        hit = f"{100 * (sim['hit_ratio'] - real['hit_ratio']):+.1f}"
        table.add_row(f"{row['rate']:g}", row["policy"], *latencies, *pairs, hit)
    console.print(table)
    for name in ("latency_misses", "hit_ratio_misses", "ranking_misses"):
        console.print(f"{name.replace('_', ' ')}: {', '.join(comparison[name]) or 'none'}", highlight=False)
