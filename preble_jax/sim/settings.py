"""What is simulated besides the workload: the cluster, its settings, and what goes wrong in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from preble_jax.config import QueueSettings, SchedSettings, TenantSettings
from preble_jax.errors import ConfigError
from preble_jax.sim.cost.base import EngineShape

FaultKind = Literal["kill", "restart", "drain", "undrain"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """at_s: on the workload's clock. group: number of the device group, from 0.

    kill: the process is gone, with its pages and its requests; frontends and the scheduler notice at once.
    restart: a new process takes its place, with nothing cached (one that still runs is killed first).
    drain: no new requests; those it has go on. undrain: it takes requests again, with what it has cached.
    """

    at_s: float
    group: int
    kind: FaultKind


@dataclass(frozen=True, kw_only=True)
class SimSettings:
    """num_groups: device groups. page_size: tokens a page.

    kv_tokens, prefill_tokens, max_prefill_seqs, max_num_seqs: of one group, as in EngineShape; 0: the cost model's.
    sched, queue, tenants: the production sections. seed takes the place of sched.seed.
    event_lag_s: KV events, load reports and reports of first tokens and ends reach the scheduler so much later.
    report_interval_s: between a group's reports (KV events and load), and between the scheduler's ticks.
    network_s: from the frontend to the group.
    groups_per_host: groups that share a machine, each with cores of its own: those with a number below it are on the
        first one, and so on. Their steps take longer while others of the machine compute, where the cost model knows.
    decode_steps, max_dispatch_s: as in EngineSettings: tokens that a dispatch may make while nobody waits.
    coast: groups that do nothing but decode are advanced many steps at a time: the same result, faster.
    faults: in any order. horizon_s: where the simulated clock is stopped; None: when all requests have ended.
    Raises ConfigError.
    """

    num_groups: int = 4
    kv_tokens: int = 0
    page_size: int = 16
    prefill_tokens: int = 0
    max_prefill_seqs: int = 0
    max_num_seqs: int = 0
    sched: SchedSettings = field(default_factory=SchedSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    tenants: TenantSettings = field(default_factory=TenantSettings)
    event_lag_s: float = 0.0
    report_interval_s: float = 0.25
    network_s: float = 0.0
    groups_per_host: int = 1
    decode_steps: int = 8
    max_dispatch_s: float = 0.05
    coast: bool = True
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    horizon_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_groups", "page_size", "decode_steps", "groups_per_host"):
            self._require(name, 1)
        for name in ("kv_tokens", "prefill_tokens", "max_prefill_seqs", "max_num_seqs"):
            self._require(name, 0)
        for name in ("event_lag_s", "network_s", "max_dispatch_s", "seed"):
            self._require(name, 0)
        self._require("report_interval_s", 1e-3)
        if self.horizon_s is not None:
            self._require("horizon_s", 0)
        for fault in self.faults:
            if not 0 <= fault.group < self.num_groups or not 0 <= fault.at_s < math.inf:
                raise ConfigError(
                    f"faults: expected a time >= 0 and a group in 0..{self.num_groups - 1}, got {fault.kind!r} of "
                    f"group {fault.group} at {fault.at_s}"
                )

    def _require(self, name: str, low: float) -> None:
        value = getattr(self, name)
        if not low <= value < math.inf:
            raise ConfigError(f"sim.{name}: expected a finite number >= {low:g}, got {value}")

    def engine(self, shape: EngineShape) -> EngineShape:
        """`shape`, with what the settings give in place of it. Raises ConfigError when a page does not fit."""
        names = ("kv_tokens", "prefill_tokens", "max_prefill_seqs", "max_num_seqs")
        shape = replace(shape, **{name: getattr(self, name) for name in names if getattr(self, name)})
        if shape.kv_tokens < 2 * self.page_size:
            raise ConfigError(
                f"sim.kv_tokens: expected room for two pages of {self.page_size} tokens, got {shape.kv_tokens} tokens"
            )
        return shape

    @property
    def sums_exactly(self) -> bool:
        """Tenants' accounts are whole numbers, whose sums are the same in any order."""
        tenants = self.tenants
        amounts = (tenants.extend_weight, tenants.output_weight, self.queue.dlpm_quantum)
        return not tenants.weights and all(float(amount).is_integer() for amount in amounts)

    @cached_property
    def seeded_sched(self) -> SchedSettings:
        return replace(self.sched, seed=self.seed)
