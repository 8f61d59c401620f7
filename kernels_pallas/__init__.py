"""Paged prefix attention. Two public calls, `paged_attention` and `write_kv`, over pages made by a `PageLayout`.

A caller never looks inside the page array: each backend packs pages as its hardware likes.
"""

from kernels_pallas.api import paged_attention, resolve_backend, write_kv
from kernels_pallas.layout import PageLayout

__all__ = ["PageLayout", "paged_attention", "resolve_backend", "write_kv"]
