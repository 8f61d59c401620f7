"""What is drawn of rows: which curves, which points, which intervals. Nothing is drawn here."""

from __future__ import annotations

import math
import re

import pytest

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.intervals import geometric_mean, mean_and_half_width
from preble_jax.sim.panels import ablation_panels, describe, rate_panels, service_panel


def row(placement: str, rate: float, seed: int, latency_s: float | None, queue: str = "fcfs", **more) -> dict:
    labels = {"workload": "chat", "groups": 4, "placement": placement, "queue": queue, "rate": rate, "seed": seed}
    return {**labels, "summary": {"latency_mean_s": latency_s, "requests": 10}, **more}


ROWS = [
    row("e2", 8.0, 0, 2.0),
    row("e2", 8.0, 1, 4.0),
    row("e2", 4.0, 0, 1.0),
    row("e2", 4.0, 1, 1.0),
    row("round_robin", 4.0, 0, 1.5),
    row("round_robin", 8.0, 0, None),
]


def test_means_and_intervals() -> None:
    assert mean_and_half_width([5.0]) == (5.0, 0.0)
    mean, half_width = mean_and_half_width([2.0, 4.0])
    assert (mean, half_width) == (3.0, pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2)))
    assert mean_and_half_width([1.0, 2.0, 3.0, 4.0, 5.0])[1] == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5))
    assert all(map(math.isnan, mean_and_half_width([])))
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([1.0, 0.0]) == 0.0 and math.isnan(geometric_mean([]))


def test_a_curve_for_each_policy_by_rate() -> None:
    (panel,) = rate_panels(ROWS, ["latency_mean_s"])
    assert (panel.title, panel.y_label) == ("chat, 4 groups", "mean latency, s")
    ours, theirs = panel.curves
    assert (ours.label, ours.x, ours.y) == ("e2", [4.0, 8.0], [1.0, 3.0])
    assert ours.errors == [0.0, pytest.approx(12.706)]
    assert (theirs.label, theirs.x, theirs.y, theirs.errors) == ("round_robin", [4.0], [1.5], ())


def test_queues_are_named_where_they_differ() -> None:
    (panel,) = rate_panels([*ROWS, row("e2", 4.0, 0, 1.0, queue="lpm")], ["latency_mean_s"])
    assert [curve.label for curve in panel.curves] == ["e2 + fcfs", "round_robin + fcfs", "e2 + lpm"]


def test_bars_of_an_ablation() -> None:
    panels = ablation_panels(ROWS, ["latency_mean_s"])
    assert [panel.title for panel in panels] == ["chat at 8/s, 4 groups", "chat at 4/s, 4 groups"]
    assert panels[0].bars == {"e2": (3.0, pytest.approx(12.706))}, "nothing finished under round robin"
    assert panels[1].bars == {"e2": (1.0, 0.0), "round_robin": (1.5, 0.0)}
    named = [row("e2", 4.0, 0, 1.0, variant="all"), row("e2", 4.0, 0, 2.0, variant="without")]
    assert list(ablation_panels(named, ["latency_mean_s"])[0].bars) == ["all", "without"]


def test_service_has_a_curve_for_each_tenant() -> None:
    panel = service_panel("chat", [0.0, 1.0], {"a": [0.0, 5.0], "b": [0.0, 7.0]})
    assert [(curve.label, curve.y) for curve in panel.curves] == [("a", [0.0, 5.0]), ("b", [0.0, 7.0])]


def test_what_is_not_in_the_rows() -> None:
    with pytest.raises(InvalidRequestError, match=re.escape("(latency_mean_s, requests), got 'latency'")):
        rate_panels(ROWS, ["latency"])
    with pytest.raises(InvalidRequestError, match="expected groups, summary in it"):
        rate_panels([{"workload": "chat"}])


def test_names_for_people() -> None:
    names = {"latency_p99_s": "p99 latency, s", "ttft_mean_s": "mean TTFT, s"}
    names |= {"place_s": "place s", "norm_latency_p50_s": "median latency per output token, s"}
    assert {key: describe(key) for key in (*names, "hit_ratio")} == {**names, "hit_ratio": "hit ratio"}
