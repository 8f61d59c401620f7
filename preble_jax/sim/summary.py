"""What a simulation came to, in numbers that go into a table and into JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from preble_jax.config import TenantSettings
from preble_jax.sim.fairness import fair_share_ratios, jain_index, largest_service_gap
from preble_jax.sim.record import GroupRecord, RequestRecord, SimResult
from preble_jax.sim.slo import METRICS, Slo, quantiles, value_of

_NO_SLO = Slo()
_EQUAL = TenantSettings()


def summarize(result: SimResult, tenants: TenantSettings = _EQUAL, slo: Slo = _NO_SLO) -> dict[str, Any]:
    """Seconds of simulated time where a key ends in `_s`, but wall_s and place_s (real ones); None: nothing to say.

    Means and percentiles are over requests that finished; the others are counted beside them. hit_ratio: prompt tokens
    that were cached, of the requests that finished. imbalance: the greatest busy time of a group over the mean of all.
    jain_index: of the tenants' service over their fair shares. goodput: requests a second that finished and kept the
    SLO (all of them without one). truncated: of the finished ones, those whose answer ended where their group's room
    did (they count as good). throughput_tokens_per_s: prompt and output tokens of finished requests.
    """
    records = result.requests
    finished = [record for record in records if record.status == "finished"]
    ratios = fair_share_ratios(result, tenants)
    num_good = sum(slo.is_kept(record) for record in finished)
    return {
        **_counts(records),
        **_latencies(finished),
        **_tokens(finished, result.end_s),
        **_loads(result.groups),
        "jain_index": jain_index(list(ratios.values())),
        "largest_service_gap": largest_service_gap(result, tenants),
        "slo": slo.limits,
        "slo_attainment": num_good / len(records) if records else 1.0,
        "goodput": num_good / result.end_s if result.end_s > 0 else 0.0,
        "end_s": result.end_s,
        "stopped": result.stopped,
        "wall_s": result.wall_s,
        "requests_per_wall_s": len(records) / result.wall_s if result.wall_s > 0 else 0.0,
        "place_s": result.place_s / max(1, sum(record.num_placements for record in records)),
        "policy": dict(result.policy),
        "groups": group_rows(result),
        "tenants": tenant_rows(result, tenants),
    }


def _counts(records: Sequence[RequestRecord]) -> dict[str, Any]:
    statuses = [record.status for record in records]
    decisions: dict[str, int] = {}
    for record in records:
        if record.decision:
            decisions[record.decision] = decisions.get(record.decision, 0) + 1
    return {
        "requests": len(records),
        "finished": statuses.count("finished"),
        "rejected": statuses.count("rejected"),
        "failed": statuses.count("failed"),
        "unfinished": statuses.count("unfinished"),
        "truncated": sum(record.status == "finished" and record.made_tokens < record.num_output for record in records),
        "retried": sum(record.num_placements > 1 for record in records),
        "decisions": dict(sorted(decisions.items())),
    }


def _latencies(finished: Sequence[RequestRecord]) -> dict[str, float | None]:
    numbers: dict[str, float | None] = {}
    for metric in METRICS:
        values = [value for record in finished if (value := value_of(record, metric)) is not None]
        numbers |= _spread(metric, values)
    return numbers | _spread("queue", [record.queue_s for record in finished if record.queue_s is not None])


def _spread(name: str, values: Sequence[float]) -> dict[str, float | None]:
    p50, p90, p99 = quantiles(values)
    mean = float(np.mean(values)) if values else None
    return {f"{name}_mean_s": mean, f"{name}_p50_s": p50, f"{name}_p90_s": p90, f"{name}_p99_s": p99}


def _tokens(finished: Sequence[RequestRecord], end_s: float) -> dict[str, float]:
    prompt = sum(record.num_prompt for record in finished)
    cached = sum(record.cached_tokens for record in finished)
    output = sum(record.made_tokens for record in finished)
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
        "hit_ratio": cached / prompt if prompt else 0.0,
        "throughput_per_s": len(finished) / end_s if end_s > 0 else 0.0,
        "throughput_tokens_per_s": (prompt + output) / end_s if end_s > 0 else 0.0,
    }


def _loads(groups: Sequence[GroupRecord]) -> dict[str, float]:
    busy = [group.busy_s for group in groups]
    mean_s = sum(busy) / len(busy) if busy else 0.0
    return {
        "busy_mean_s": mean_s,
        "busy_max_s": max(busy, default=0.0),
        "imbalance": max(busy) / mean_s if mean_s > 0 else 1.0,
        "num_steps": sum(group.num_steps for group in groups),
        "num_preemptions": sum(group.num_preemptions for group in groups),
        "num_evicted": sum(group.num_evicted for group in groups),
    }


def group_rows(result: SimResult) -> list[dict[str, Any]]:
    """One row a group, with the share of the simulated time in which it was busy."""
    return [
        {
            "group": group.group,
            "busy_s": group.busy_s,
            "utilization": group.busy_s / result.end_s if result.end_s > 0 else 0.0,
            "num_steps": group.num_steps,
            "requests": group.num_requests,
            "extend_tokens": group.extend_tokens,
            "cached_tokens": group.cached_tokens,
            "output_tokens": group.output_tokens,
            "num_preemptions": group.num_preemptions,
            "num_evicted": group.num_evicted,
        }
        for group in result.groups
    ]


def tenant_rows(result: SimResult, tenants: TenantSettings = _EQUAL) -> dict[str, dict[str, Any]]:
    """{tenant: requests, service in units, service over its fair share, times}, by name."""
    by_tenant: dict[str, list[RequestRecord]] = {}
    for record in result.requests:
        by_tenant.setdefault(record.tenant, []).append(record)
    service = dict.fromkeys(by_tenant, 0.0)
    for _, tenant, extend_tokens, output_tokens in result.served:
        service[tenant] += tenants.service(extend_tokens, output_tokens)
    ratios = fair_share_ratios(result, tenants)
    rows = {}
    for tenant, records in sorted(by_tenant.items()):
        finished = [record for record in records if record.status == "finished"]
        times = _latencies(finished)
        rows[tenant] = {
            "requests": len(records),
            "finished": len(finished),
            "weight": tenants.weight(tenant),
            "service": service[tenant],
            "fair_share_ratio": ratios.get(tenant),
            **{key: times[key] for key in ("latency_mean_s", "latency_p99_s", "ttft_mean_s", "ttft_p99_s")},
        }
    return rows
