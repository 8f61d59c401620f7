"""Paged prefix attention. Two public calls, `paged_attention` and `write_kv`, over pages made by a `PageLayout`.

A caller never looks inside the page array: each backend packs pages as its hardware likes. What a step's layers share
is made once: `make_schedule`, and `SharedPrefixes` where sequences have cached pages in common.
"""

from kernels_pallas.api import StepSchedule, make_schedule, paged_attention, write_kv
from kernels_pallas.backends import BACKENDS, resolve_backend
from kernels_pallas.families import FamilyPlanner, SharedPrefixes
from kernels_pallas.family_costs import family_costs
from kernels_pallas.geometry import Geometry
from kernels_pallas.layout import PageLayout

__all__ = [
    "BACKENDS",
    "FamilyPlanner",
    "Geometry",
    "PageLayout",
    "SharedPrefixes",
    "StepSchedule",
    "family_costs",
    "make_schedule",
    "paged_attention",
    "resolve_backend",
    "write_kv",
]
