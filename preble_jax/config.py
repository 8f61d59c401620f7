"""The settings of a deployment: frozen dataclasses, one a section. They are the truth; files only build them.

`configs/*.py` files and command-line overrides are read by `preble_jax.config_files`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from preble_jax.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]
WeightFormat = Literal["native", "int8"]
DEFAULT_PLACEMENT = "least_added_delay"
DELAY_TERMS = frozenset({"slots", "tenants", "overtaken", "copies", "shorter", "standing"})


def _require(key: str, value: float, low: float, high: float = math.inf) -> None:
    """NaN and infinity are refused too."""
    if not low <= value <= high or math.isinf(value):
        bound = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{key}: expected {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """name: registry name, Hugging Face folder, .gguf file or Orbax folder.

    dtype: what is computed in.
    weight_format: "native" keeps matrices in `dtype`; "int8" in 8 bits, with a scale for each output channel: half the
        memory of bfloat16, for tokens that differ now and then (docs/performance.md says how often).
    max_model_len: tokens of prompt and output; 0 takes the model's own context.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Dtype = "bfloat16"
    weight_format: WeightFormat = "native"
    max_model_len: int = 0

    def __post_init__(self) -> None:
        _require("model.max_model_len", self.max_model_len, 0)


@dataclass(frozen=True, kw_only=True)
class KVSettings:
    """num_pages: 0 sizes the pool from `memory_gib`. prefix_cache: keep and share pages between requests.

    memory_gib: of one device, for pages; "auto": from what is free there when the weights have been read, and never
        more than the running sequences can hold.
    memory_fraction: share of the free memory that "auto" takes. "auto" itself: 0.9 on accelerators; 0.5 on the CPU, up
        to 2 GiB (more only when it is asked for, because clearing the pages takes part of every start).
    memory_sharers: engines that size their pages from the same free memory: on the CPU each takes its part of the
        fraction. 0: `serve.groups` in a worker, 1 otherwise.
    """

    page_size: int = 16
    num_pages: int = 0
    memory_gib: float | Literal["auto"] = "auto"
    memory_fraction: float | Literal["auto"] = "auto"
    memory_sharers: int = 0
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        _require("kv.page_size", self.page_size, 1)
        _require("kv.num_pages", self.num_pages, 0)
        _require("kv.memory_sharers", self.memory_sharers, 0)
        if self.memory_gib != "auto":
            _require("kv.memory_gib", self.memory_gib, 0)
        if self.memory_fraction != "auto":
            _require("kv.memory_fraction", self.memory_fraction, 0.01, 0.99)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Shapes are compiled once per bucket before the first request.

    max_num_seqs: sequences that decode at a time.
    decode_buckets: padded decode batch sizes; the last is `max_num_seqs` (filled in when empty).
    prefill_buckets: padded prompt tokens of a step; the largest is the step's prompt-token budget.
    max_prefill_seqs: prompt chunks in one step.
    attention: "auto" picks by platform; "jnp" forces the reference.
    cpu_kernels: "auto" multiplies matrices on one CPU (in bfloat16, or int8) by kernels of the project's own, where the
        processor has what they need; "off" by XLA's.
    shared_prefix: cached pages that several sequences of a step share are read once for all of them, where it pays.
    decode_steps: tokens that running requests may be given in one go while nobody waits; 1: never more than one.
    max_dispatch_s: seconds that a new request may find the device busy with such tokens; the number of them is kept
        below it, by the measured time of a step.
    """

    max_num_seqs: int = 64
    decode_buckets: tuple[int, ...] = ()
    prefill_buckets: tuple[int, ...] = (128, 512)
    max_prefill_seqs: int = 16
    attention: str = "auto"
    cpu_kernels: Literal["auto", "off"] = "auto"
    shared_prefix: bool = True
    decode_steps: int = 8
    max_dispatch_s: float = 0.05

    def __post_init__(self) -> None:
        _require("engine.max_num_seqs", self.max_num_seqs, 1)
        _require("engine.decode_steps", self.decode_steps, 1)
        _require("engine.max_dispatch_s", self.max_dispatch_s, 0)
        _require("engine.max_prefill_seqs", self.max_prefill_seqs, 1)


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """The device group's mesh. tensor: devices over which weights and KV heads are split."""

    tensor: int = 1

    def __post_init__(self) -> None:
        _require("mesh.tensor", self.tensor, 1)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """The local scheduler's waiting queue.

    policy: who is tried first; docs/scheduling.md says when to choose which.
    head_start: of fair: prompt tokens that the group takes on before a request is as good as one that comes then with
        everything cached, for each token of the request that is not cached. 0: by arrival; large: least uncached first.
    num_priority_groups: P of priority_groups: requests are ranked by cached share of their prompt in P parts.
    dlpm_quantum: Q_u of fair and dlpm, service units (computed prompt tokens, at the default weights) that a tenant of
        weight 1 gets at a refill. More of it: longer runs of one prefix; less: tighter fairness between tenants.
    max_waiting: requests; beyond it a request is refused with a retry hint.
    """

    policy: Literal["fair", "priority_groups", "fcfs", "lpm", "vtc", "dlpm"] = "fair"
    head_start: float = 1.0
    num_priority_groups: int = 10
    dlpm_quantum: float = 2048.0
    max_waiting: int = 10_000

    def __post_init__(self) -> None:
        _require("queue.head_start", self.head_start, 0)
        _require("queue.num_priority_groups", self.num_priority_groups, 1)
        _require("queue.max_waiting", self.max_waiting, 1)
        _require("queue.dlpm_quantum", self.dlpm_quantum, 1)


@dataclass(frozen=True, kw_only=True)
class BaselineSettings:
    """What the placement policies that are there for comparison are tuned by (docs/scheduling.md says what each does).
    A default is the source's own where the source has one.

    hash_blocks: consistent_hashing: pages at a prompt's beginning that make its key (our choice).
    hash_epsilon: how far above the average load a group may be, as a share of it (arXiv 1608.01350 writes ε).
    hash_points: places of a group on the ring (our choice).
    cache_aware_threshold: share of the prompt that has to match for cache affinity (SGLang's router: cache_threshold).
    cache_aware_balance_abs, cache_aware_balance_rel: requests by which, and times over, the longest queue must exceed
        the shortest for affinity to be given up (SGLang's router: balance_abs_threshold, balance_rel_threshold).
    dynamo_overlap_credit: share of a cached token that counts as not to be computed (Dynamo: overlap score credit).
    dynamo_prefill_scale: weight of prefill against decode pages (Dynamo: prefill load scale).
    dynamo_temperature: of the softmax over costs scaled to a range of 1; 0 takes the least cost (Dynamo: temperature).
    cacheroute_interval_s: seconds between plans.
    cacheroute_key_blocks: pages at a prompt's beginning that make its key.
    cacheroute_q_cap: requests a second of one key that one group takes. cacheroute_warm_slots: W, keys a group is kept
        warm for. (Values of all four: our choice.)
    released_high_load: preble_released: times the lightest load from which the heaviest group's prefixes are moved.
    released_min_requests: preble_released: placements before the first such move.
    """

    hash_blocks: int = 4
    hash_epsilon: float = 0.25
    hash_points: int = 64
    cache_aware_threshold: float = 0.3
    cache_aware_balance_abs: int = 64
    cache_aware_balance_rel: float = 1.5
    dynamo_overlap_credit: float = 1.0
    dynamo_prefill_scale: float = 1.0
    dynamo_temperature: float = 0.0
    cacheroute_interval_s: float = 30.0
    cacheroute_key_blocks: int = 64
    cacheroute_q_cap: float = 2.0
    cacheroute_warm_slots: int = 64
    released_high_load: float = 1.5
    released_min_requests: int = 50

    def __post_init__(self) -> None:
        for name in ("hash_blocks", "hash_points", "cacheroute_key_blocks", "cacheroute_warm_slots"):
            _require(f"sched.{name}", getattr(self, name), 1)
        for name in ("cache_aware_balance_abs", "dynamo_prefill_scale", "dynamo_temperature", "released_min_requests"):
            _require(f"sched.{name}", getattr(self, name), 0)
        for name in ("cache_aware_balance_rel", "released_high_load"):
            _require(f"sched.{name}", getattr(self, name), 1)
        for name in ("cache_aware_threshold", "dynamo_overlap_credit"):
            _require(f"sched.{name}", getattr(self, name), 0, 1)
        for name in ("hash_epsilon", "cacheroute_interval_s", "cacheroute_q_cap"):
            _require(f"sched.{name}", getattr(self, name), 1e-6)


@dataclass(frozen=True, kw_only=True)
class SchedSettings(BaselineSettings):
    """Global placement. Costs are seconds of a device group; the defaults are those of the default model on
    one CPU core (`preble-jax profile` measures them).

    placement: the policy (docs/scheduling.md). "default" stands for DEFAULT_PLACEMENT; "e2" and "d2lpm" may be chosen
        for reasons that are given there; the others are there for comparison.
    window_s: the window H over which history counts.
    imbalance_ratio: IMBAL_R, the share of decode time in a group's load above which it is sent prefill work.
    rebalance: whether e2 redirects exploits of the heaviest group to the lightest; rebalance_ratio: Th_bal, while the
        cost of the first is more than so many times that of the second.
    autoscale: whether e2 replicates a prefix when the average queueing time of its requests over the window has grown
        to more than autoscale_ratio times what it was over the window before.
    d2lpm_quantum_tokens: Q_w of d2lpm, service units (computed prompt tokens, at the default weights) that a tenant of
        weight 1 gets on each group at a refill. More of it: longer stays where the prefix is; less: tighter fairness.
        least_added_delay takes tenants for equal whose service differs by less than one on every group.
    delay_others: of least_added_delay: how many later requests wait while a group computes a prompt, for each request
        that is outstanding on a group, on the average of the cluster. 0: a prompt's work is its own affair.
    delay_decoding: of least_added_delay: share of the requests outstanding on a group whose steps, for the whole of a
        new request's output, are lengthened by it. 0: outputs cost nobody anything.
    delay_without: terms of least_added_delay (DELAY_TERMS) to be left out, with commas between them: for measuring what
        they are worth.
    prefill_base_s + prefill_token_s * tokens: time to compute that many prompt tokens.
    decode_token_s: time one output token costs a group. `preble-jax profile` measures these three on any machine.
    cost_file: a file of `preble-jax profile`: its costs take the place of these three, unless an override gives them.
    refine_costs: fit them for each group anew, all the time, from the step timings it reports.
    max_forest_blocks: pages the forest remembers at most, over all groups (a page held by several groups counts once).
    group_timeout_s: a group that sends nothing for longer is dropped.
    optimistic_ttl_s: how long a placement counts as cached pages when no KV event of the group confirms it.
    request_timeout_s: a placed request that nobody reports finished for longer is forgotten.
    snapshot_retry_s: least time between two demands for a snapshot of the same group.
    seed: decides between groups of equal cost.
    """

    placement: Literal[
        "default",
        "least_added_delay",
        "e2",
        "d2lpm",
        "round_robin",
        "least_loaded",
        "consistent_hashing",
        "cache_aware",
        "dynamo_cost",
        "lmetric",
        "cacheroute",
        "preble_released",
    ] = "default"
    window_s: float = 180.0
    imbalance_ratio: float = 0.8
    rebalance: bool = True
    rebalance_ratio: float = 1.5
    autoscale: bool = True
    autoscale_ratio: float = 2.0
    d2lpm_quantum_tokens: int = 8192
    delay_others: float = 0.25
    delay_decoding: float = 0.25
    delay_without: str = ""
    prefill_base_s: float = 0.03
    prefill_token_s: float = 0.0008
    decode_token_s: float = 0.006
    cost_file: str = ""
    refine_costs: bool = True
    max_forest_blocks: int = 2_000_000
    group_timeout_s: float = 5.0
    optimistic_ttl_s: float = 60.0
    request_timeout_s: float = 3600.0
    snapshot_retry_s: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window_s", "group_timeout_s", "optimistic_ttl_s", "request_timeout_s", "snapshot_retry_s"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ConfigError(f"sched.{name}: expected finite seconds > 0, got {value}")
        for name in ("rebalance_ratio", "autoscale_ratio", "d2lpm_quantum_tokens"):
            _require(f"sched.{name}", getattr(self, name), 1)
        for name in (
            "prefill_base_s",
            "prefill_token_s",
            "decode_token_s",
            "imbalance_ratio",
            "delay_others",
            "delay_decoding",
        ):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"sched.{name}: expected a finite number >= 0, got {value}")
        if unknown := self.terms_left_out - DELAY_TERMS:
            raise ConfigError(
                f"sched.delay_without: expected names of {sorted(DELAY_TERMS)} with commas between them, got "
                f"{sorted(unknown)}"
            )
        if self.max_forest_blocks < 1:
            raise ConfigError(f"sched.max_forest_blocks: expected at least 1 page, got {self.max_forest_blocks}")

    @property
    def terms_left_out(self) -> frozenset[str]:
        return frozenset(filter(None, self.delay_without.split(",")))

    @property
    def policy(self) -> str:
        """The placement policy by the name of its own, which is what to show."""
        return DEFAULT_PLACEMENT if self.placement == "default" else self.placement


@dataclass(frozen=True, kw_only=True)
class TenantSettings:
    """Who gets how much, under the policies that know tenants (vtc, dlpm, d2lpm).

    weights: (tenant, share) pairs; a tenant of weight 2 gets twice the service of one of weight 1 while both have
        requests waiting. Tenants that are not named have weight 1.
    extend_weight, output_weight: service units per prompt token that had to be computed, and per output token.
    max_outstanding: requests of one tenant that the scheduler has placed and that have not ended; beyond it a request
        is refused with a retry hint, whatever the policy. 0: no limit.
    """

    weights: tuple[tuple[str, float], ...] = ()
    extend_weight: float = 1.0
    output_weight: float = 2.0
    max_outstanding: int = 0

    def __post_init__(self) -> None:
        _require("tenants.max_outstanding", self.max_outstanding, 0)
        for tenant, weight in self.weights:
            if not 1e-6 <= weight <= 1e6:
                raise ConfigError(f"tenants.weights: expected a number in [1e-6, 1e6] for {tenant!r}, got {weight}")
        if len(dict(self.weights)) != len(self.weights):
            raise ConfigError(f"tenants.weights: expected each tenant once, got {self.weights}")
        for name in ("extend_weight", "output_weight"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"tenants.{name}: expected a finite number > 0, got {getattr(self, name)}")

    @cached_property
    def _weight_of(self) -> dict[str, float]:
        return dict(self.weights)

    def weight(self, tenant: str) -> float:
        return self._weight_of.get(tenant, 1.0)

    def service(self, extend_tokens: int, output_tokens: int) -> float:
        """What so many tokens count, in service units, whoever receives them."""
        return self.extend_weight * extend_tokens + self.output_weight * output_tokens


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Addresses. Port 0 lets the system choose. Worker i listens on worker_port + i when that is not 0."""

    host: str = "127.0.0.1"
    frontend_port: int = 50050
    scheduler_port: int = 50051
    worker_port: int = 50060
    groups: int = 2
    report_interval_s: float = 0.25
    start_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in ("frontend_port", "scheduler_port", "worker_port"):
            _require(f"serve.{name}", getattr(self, name), 0, 65_535)
        _require("serve.groups", self.groups, 1)
        for name in ("report_interval_s", "start_timeout_s"):
            _require(f"serve.{name}", getattr(self, name), 0.01)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One deployment."""

    model: ModelSettings = field(default_factory=ModelSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    mesh: MeshSettings = field(default_factory=MeshSettings)
    queue: QueueSettings = field(default_factory=QueueSettings)
    sched: SchedSettings = field(default_factory=SchedSettings)
    tenants: TenantSettings = field(default_factory=TenantSettings)
    serve: ServeSettings = field(default_factory=ServeSettings)
