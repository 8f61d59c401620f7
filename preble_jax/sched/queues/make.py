"""The one place that maps a queue policy's name to its class."""

from __future__ import annotations

from preble_jax.config import QueueSettings, TenantSettings
from preble_jax.errors import ConfigError
from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.queues.dlpm import DLPM
from preble_jax.sched.queues.fair import Fair
from preble_jax.sched.queues.fcfs import FCFS
from preble_jax.sched.queues.lpm import LPM
from preble_jax.sched.queues.priority_groups import PriorityGroups
from preble_jax.sched.queues.vtc import VTC


def make_queue(settings: QueueSettings, tenants: TenantSettings | None = None) -> QueuePolicy:
    """tenants: weights and prices, for the policies that know tenants; None: all alike, default prices."""
    tenants = tenants or TenantSettings()
    match settings.policy:
        case "fcfs":
            return FCFS()
        case "lpm":
            return LPM()
        case "priority_groups":
            return PriorityGroups(settings.num_priority_groups)
        case "vtc":
            return VTC(tenants)
        case "dlpm":
            return DLPM(tenants, settings.dlpm_quantum)
        case "fair":
            return Fair(tenants, settings.dlpm_quantum, settings.head_start)
    raise ConfigError(f"queue.policy: expected fair, dlpm, vtc, lpm, fcfs or priority_groups, got {settings.policy!r}")
