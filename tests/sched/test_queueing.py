"""Queueing times against sums over the list of all reports."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from preble_jax.sched.placement.base import Prefix
from preble_jax.sched.queueing import QueueingTimes

SPAN_S = 10.0
PREFIXES = [Prefix(b"a", 3), Prefix(b"b", 4)]

reports = st.lists(
    st.tuples(
        st.sampled_from(["add", "restart", "ask", "changed"]),
        st.sampled_from(PREFIXES),
        st.integers(0, 1_000),
        st.sampled_from([0.0, 1.0, 4.0, 9.0, 25.0]),
    )
)


@given(reports)
def test_averages_of_two_windows(history: list[tuple[str, Prefix, int, float]]) -> None:
    times = QueueingTimes(SPAN_S)
    told: list[dict] = []
    since: list[Prefix] = []
    now = 0.0
    for what, prefix, queue_ns, wait in history:
        now += wait
        if what == "add":
            times.add(prefix, queue_ns, now)
            told.append({"at": now, "prefix": prefix, "ns": queue_ns, "old": False})
            since.append(prefix)
        elif what == "restart":
            times.restart(prefix)
            for report in told:
                report["old"] |= report["prefix"] == prefix
        elif what == "changed":
            assert times.changed(now) == list(dict.fromkeys(since))
            since = []
        mine = [r for r in told if r["prefix"] == prefix and r["at"] + 2 * SPAN_S > now]
        recent = [r["ns"] for r in mine if r["at"] + SPAN_S > now and not r["old"]]
        before = [r["ns"] for r in mine if r["at"] + SPAN_S <= now or r["old"]]
        expected = tuple(sum(part) / len(part) if part else 0.0 for part in (recent, before))
        assert times.averages(prefix, now) == expected


def test_silent_prefixes_are_forgotten() -> None:
    times = QueueingTimes(SPAN_S)
    for i in range(100):
        times.add(Prefix(bytes([i]), 1), 5, float(i))
    assert len(times) == 100
    times.changed(99.0)
    assert len(times) == 20
    times.changed(200.0)
    assert len(times) == 0
