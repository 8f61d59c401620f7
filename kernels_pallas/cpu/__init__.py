"""Kernels for CPUs: written in Python, compiled by LLVM for the processor at hand, called by XLA through its FFI."""
