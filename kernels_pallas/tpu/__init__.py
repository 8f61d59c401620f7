"""The TPU backend."""

from kernels_pallas.tpu.attention import attend
from kernels_pallas.tpu.limits import check
from kernels_pallas.tpu.schedule import Schedule, make_schedule
from kernels_pallas.tpu.write import write_kv

__all__ = ["Schedule", "attend", "check", "make_schedule", "write_kv"]
