"""The one place that maps a queue policy's name to its class."""

from __future__ import annotations

from preble_jax.config import QueueSettings
from preble_jax.errors import ConfigError
from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.queues.fcfs import FCFS
from preble_jax.sched.queues.priority_groups import PriorityGroups


def make_queue(settings: QueueSettings) -> QueuePolicy:
    if settings.policy == "fcfs":
        return FCFS()
    if settings.policy == "priority_groups":
        return PriorityGroups(settings.num_priority_groups)
    raise ConfigError(f"queue.policy: expected fcfs or priority_groups, got {settings.policy!r}")
