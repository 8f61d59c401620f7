"""The waiting queue of a device group: which request is tried next. One module a policy; `make_queue` picks it."""

from preble_jax.sched.queues.base import QueuePolicy
from preble_jax.sched.queues.make import make_queue

__all__ = ["QueuePolicy", "make_queue"]
