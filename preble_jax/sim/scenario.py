"""One simulation as data: what the command line, sweeps and experiments say, and what makes it run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from preble_jax.config import Config
from preble_jax.errors import ConfigError
from preble_jax.progress import Progress
from preble_jax.sim.cost import find_cost, scheduler_costs
from preble_jax.sim.record import SimResult
from preble_jax.sim.request import Workload
from preble_jax.sim.settings import SimSettings
from preble_jax.sim.simulator import Simulator
from preble_jax.sim.stop_rule import StopRule
from preble_jax.sim.traces import read_arrivals, read_trace
from preble_jax.sim.workloads import make_workload, require_workload

DEFAULT_COST = "mistral7b_a6000"
# What `scheduler_costs` fits, and an override may give instead.
_COST_KEYS = ("prefill_base_s", "prefill_token_s", "decode_token_s")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the requests come from: the name of a workload, or the path of a trace.

    rate: requests a second of the whole cluster; None: a trace's own times. num_requests, duration_s: how many or how
    long, what ends first; neither: as long as the original of a workload ran, all of a trace. A trace's times are
    stretched so that its first num_requests come at the rate; duration_s counts in the stretched times. block_size:
    tokens a block id of a trace stands for; None: told from the trace. length_scale: what a trace's lengths are
    multiplied by. time_unit: of Mooncake's timestamps, "ms" or "s"; None: milliseconds, if that can be.
    arrivals: path of a trace whose times the workload's requests come at, stretched to the rate; "": its own.
    """

    workload: str = ""
    trace: str = ""
    trace_format: str | None = None
    rate: float | None = None
    num_requests: int | None = None
    duration_s: float | None = None
    block_size: int | None = None
    length_scale: float = 1.0
    arrivals: str = ""
    time_unit: str | None = None

    def __post_init__(self) -> None:
        if bool(self.workload) == bool(self.trace):
            raise ConfigError("expected --workload NAME or --trace FILE, and not both; --list prints the workloads")
        if self.workload:
            require_workload(self.workload)
        if self.arrivals and self.trace:
            raise ConfigError("--arrivals: expected with --workload only, got it with --trace; leave it out")
        if self.workload and self.rate is None:
            raise ConfigError("--rate: expected requests a second for a workload, got none; for example --rate 8")
        for flag in ("rate", "duration_s", "num_requests"):
            value = getattr(self, flag)
            if value is not None and not 0.0 < value < float("inf"):
                raise ConfigError(f"--{_flag(flag)}: expected a number above 0, got {value}")

    @property
    def name(self) -> str:
        return self.workload or Path(self.trace).stem

    def load(self, num_groups: int, seed: int) -> Workload:
        if self.trace:
            workload = read_trace(
                Path(self.trace),
                self.trace_format,
                rate=self.rate,
                block_size=self.block_size,
                seed=seed,
                limit=self.num_requests,
                length_scale=self.length_scale,
                time_unit=self.time_unit,
            )
            return workload if self.duration_s is None else self._cut(workload, self.duration_s)
        assert self.rate is not None
        return make_workload(
            self.workload,
            rate=self.rate,
            num_requests=self.num_requests,
            duration_s=self.duration_s,
            num_groups=num_groups,
            seed=seed,
            arrivals=read_arrivals(self.arrivals) if self.arrivals else None,
        )

    def require_requests(self, workload: Workload) -> None:
        """workload: of `load`, which may have none, as a probe of a low rate may. Raises ConfigError."""
        if not workload.requests:
            lasting = "the original's" if self.duration_s is None else f"{self.duration_s:g}"
            raise ConfigError(
                f"--duration: expected to reach the first request of {self.workload} at {self.rate:g} requests/s, got"
                f" {lasting}; give a longer one"
            )

    def _cut(self, workload: Workload, duration_s: float) -> Workload:
        requests = [request for request in workload.requests if request.arrival_s < duration_s]
        if not requests:
            raise ConfigError(
                f"--duration: expected to reach the first request of {self.trace}, at "
                f"{workload.requests[0].arrival_s:.3f} s, got {duration_s:g}; give a longer one"
            )
        return replace(workload, requests=requests)


def _flag(name: str) -> str:
    return {"num_requests": "requests", "duration_s": "duration"}.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """cost: name of a cost model or path of a profile."""

    source: Source
    cost: str = DEFAULT_COST
    sim: SimSettings = field(default_factory=SimSettings)

    def with_rate(self, rate: float) -> Scenario:
        return replace(self, source=replace(self.source, rate=rate))

    def with_seed(self, seed: int) -> Scenario:
        return replace(self, sim=replace(self.sim, seed=seed))

    def with_placement(self, placement: str) -> Scenario:
        sched = replace(self.sim.sched, placement=placement)  # type: ignore[arg-type]
        return replace(self, sim=replace(self.sim, sched=sched))

    def run(
        self, workload: Workload | None = None, *, progress: Progress | None = None, stop: StopRule | None = None
    ) -> SimResult:
        """workload: made beforehand; None: from the source. Raises ConfigError and InvalidRequestError."""
        workload = workload or self.source.load(self.sim.num_groups, self.sim.seed)
        return Simulator(self.sim, find_cost(self.cost)).run(workload, progress=progress, stop=stop)


def make_sim_settings(config: Config, cost_name: str, overrides: Mapping[str, object], **more: object) -> SimSettings:
    """The production settings of a deployment, with the scheduler told this cost model's costs; what an override or a
    cost file gives stays as it is. more: further fields of SimSettings."""
    fitted = scheduler_costs(find_cost(cost_name))
    told = {} if config.sched.cost_file else {key: getattr(fitted, key) for key in _COST_KEYS}
    told = {key: value for key, value in told.items() if f"sched.{key}" not in overrides}
    known = {each.name for each in fields(SimSettings)}
    assert known >= more.keys(), sorted(more.keys() - known)
    return SimSettings(
        page_size=config.kv.page_size,
        sched=replace(config.sched, **told),
        queue=config.queue,
        tenants=config.tenants,
        report_interval_s=config.serve.report_interval_s,
        decode_steps=config.engine.decode_steps,
        max_dispatch_s=config.engine.max_dispatch_s,
        **more,  # type: ignore[arg-type]
    )
