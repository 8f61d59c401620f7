"""Workloads on one engine: rounds of each, from an empty prefix cache, and what was seen."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from preble_jax.bench.workloads import Workload
from preble_jax.engine.compile_cache import num_compiles
from preble_jax.engine.engine import Engine
from preble_jax.engine.ledger import StepTimes
from preble_jax.errors import InvalidRequestError
from preble_jax.progress import Progress
from preble_jax.request import Request, RequestOutput
from preble_jax.sampling_params import SamplingParams

WARM_UP_REQUESTS = 2


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a workload. Seconds are those of the wall clock, from the moment at which all requests arrive.

    cached_tokens: prompt tokens that pages held already. computed_tokens: prompt tokens that ran through the model.
    ttft: a request's first token. inter_token: time a token after the first; tokens that arrive together (of several
    decode steps in one dispatch) share the wait for them evenly. arrival_gap: between a stream's arrivals, as its
    reader sees them. p50, p90: over requests for ttft, over tokens and arrivals for the others; 0 where there are none.
    host_s: planning, building arrays, dispatching and booking results; device_s: from dispatch to results; wait_s: that
    the host stood still. With both overlapped, host_s and device_s add up to more than the round took.
    num_compiles: programs compiled during the round, where every one is a defect.
    """

    seconds: float
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int
    ttft_p50_s: float
    ttft_p90_s: float
    inter_token_p50_s: float
    inter_token_p90_s: float
    arrival_gap_p50_s: float
    arrival_gap_p90_s: float
    num_steps: int
    num_dispatches: int
    plan_s: float
    arrays_s: float
    dispatch_s: float
    settle_s: float
    host_s: float
    device_s: float
    wait_s: float
    num_compiles: int

    @property
    def requests_per_s(self) -> float:
        return self.num_requests / self.seconds

    @property
    def prompt_tokens_per_s(self) -> float:
        """Cached ones included: what the clients sent."""
        return self.prompt_tokens / self.seconds

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def hit_ratio(self) -> float:
        return self.cached_tokens / self.prompt_tokens

    def to_json(self) -> dict[str, float]:
        rates = ("requests_per_s", "prompt_tokens_per_s", "output_tokens_per_s", "hit_ratio")
        return {**asdict(self), **{name: getattr(self, name) for name in rates}}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A workload and its rounds, at least one."""

    workload: Workload
    rounds: Sequence[Round]

    @property
    def median(self) -> Round:
        """Each number's own median over the rounds; counts are rounded down."""
        values = {field.name: [getattr(r, field.name) for r in self.rounds] for field in fields(Round)}
        return Round(**{name: _median(seen) for name, seen in values.items()})

    @property
    def seconds_range(self) -> tuple[float, float]:
        seconds = [r.seconds for r in self.rounds]
        return min(seconds), max(seconds)

    def to_json(self) -> dict[str, object]:
        """Everything but the prompts, which the name and the seed stand for."""
        workload = self.workload
        return {
            "name": workload.name,
            "seed": workload.seed,
            "max_tokens": workload.max_tokens,
            "median": self.median.to_json(),
            "rounds": [r.to_json() for r in self.rounds],
        }


def measure(engine: Engine, workloads: Sequence[Workload], num_rounds: int, progress: Progress) -> list[Result]:
    """Runs every workload `num_rounds` times, each from an empty prefix cache.

    Before them come two requests of each, which count nowhere. Rounds are interleaved, so that a machine that is slow
    for a while is slow for all workloads. The engine must be idle. All prompts are checked before any is run: raises
    InvalidRequestError.
    """
    for workload in workloads:
        _check(engine, workload)
    rounds: list[list[Round]] = [[] for _ in workloads]
    with progress.task("measuring", total=(num_rounds + 1) * len(workloads)) as task:
        for workload in workloads:
            _run(engine, workload, workload.prompts[:WARM_UP_REQUESTS])
            task.advance()
        for _ in range(num_rounds):
            for workload, seen in zip(workloads, rounds, strict=True):
                seen.append(_run(engine, workload, workload.prompts))
                task.advance()
    return [Result(workload=workload, rounds=seen) for workload, seen in zip(workloads, rounds, strict=True)]


@dataclass
class _Stream:
    """What came for one request, and when. arrivals: (time, tokens)."""

    arrivals: list[tuple[float, int]]
    cached_tokens: int = 0

    def take(self, output: RequestOutput, now: float) -> None:
        self.cached_tokens = output.cached_tokens
        if output.token_ids:
            self.arrivals.append((now, len(output.token_ids)))


_ids = itertools.count()


def _run(engine: Engine, workload: Workload, prompts: Sequence[Sequence[int]]) -> Round:
    """One round; the engine is idle before and after, and its prefix cache empty before."""
    requests = [_request(workload, prompt) for prompt in prompts]
    streams = {request.request_id: _Stream([]) for request in requests}
    engine.reset_prefix_cache()
    ledger, compiles = engine.ledger, num_compiles()
    times, steps, dispatches = copy.copy(ledger.times), ledger.steps, ledger.dispatches
    computed = ledger.total.extend_tokens
    start = time.perf_counter()
    waiting = iter(requests)
    try:
        _feed(engine, waiting)
        while engine.has_work:
            outputs = engine.step()
            now = time.perf_counter() - start
            for output in outputs:
                streams[output.request_id].take(output, now)
            _feed(engine, waiting)
        seconds = time.perf_counter() - start
    finally:
        for request in requests:  # interrupted: nothing is left behind
            engine.cancel(request.request_id)
    return Round(
        seconds=seconds,
        num_requests=len(requests),
        prompt_tokens=sum(map(len, prompts)),
        cached_tokens=sum(stream.cached_tokens for stream in streams.values()),
        computed_tokens=ledger.total.extend_tokens - computed,
        output_tokens=sum(count for stream in streams.values() for _, count in stream.arrivals),
        num_steps=ledger.steps - steps,
        num_dispatches=ledger.dispatches - dispatches,
        num_compiles=num_compiles() - compiles,
        **_latencies([stream.arrivals for stream in streams.values()]),
        **_split(times, ledger.times),
    )


def _feed(engine: Engine, waiting: Iterator[Request]) -> None:
    """Keeps the engine's queue filled without overflowing it."""
    while engine.scheduler.num_waiting < engine.limits.max_waiting:
        request = next(waiting, None)
        if request is None:
            return
        engine.add(request)


def _latencies(streams: Sequence[Sequence[tuple[float, int]]]) -> Mapping[str, float]:
    first = [arrivals[0][0] for arrivals in streams if arrivals]
    inter_token: list[float] = []
    gaps: list[float] = []
    for arrivals in streams:
        for (before, _), (now, count) in itertools.pairwise(arrivals):
            gaps.append(now - before)
            inter_token += [(now - before) / count] * count
    seen = {"ttft": first, "inter_token": inter_token, "arrival_gap": gaps}
    return {f"{name}_p{q}_s": percentile(values, q) for name, values in seen.items() for q in (50, 90)}


def percentile(values: Sequence[float], q: int) -> float:
    """The least value that at least q percent of all do not exceed; 0 where there is none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * q // 100) - 1)] if ordered else 0.0


def _median(values: Sequence[Any]) -> Any:
    return statistics.median_low(values) if isinstance(values[0], int) else statistics.median(values)


def _split(before: StepTimes, after: StepTimes) -> Mapping[str, float]:
    names = ("plan_s", "arrays_s", "dispatch_s", "settle_s", "host_s", "device_s", "wait_s")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def _request(workload: Workload, prompt: Sequence[int]) -> Request:
    sampling = SamplingParams(temperature=0.0, max_tokens=workload.max_tokens, ignore_eos=True)
    return Request(request_id=f"bench-{next(_ids)}", prompt_token_ids=prompt, sampling=sampling)


def _check(engine: Engine, workload: Workload) -> None:
    for index, prompt in enumerate(workload.prompts):
        try:
            engine.limits.check(_request(workload, prompt))
        except InvalidRequestError as error:
            raise type(error)(f"workload {workload.name}, prompt {index}: {error}") from None
