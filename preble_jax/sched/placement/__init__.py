"""Placement policies, one file each, behind one interface (base.PlacementPolicy). New ones: `make_policy`."""

from __future__ import annotations

from preble_jax.config import SchedSettings
from preble_jax.errors import ConfigError
from preble_jax.sched.cost import CostModel
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query
from preble_jax.sched.placement.e2 import E2
from preble_jax.sched.placement.round_robin import RoundRobin

__all__ = ["E2", "Cluster", "PlacementPolicy", "Proposal", "Query", "RoundRobin", "make_policy"]


def make_policy(settings: SchedSettings, cost: CostModel) -> PlacementPolicy:
    """Raises ConfigError for a name nobody implements."""
    if settings.placement == "e2":
        return E2(cost, settings.imbalance_ratio)
    if settings.placement == "round_robin":
        return RoundRobin()
    raise ConfigError(f"sched.placement: expected e2 or round_robin, got {settings.placement!r}")
