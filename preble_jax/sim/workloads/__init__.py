"""Workloads by name: who sends what, how much of it is shared, and when."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from preble_jax.errors import ConfigError
from preble_jax.sim.request import Workload
from preble_jax.sim.workloads.arrivals import Arrivals, Given, Renewal
from preble_jax.sim.workloads.build import build
from preble_jax.sim.workloads.catalog import RECIPES
from preble_jax.sim.workloads.sharing import shared_ratio

__all__ = ["WORKLOADS", "Arrivals", "Given", "Renewal", "make_workload", "require_workload", "shared_ratio"]

WORKLOADS: Mapping[str, str] = MappingProxyType({name: recipe.models for name, recipe in RECIPES.items()})


def require_workload(name: str) -> None:
    """Raises ConfigError where there is none of that name."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0.0)
        raise ConfigError(f"workload: expected one of {', '.join(RECIPES)}; got {name!r}; the nearest is {close[0]!r}")


def make_workload(
    name: str,
    *,
    rate: float,
    num_requests: int | None,
    duration_s: float | None,
    num_groups: int,
    seed: int,
    arrivals: Arrivals | None = None,
) -> Workload:
    """Requests of the workload `name`, equal for equal arguments.

    rate: requests a second of the whole cluster, in the long run. num_requests, duration_s: where it ends, whichever
    comes first; with neither, after the original run's duration. num_groups: there are prefixes in proportion to it.
    arrivals: instead of the workload's own, for all clients together (`Given`: times that were measured).
    Raises ConfigError for an unknown name and for arguments out of range.
    """
    require_workload(name)
    recipe = RECIPES[name]
    for key, value in (("rate", rate), ("duration_s", 1.0 if duration_s is None else duration_s)):
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f"workload {name}: expected {key} above 0, got {value}; give a positive number")
    for key, count in (("num_requests", 1 if num_requests is None else num_requests), ("num_groups", num_groups)):
        if count < 1:
            raise ConfigError(f"workload {name}: expected {key} of at least 1, got {count}; give a positive number")
    if seed < 0:
        raise ConfigError(f"workload {name}: expected a seed of at least 0, got {seed}; give a number from 0 up")
    if arrivals is not None:
        recipe = replace(recipe, together=arrivals)
    return build(recipe, rate=rate, num_requests=num_requests, duration_s=duration_s, num_groups=num_groups, seed=seed)
