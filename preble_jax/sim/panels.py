"""From rows of sweeps and files of runs to panels: what is drawn of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.intervals import mean_and_half_width
from preble_jax.sim.labels import distinctions
from preble_jax.sim.plots import Curve, Panel

Row = Mapping[str, Any]
METRICS = ("latency_mean_s", "latency_p99_s")
_QUANTILES = {"mean": "mean", "p50": "median", "p90": "p90", "p99": "p99"}
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "norm_latency": "latency per output token", "queue": "queueing time"}


def rate_panels(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> list[Panel]:
    """A panel for each workload, number of groups and metric, a curve for each pair of policies (`variant`, where
    rows have one) and whatever else differs; means of the seeds with 95% intervals."""
    panels = []
    for (workload, groups), members in group_by(rows, ("workload", "groups")).items():
        for metric in metrics:
            curves = [
                _curve(name, group_by(policy_rows, ("rate",)), metric)
                for name, policy_rows in _by_policy(members).items()
            ]
            title = f"{workload}, {groups} groups"
            panels.append(Panel(title=title, x_label="requests/s", y_label=describe(metric), curves=curves))
    return panels


def ablation_panels(rows: Sequence[Row], metrics: Sequence[str] = METRICS) -> list[Panel]:
    """A panel for each workload, rate and metric, a bar for each pair of policies (`variant`, where rows have one) and
    whatever else differs."""
    panels = []
    for (workload, rate, groups), members in group_by(rows, ("workload", "rate", "groups")).items():
        for metric in metrics:
            bars = {name: spread(own, metric) for name, own in _by_policy(members).items()}
            rated = "" if rate is None else f" at {rate:g}/s"
            panels.append(
                Panel(title=f"{workload}{rated}, {groups} groups", y_label=describe(metric), bars=_finite(bars))
            )
    return panels


def service_panel(title: str, times_s: Sequence[float], tenants: Mapping[str, Sequence[float]]) -> Panel:
    """A curve a tenant: service units received by then."""
    curves = [Curve(label=tenant, x=times_s, y=units) for tenant, units in tenants.items()]
    return Panel(title=title, x_label="seconds", y_label="service received, units", curves=curves)


def group_by(rows: Sequence[Row], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """By the values of the keys, first come first. Raises InvalidRequestError for a row without them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        missing = [key for key in (*keys, "summary") if key not in row]
        if missing:
            raise InvalidRequestError(f"a row to draw: expected {', '.join(missing)} in it; give a file of `sim sweep`")
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def _by_policy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By what is to be read beside a curve or a bar."""
    known = ("variant",) if all("variant" in row for row in rows) else ("placement", "queue")
    one_queue = len(known) == 2 and len({queue for _, queue in group_by(rows, known)}) == 1
    shown = known[:1] if one_queue else known
    groups: dict[str, list[Row]] = {}
    for row, others in zip(rows, distinctions(rows, known), strict=True):
        policy = " + ".join(row[label] for label in shown)
        groups.setdefault(beside(policy, others), []).append(row)
    return groups


def beside(label: str, others: Mapping[str, str]) -> str:
    """others: of `distinctions`; what is as by default is not said."""
    return ", ".join([label, *(f"{name}={text}" for name, text in others.items() if text != "-")])


def _curve(label: str, by_rate: Mapping[tuple[Any, ...], Sequence[Row]], metric: str) -> Curve:
    points = sorted((rate, *spread(rows, metric)) for (rate,), rows in by_rate.items() if rate is not None)
    points = [point for point in points if point[1] == point[1]]  # NaN: nothing finished there
    return Curve(
        label=label,
        x=[rate for rate, _, _ in points],
        y=[mean for _, mean, _ in points],
        errors=[half_width for _, _, half_width in points] if any(half for _, _, half in points) else (),
    )


def spread(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """(mean over the seeds, half of its 95% interval); NaN without values. Raises InvalidRequestError."""
    values = []
    for row in rows:
        if metric not in row["summary"]:
            known = ", ".join(sorted(row["summary"]))
            raise InvalidRequestError(f"--metric: expected a number of the summary ({known}), got {metric!r}")
        if isinstance(row["summary"][metric], int | float):
            values.append(float(row["summary"][metric]))
    return mean_and_half_width(values)


def _finite(bars: Mapping[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    return {label: bar for label, bar in bars.items() if bar[0] == bar[0]}


def describe(metric: str) -> str:
    """ "latency_p99_s": "p99 latency, s"."""
    name, _, quantile = metric.removesuffix("_s").rpartition("_")
    if metric.endswith("_s") and quantile in _QUANTILES and name:
        return f"{_QUANTILES[quantile]} {_NAMES.get(name, name)}, s"
    return metric.replace("_", " ")
