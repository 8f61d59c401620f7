"""Targets: how many may miss, and giving up exactly when too many have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preble_jax.errors import ConfigError
from preble_jax.sim.record import RequestRecord
from preble_jax.sim.slo import Slo, Target, TargetWatch, value_of


def finished(index: int, ttft_s: float, latency_s: float, *, sent_s: float = 0.0, made: int = 5) -> RequestRecord:
    return RequestRecord(
        index=index,
        tenant="t",
        num_prompt=10,
        num_output=made,
        made_tokens=made,
        sent_s=sent_s,
        first_token_s=sent_s + ttft_s,
        finished_s=sent_s + latency_s,
        status="finished",
    )


def unfinished(index: int, sent_s: float = 0.0) -> RequestRecord:
    return RequestRecord(index=index, tenant="t", num_prompt=10, num_output=5, sent_s=sent_s)


def test_the_four_metrics() -> None:
    record = finished(0, 1.0, 3.0, sent_s=7.0)
    values = [value_of(record, metric) for metric in ("ttft", "latency", "tpot", "norm_latency")]
    assert values == [1.0, 3.0, 0.5, 0.6]
    assert value_of(finished(0, 1.0, 1.0, made=1), "tpot") is None, "one token has no time between tokens"
    assert value_of(unfinished(0), "ttft") is None


@pytest.mark.parametrize("text", ["ttft=5", "ttft_p100=5", "ttft_p0=5", "ttft_p99=-1", "ttft_p99=x", "wait_p99=5", ""])
def test_targets_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="ttft_p99=5"):
        Target.parse(text)


def test_a_target_reads_as_it_is_written() -> None:
    assert str(Target.parse("norm_latency_p99.9=0.25")) == "norm_latency_p99.9=0.25"


def test_one_percent_may_miss() -> None:
    target = Target.parse("ttft_p99=5")
    assert [target.num_allowed(n) for n in (1, 99, 100, 199, 200, 1000)] == [0, 0, 1, 1, 2, 10]
    good = [finished(index, 1.0, 2.0) for index in range(199)]
    assert target.is_met([*good, unfinished(199)])
    assert target.value([*good, unfinished(199)]) == 1.0
    assert not target.is_met([*good[:-2], *(unfinished(index) for index in range(3))])
    assert target.value([unfinished(0)]) == math.inf


def test_an_slo_counts_finished_requests_within_every_limit() -> None:
    slo = Slo(ttft_s=1.0, tpot_s=0.5)
    assert slo.is_kept(finished(0, 1.0, 3.0))
    assert not slo.is_kept(finished(0, 1.1, 3.0))
    assert not slo.is_kept(finished(0, 1.0, 3.1))
    assert not slo.is_kept(unfinished(0)) and not Slo().is_kept(unfinished(0))
    with pytest.raises(ConfigError, match="--slo-ttft"):
        Slo(ttft_s=0.0)


def test_waiting_is_enough_to_miss() -> None:
    """What has waited for longer than the limit counts before it ends, and once only."""
    watch = TargetWatch(Target.parse("ttft_p90=5"), num_requests=10)
    records = [unfinished(index, sent_s=float(index)) for index in range(3)]
    assert not any(watch.sent(record, record.sent_s) for record in records)
    assert not watch.passed(5.0)
    assert not watch.passed(5.5) and watch.num_missed == 1
    records[0].first_token_s = 5.6
    assert not watch.first_token(records[0], 5.6) and watch.num_missed == 1
    records[1].first_token_s = 5.9
    assert not watch.first_token(records[1], 5.9)
    assert not watch.passed(6.9) and watch.num_missed == 1, "the second had its first token in time"
    assert watch.passed(7.1), "the third has not, and only one of ten may miss"


@given(
    metric=st.sampled_from(["ttft", "latency", "tpot"]),
    requests=st.lists(
        st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.booleans(), st.integers(1, 4)), max_size=40
    ),
    percentile=st.sampled_from([50, 75, 90, 99]),
)
def test_giving_up_is_never_wrong_and_never_forgotten(
    metric: str, requests: list[tuple[float, float, float, bool, int]], percentile: int
) -> None:
    """Played back in order of time: the watch says stop if and only if the finished run misses the target."""
    target = Target(metric=metric, percentile=percentile, limit_s=4.0)
    watch = TargetWatch(target, len(requests))
    events = []
    records = []
    for index, (sent_s, ttft_s, more_s, fails, made) in enumerate(requests):
        end = finished(index, ttft_s, ttft_s + more_s, sent_s=sent_s, made=made)
        records.append(unfinished(index, sent_s=sent_s))
        events += [(sent_s, 0, index, end, fails), (end.first_token_s, 1, index, end, fails)]
        events += [(end.finished_s, 2, index, end, fails)]
    stopped = False
    for at_s, kind, index, end, fails in sorted(events, key=lambda event: (event[0], event[2], event[1])):
        record = records[index]
        stopped |= watch.passed(at_s)
        if kind == 0:
            stopped |= watch.sent(record, at_s)
        elif kind == 1:
            record.first_token_s = end.first_token_s
            stopped |= watch.first_token(record, at_s)
        else:
            record.finished_s, record.made_tokens = end.finished_s, end.made_tokens
            record.status = "failed" if fails else "finished"
            stopped |= watch.ended(record, at_s)
    assert stopped is not target.is_met(records)
