"""What a run of the demonstration came to: numbers, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from serve.client import Usage
from serve.protos.preble.v1 import scheduler_pb2 as pb

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
# Always in the summary, with others that the placement policy makes.
DECISIONS = ("exploit", "explore", "balance", "round_robin")


@dataclass(kw_only=True)
class Outcome:
    """How one request is getting on. Times are seconds since it was sent; error is "" unless it failed."""

    index: int
    family: str
    text: str = ""
    ttft_s: float | None = None
    latency_s: float | None = None
    usage: Usage | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupCounts:
    """One device group's share. decisions: how requests came to be placed there."""

    requests: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    decisions: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """placement, queue: the policies that were on, as the cluster said. hit_ratio: cached prompt tokens over prompt
    tokens, of the requests that finished."""

    placement: str
    queue: str
    requests: int
    failures: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    ttft_s: Mapping[str, float]
    latency_s: Mapping[str, float]
    groups: Mapping[str, GroupCounts] = field(default_factory=dict)

    @property
    def hit_ratio(self) -> float:
        return hit_ratio(self.cached_tokens, self.prompt_tokens)

    def to_json(self) -> dict[str, Any]:
        groups = {
            name: {
                "requests": counts.requests,
                "prompt_tokens": counts.prompt_tokens,
                "cached_tokens": counts.cached_tokens,
                "output_tokens": counts.output_tokens,
                "hit_ratio": round(hit_ratio(counts.cached_tokens, counts.prompt_tokens), 4),
                **counts.decisions,
            }
            for name, counts in self.groups.items()
        }
        return {
            "placement": self.placement,
            "queue": self.queue,
            "requests": self.requests,
            "failures": self.failures,
            "duration_s": round(self.duration_s, 3),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "hit_ratio": round(self.hit_ratio, 4),
            "ttft_s": {name: round(value, 4) for name, value in self.ttft_s.items()},
            "latency_s": {name: round(value, 4) for name, value in self.latency_s.items()},
            "groups": groups,
        }


def summarize(outcomes: Sequence[Outcome], state: pb.GetStateResponse, duration_s: float) -> Summary:
    """state: after the last request; for the policies, and the decisions, which only the scheduler knows."""
    usages = [outcome.usage for outcome in outcomes if outcome.usage is not None]
    return Summary(
        placement=state.placement,
        queue=queue_policies(state),
        requests=len(outcomes),
        failures=len(outcomes) - len(usages),
        duration_s=duration_s,
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages),
        output_tokens=sum(usage.output_tokens for usage in usages),
        ttft_s=quantiles([outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]),
        latency_s=quantiles([outcome.latency_s for outcome in outcomes if outcome.latency_s is not None]),
        groups={group.hello.group.group: _counts(group, usages) for group in state.groups},
    )


def queue_policies(state: pb.GetStateResponse) -> str:
    """Of the groups' local queues: one name, unless they were started with different settings."""
    return ", ".join(sorted({group.hello.queue for group in state.groups if group.hello.queue}))


def _counts(state: pb.GroupState, usages: Sequence[Usage]) -> GroupCounts:
    own = [usage for usage in usages if usage.group == state.hello.group.group]
    return GroupCounts(
        requests=len(own),
        prompt_tokens=sum(usage.prompt_tokens for usage in own),
        cached_tokens=sum(usage.cached_tokens for usage in own),
        output_tokens=sum(usage.output_tokens for usage in own),
        decisions={**dict.fromkeys(DECISIONS, 0), **dict(sorted(state.decisions.items()))},
    )


def hit_ratio(cached_tokens: int, prompt_tokens: int) -> float:
    return cached_tokens / prompt_tokens if prompt_tokens else 0.0


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Nearest-rank quantiles; empty when there are no values."""
    ranked = sorted(values)
    return {name: ranked[max(0, -int(-share * len(ranked) // 1) - 1)] for name, share in _QUANTILES.items() if ranked}


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Side by side, one column a run."""
    table = Table(title="Summary", title_justify="left")
    table.add_column("placement")
    for summary in summaries:
        table.add_column(summary.placement, justify="right")
    rows = [_rows(summary) for summary in summaries]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(row.get(name, "") for row in rows))
    return table


def _rows(summary: Summary) -> dict[str, str]:
    def seconds(values: Mapping[str, float]) -> str:
        return " / ".join(f"{values[name]:.2f}" for name in ("p50", "p90", "max")) if values else "-"

    rows = {
        "local queue": summary.queue,
        "requests": str(summary.requests),
        "failures": str(summary.failures),
        "prompt tokens": f"{summary.prompt_tokens:,}",
        "cached prompt tokens": f"{summary.cached_tokens:,}",
        "hit ratio": f"{summary.hit_ratio:.3f}",
        "output tokens": f"{summary.output_tokens:,}",
        "TTFT, s (p50 / p90 / max)": seconds(summary.ttft_s),
        "latency, s (p50 / p90 / max)": seconds(summary.latency_s),
        "duration, s": f"{summary.duration_s:.1f}",
    }
    for name, counts in summary.groups.items():
        decided = ", ".join(f"{count} {decision}" for decision, count in counts.decisions.items() if count)
        rows[f"{name} requests"] = f"{counts.requests} ({decided})"
    return rows
