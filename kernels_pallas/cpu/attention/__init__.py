"""Paged attention on a CPU: a backend, see `kernels_pallas.backends.Backend`. Its pages lie as jnp's do."""

from kernels_pallas.cpu.attention.backend import attend, check, write_kv
from kernels_pallas.cpu.attention.merge import merge_rows
from kernels_pallas.cpu.attention.schedule import make_schedule, starting_at
from kernels_pallas.cpu.rounding import rounded

__all__ = ["attend", "check", "make_schedule", "merge_rows", "rounded", "starting_at", "write_kv"]
