"""Ahead of time: what the TPU compiler says of any program, and of the attention kernels, where there is no TPU.

`python -m kernels_pallas.aot` prints the table; `TpuTopology` compiles anything else.
"""

from kernels_pallas.aot.cases import PRESETS, VARIANTS, Case
from kernels_pallas.aot.report import CompileReport
from kernels_pallas.aot.topology import LibtpuMissingError, TpuCompileError, TpuTopology

__all__ = ["PRESETS", "VARIANTS", "Case", "CompileReport", "LibtpuMissingError", "TpuCompileError", "TpuTopology"]
