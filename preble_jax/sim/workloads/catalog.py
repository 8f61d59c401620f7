"""All workloads by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from preble_jax.sim.workloads import clients, patterns, preble
from preble_jax.sim.workloads.shape import Recipe

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {recipe.name: recipe for recipe in (*preble.RECIPES, *patterns.RECIPES, *clients.RECIPES)}
)
