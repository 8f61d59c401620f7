"""Paged attention on a CPU: a backend, see `kernels_pallas.backends.Backend`. Its pages lie as jnp's do."""

from kernels_pallas.cpu.attention.backend import attend, check, write_kv
from kernels_pallas.cpu.attention.schedule import make_schedule

__all__ = ["attend", "check", "make_schedule", "write_kv"]
