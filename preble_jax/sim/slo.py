"""What is promised to a request (`Slo`), to the slowest percent of them (`Target`), and when a run cannot keep it."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preble_jax.errors import ConfigError
from preble_jax.sim.record import RequestRecord

METRICS = ("ttft", "latency", "tpot", "norm_latency")


def value_of(record: RequestRecord, metric: str) -> float | None:
    """Seconds of one finished request; None: it did not finish, or has no such number (the time between tokens of an
    answer of one). norm_latency: latency per output token, as Preble plots it."""
    if record.status != "finished" or record.finished_s is None or record.first_token_s is None:
        return None
    match metric:
        case "ttft":
            return record.first_token_s - record.sent_s
        case "latency":
            return record.finished_s - record.sent_s
        case "tpot":
            return (record.finished_s - record.first_token_s) / (made - 1) if (made := _num_made(record)) > 1 else None
        case "norm_latency":
            return (record.finished_s - record.sent_s) / max(_num_made(record), 1)
    raise ConfigError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")


def _num_made(record: RequestRecord) -> int:
    return record.made_tokens or record.num_output


@dataclass(frozen=True, kw_only=True)
class Slo:
    """A request is good when it finished and kept every limit that is set. Seconds; None: no limit."""

    ttft_s: float | None = None
    latency_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "latency_s", "tpot_s"):
            limit = getattr(self, name)
            if limit is not None and not 0.0 < limit < math.inf:
                raise ConfigError(f"--slo-{name.removesuffix('_s')}: expected seconds above 0, got {limit}")

    @property
    def limits(self) -> dict[str, float]:
        limits = {"ttft": self.ttft_s, "latency": self.latency_s, "tpot": self.tpot_s}
        return {metric: limit for metric, limit in limits.items() if limit is not None}

    def is_kept(self, record: RequestRecord) -> bool:
        if record.status != "finished":
            return False
        return all((value_of(record, metric) or 0.0) <= limit for metric, limit in self.limits.items())


@dataclass(frozen=True, kw_only=True)
class Target:
    """ "ttft_p99=5": of all requests that were sent, 99% have a time to the first token of at most 5 s. A request that
    is refused, lost or not done in time is over every limit."""

    metric: str
    percentile: float
    limit_s: float

    @classmethod
    def parse(cls, text: str) -> Target:
        match = re.fullmatch(rf"({'|'.join(METRICS)})_p(\d+(?:\.\d+)?)=(.+)", text)
        limit_s = _number(match[3]) if match else math.nan
        if match is None or not 0.0 < float(match[2]) < 100.0 or not 0.0 < limit_s < math.inf:
            raise ConfigError(
                f"--slo: expected METRIC_pN=SECONDS with a metric of {', '.join(METRICS)}, for example ttft_p99=5, "
                f"got {text!r}"
            )
        return cls(metric=match[1], percentile=float(match[2]), limit_s=limit_s)

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percentile:g}={self.limit_s:g}"

    def num_allowed(self, num_requests: int) -> int:
        """How many of them may miss."""
        return int(num_requests * (100.0 - self.percentile) / 100.0 + 1e-9)

    def value(self, records: Sequence[RequestRecord]) -> float:
        """The percentile over all requests: the least value that no more than num_allowed of them exceed; infinite
        when more than that did not finish, 0 without requests."""
        if not records:
            return 0.0
        values = sorted(self._or_infinite(record) for record in records)
        return values[len(values) - 1 - self.num_allowed(len(values))]

    def _or_infinite(self, record: RequestRecord) -> float:
        if record.status != "finished":
            return math.inf
        return value_of(record, self.metric) or 0.0

    def is_met(self, records: Sequence[RequestRecord]) -> bool:
        return self.value(records) <= self.limit_s


class TargetWatch:
    """Stops a simulation as soon as the target cannot be met any more: a StopRule.

    num_requests: of the whole workload; its percentile says how many may miss. Requests that wait for longer than the
    limit are over it, whatever becomes of them.
    """

    def __init__(self, target: Target, num_requests: int) -> None:
        self.num_missed = 0
        self.num_sent = 0
        self.num_finished = 0
        self._target = target
        self._num_allowed = target.num_allowed(num_requests)
        self._missed: set[int] = set()
        # By time of sending; only what must come within a time of its own can be late before it has come.
        self._waiting: deque[RequestRecord] = deque()

    def sent(self, record: RequestRecord, now: float) -> bool:
        self.num_sent += 1
        if self._target.metric in ("ttft", "latency"):
            self._waiting.append(record)
        return False

    def first_token(self, record: RequestRecord, now: float) -> bool:
        if self._target.metric == "ttft" and now - record.sent_s > self._target.limit_s:
            return self._miss(record)
        return False

    def ended(self, record: RequestRecord, now: float) -> bool:
        self.num_finished += record.status == "finished"
        value = value_of(record, self._target.metric)
        late = record.status != "finished" or (value is not None and value > self._target.limit_s)
        return self._miss(record) if late else False

    def passed(self, now: float) -> bool:
        while self._waiting and now - self._waiting[0].sent_s > self._target.limit_s:
            record = self._waiting.popleft()
            came_s = record.first_token_s if self._target.metric == "ttft" else record.finished_s
            if came_s is None and self._miss(record):
                return True
        return False

    def _miss(self, record: RequestRecord) -> bool:
        if record.index not in self._missed:
            self._missed.add(record.index)
            self.num_missed += 1
        return self.num_missed > self._num_allowed


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def quantiles(values: Sequence[float], points: Sequence[float] = (50, 90, 99)) -> list[float | None]:
    """Linear between ranks; None for all without values."""
    if not len(values):
        return [None] * len(points)
    return [float(value) for value in np.percentile(np.asarray(values), points)]
