"""The settings of a deployment: frozen dataclasses, one a section. They are the truth; files only build them.

`configs/*.py` files and command-line overrides are read by `preble_jax.config_files`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from preble_jax.errors import ConfigError

Dtype = Literal["bfloat16", "float32"]


def _require(key: str, value: float, low: float, high: float = math.inf) -> None:
    """NaN and infinity are refused too."""
    if not low <= value <= high or math.isinf(value):
        bound = f">= {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ConfigError(f"{key}: expected {bound}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """name: registry name, Hugging Face folder, .gguf file or Orbax folder.

    max_model_len: tokens of prompt and output; 0 takes the model's own context.
    """

    name: str = "smollm2-135m-instruct"
    dtype: Dtype = "bfloat16"
    max_model_len: int = 0

    def __post_init__(self) -> None:
        _require("model.max_model_len", self.max_model_len, 0)


@dataclass(frozen=True, kw_only=True)
class KVSettings:
    """num_pages: 0 sizes the pool from `memory_gib`. prefix_cache: keep and share pages between requests."""

    page_size: int = 16
    num_pages: int = 0
    memory_gib: float = 2.0
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        _require("kv.page_size", self.page_size, 1)
        _require("kv.num_pages", self.num_pages, 0)
        _require("kv.memory_gib", self.memory_gib, 0)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Shapes are compiled once per bucket before the first request.

    max_num_seqs: sequences that decode at a time.
    decode_buckets: padded decode batch sizes; the last is `max_num_seqs` (filled in when empty).
    prefill_buckets: padded prompt tokens of a step; the largest is the step's prompt-token budget.
    max_prefill_seqs: prompt chunks in one step.
    attention: "auto" picks by platform; "jnp" forces the reference.
    """

    max_num_seqs: int = 64
    decode_buckets: tuple[int, ...] = ()
    prefill_buckets: tuple[int, ...] = (128, 512)
    max_prefill_seqs: int = 8
    attention: str = "auto"

    def __post_init__(self) -> None:
        _require("engine.max_num_seqs", self.max_num_seqs, 1)
        _require("engine.max_prefill_seqs", self.max_prefill_seqs, 1)


@dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """The device group's mesh. tensor: devices over which weights and KV heads are split."""

    tensor: int = 1

    def __post_init__(self) -> None:
        _require("mesh.tensor", self.tensor, 1)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """The local scheduler's waiting queue. max_waiting: beyond it a request is refused with a retry hint."""

    policy: Literal["priority_groups", "fcfs"] = "priority_groups"
    num_priority_groups: int = 10
    max_waiting: int = 10_000

    def __post_init__(self) -> None:
        _require("queue.num_priority_groups", self.num_priority_groups, 1)
        _require("queue.max_waiting", self.max_waiting, 1)


@dataclass(frozen=True, kw_only=True)
class SchedSettings:
    """Global placement. Costs are seconds of a device group; the defaults are those of the default model on
    one CPU core (benchmarks/step_costs.py measures them).

    placement: the policy. "round_robin" ignores prefixes and loads; it is there for comparison.
    window_s: the window H over which history counts.
    imbalance_ratio: IMBAL_R, the share of decode time in a group's load above which it is sent prefill work.
    prefill_base_s + prefill_token_s * tokens: time to compute that many prompt tokens.
    decode_token_s: time one output token costs a group.
    max_forest_blocks: pages the forest remembers at most, over all groups (a page held by several groups counts once).
    group_timeout_s: a group that sends nothing for longer is dropped.
    optimistic_ttl_s: how long a placement counts as cached pages when no KV event of the group confirms it.
    request_timeout_s: a placed request that nobody reports finished for longer is forgotten.
    snapshot_retry_s: least time between two demands for a snapshot of the same group.
    seed: decides between groups of equal cost.
    """

    placement: Literal["e2", "round_robin"] = "e2"
    window_s: float = 180.0
    imbalance_ratio: float = 0.8
    prefill_base_s: float = 0.03
    prefill_token_s: float = 0.0008
    decode_token_s: float = 0.006
    max_forest_blocks: int = 2_000_000
    group_timeout_s: float = 5.0
    optimistic_ttl_s: float = 60.0
    request_timeout_s: float = 3600.0
    snapshot_retry_s: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("window_s", "group_timeout_s", "optimistic_ttl_s", "request_timeout_s", "snapshot_retry_s"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ConfigError(f"sched.{name}: expected finite seconds > 0, got {value}")
        for name in ("prefill_base_s", "prefill_token_s", "decode_token_s", "imbalance_ratio"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ConfigError(f"sched.{name}: expected a finite number >= 0, got {value}")
        if self.max_forest_blocks < 1:
            raise ConfigError(f"sched.max_forest_blocks: expected at least 1 page, got {self.max_forest_blocks}")


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
    serve: ServeSettings = field(default_factory=ServeSettings)
