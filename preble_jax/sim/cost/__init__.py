"""What a step costs: models of devices as data, found by name."""

from preble_jax.sim.cost.base import EngineShape, StepCost, StepWork
from preble_jax.sim.cost.catalogue import COSTS, find_cost
from preble_jax.sim.cost.scheduling import scheduler_costs

__all__ = ["COSTS", "EngineShape", "StepCost", "StepWork", "find_cost", "scheduler_costs"]
