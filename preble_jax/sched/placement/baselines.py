"""The policies that are there for comparison, by the name they have in `sched.placement`."""

from __future__ import annotations

from preble_jax.config import SchedSettings
from preble_jax.sched.cost import CostModel
from preble_jax.sched.placement.base import PlacementPolicy
from preble_jax.sched.placement.cache_aware import CacheAware
from preble_jax.sched.placement.cacheroute import CacheRoute
from preble_jax.sched.placement.consistent_hashing import ConsistentHashing
from preble_jax.sched.placement.dynamo_cost import DynamoCost
from preble_jax.sched.placement.least_loaded import LeastLoaded
from preble_jax.sched.placement.lmetric import LMetric
from preble_jax.sched.placement.preble_released import PrebleReleased
from preble_jax.sched.placement.round_robin import RoundRobin


def make_baseline(settings: SchedSettings, cost: CostModel) -> PlacementPolicy | None:
    """None when the settings name a policy that is not one of these."""
    match settings.placement:
        case "round_robin":
            return RoundRobin()
        case "least_loaded":
            return LeastLoaded()
        case "consistent_hashing":
            return ConsistentHashing(
                epsilon=settings.hash_epsilon, num_blocks=settings.hash_blocks, num_points=settings.hash_points
            )
        case "cache_aware":
            return CacheAware(
                threshold=settings.cache_aware_threshold,
                balance_abs=settings.cache_aware_balance_abs,
                balance_rel=settings.cache_aware_balance_rel,
            )
        case "dynamo_cost":
            return DynamoCost(
                credit=settings.dynamo_overlap_credit,
                prefill_scale=settings.dynamo_prefill_scale,
                temperature=settings.dynamo_temperature,
                seed=settings.seed,
            )
        case "lmetric":
            return LMetric()
        case "cacheroute":
            return CacheRoute(
                interval_s=settings.cacheroute_interval_s,
                num_blocks=settings.cacheroute_key_blocks,
                q_cap=settings.cacheroute_q_cap,
                num_slots=settings.cacheroute_warm_slots,
                seed=settings.seed,
            )
        case "preble_released":
            return PrebleReleased(
                cost,
                window_s=settings.window_s,
                high_load=settings.released_high_load,
                min_requests=settings.released_min_requests,
            )
    return None
