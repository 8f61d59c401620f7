"""Placement policies, one file each, behind one interface (base.PlacementPolicy). New ones: `make_policy`."""

from __future__ import annotations

from preble_jax.config import SchedSettings, TenantSettings
from preble_jax.errors import ConfigError
from preble_jax.sched.cost import CostModel
from preble_jax.sched.placement.base import Cluster, PlacementPolicy, Proposal, Query
from preble_jax.sched.placement.baselines import make_baseline
from preble_jax.sched.placement.d2lpm import D2LPM
from preble_jax.sched.placement.e2 import E2
from preble_jax.sched.placement.least_added_delay import LeastAddedDelay

__all__ = ["D2LPM", "E2", "Cluster", "LeastAddedDelay", "PlacementPolicy", "Proposal", "Query", "make_policy"]
_EQUAL = TenantSettings()


def make_policy(settings: SchedSettings, cost: CostModel, tenants: TenantSettings = _EQUAL) -> PlacementPolicy:
    """Raises ConfigError for a name nobody implements."""
    match settings.policy:
        case "least_added_delay":
            return LeastAddedDelay(settings, tenants)
        case "e2":
            return E2(settings)
        case "d2lpm":
            return D2LPM(settings, tenants)
    policy = make_baseline(settings, cost)
    if policy is None:
        raise ConfigError(
            f"sched.placement: expected one of the policies in docs/scheduling.md, got {settings.placement!r}"
        )
    return policy
