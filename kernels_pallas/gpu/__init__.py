"""The Hopper backend: paged attention by Mosaic GPU (TMA, wgmma, warp specialisation).

`schedule` cuts a step into items, `kernel` attends with them, `attention` lays out queries and merges partial results.
"""

from kernels_pallas.gpu.attention import attend, check, write_kv
from kernels_pallas.gpu.schedule import make_schedule

__all__ = ["attend", "check", "make_schedule", "write_kv"]
