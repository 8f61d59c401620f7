"""summarize: every number against a cluster small enough to count by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from preble_jax.config import TenantSettings
from preble_jax.sim.record import GroupRecord, RequestRecord, SimResult
from preble_jax.sim.slo import Slo
from preble_jax.sim.summary import summarize

# What readers of the file rely on.
PROMISED = (
    *("latency_mean_s", "latency_p50_s", "latency_p90_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s", "tpot_mean_s"),
    *("hit_ratio", "imbalance", "jain_index", "requests", "unfinished"),
)


def finished(index: int, ttft_s: float, latency_s: float, *, cached: int = 0, tenant: str = "a") -> RequestRecord:
    return RequestRecord(
        index=index,
        tenant=tenant,
        num_prompt=100,
        num_output=11,
        sent_s=float(index),
        group="g0",
        decision="exploit" if cached else "explore",
        first_token_s=index + ttft_s,
        finished_s=index + latency_s,
        cached_tokens=cached,
        made_tokens=11,
        queue_s=0.25,
        num_placements=1,
        status="finished",
    )


def other(index: int, status: str) -> RequestRecord:
    return RequestRecord(
        index=index, tenant="b", num_prompt=100, num_output=5, sent_s=float(index), num_placements=2, status=status
    )


def run(records: list[RequestRecord], **fields) -> SimResult:
    groups = [
        GroupRecord(group="g0", busy_s=9.0, num_steps=90, num_preemptions=1, num_evicted=3, num_requests=4),
        GroupRecord(group="g1", busy_s=3.0, num_steps=30),
    ]
    served = [(1.0, records[0].tenant, 100, 11)]
    return SimResult(requests=records, groups=groups, served=served, end_s=20.0, wall_s=0.5, place_s=0.07, **fields)


def test_every_number() -> None:
    records = [
        finished(0, 1.0, 2.0),
        finished(1, 1.0, 3.0, cached=50),
        finished(2, 2.0, 4.0, cached=30),
        finished(3, 4.0, 7.0),
        other(4, "rejected"),
        other(5, "failed"),
        other(6, "unfinished"),
    ]
    summary = summarize(run(records, policy={"moves": 2.0}), TenantSettings(), Slo(ttft_s=2.0, latency_s=3.5))
    assert summary.keys() >= set(PROMISED)
    counts = {key: summary[key] for key in ("requests", "finished", "rejected", "failed", "unfinished", "retried")}
    assert counts == {"requests": 7, "finished": 4, "rejected": 1, "failed": 1, "unfinished": 1, "retried": 3}
    assert summary["decisions"] == {"exploit": 2, "explore": 2}
    assert (summary["latency_mean_s"], summary["latency_p50_s"]) == (4.0, 3.5)
    assert summary["latency_p90_s"] == pytest.approx(4.0 + 0.7 * 3.0)
    assert summary["latency_p99_s"] == pytest.approx(4.0 + 0.97 * 3.0)
    assert (summary["ttft_mean_s"], summary["queue_mean_s"]) == (2.0, 0.25)
    assert summary["tpot_mean_s"] == pytest.approx((0.1 + 0.2 + 0.2 + 0.3) / 4)
    assert summary["norm_latency_mean_s"] == pytest.approx(4.0 / 11)
    assert summary["hit_ratio"] == 80 / 400
    assert summary["imbalance"] == 1.5
    assert (summary["goodput"], summary["slo_attainment"]) == (2 / 20.0, 2 / 7)
    assert (summary["throughput_per_s"], summary["throughput_tokens_per_s"]) == (0.2, 444 / 20.0)
    assert (summary["num_steps"], summary["num_preemptions"], summary["num_evicted"]) == (120, 1, 3)
    assert summary["place_s"] == pytest.approx(0.007), "0.07 s over ten placements"
    assert summary["requests_per_wall_s"] == 14.0
    assert summary["policy"] == {"moves": 2.0}
    assert [(row["group"], row["utilization"]) for row in summary["groups"]] == [("g0", 0.45), ("g1", 0.15)]
    tenants = summary["tenants"]
    assert [(name, row["requests"], row["finished"]) for name, row in tenants.items()] == [("a", 4, 4), ("b", 3, 0)]
    assert (tenants["a"]["service"], tenants["b"]["service"]) == (122.0, 0.0)
    assert (tenants["a"]["latency_mean_s"], tenants["b"]["latency_mean_s"]) == (4.0, None)
    json.dumps(summary, allow_nan=False)


def test_a_group_that_did_nothing_counts_in_the_imbalance() -> None:
    busy = [GroupRecord(group=f"g{number}", busy_s=7.0 * (number == 2)) for number in range(4)]
    assert summarize(replace(run([finished(0, 1.0, 2.0)]), groups=busy))["imbalance"] == 4.0


def test_answers_that_were_cut_are_counted() -> None:
    cut = replace(finished(1, 1.0, 2.0), num_output=5000)
    summary = summarize(run([finished(0, 1.0, 2.0), cut, other(2, "failed"), other(3, "unfinished")]))
    assert (summary["truncated"], summary["finished"], summary["goodput"]) == (1, 2, 2 / 20.0)


def test_a_run_in_which_nothing_ended_and_an_empty_one() -> None:
    summary = summarize(run([other(0, "unfinished")]))
    assert (summary["latency_mean_s"], summary["ttft_p99_s"], summary["unfinished"]) == (None, None, 1)
    assert (summary["hit_ratio"], summary["goodput"]) == (0.0, 0.0)
    empty = SimResult(requests=[], groups=[], served=[], end_s=0.0, wall_s=0.0, place_s=0.0)
    summary = summarize(empty)
    assert (summary["requests"], summary["imbalance"], summary["jain_index"]) == (0, 1.0, 1.0)
    json.dumps(summary, allow_nan=False)
