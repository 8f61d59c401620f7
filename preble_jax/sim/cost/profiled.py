"""What `preble-jax profile` measured, as a cost model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from preble_jax.config import EngineSettings
from preble_jax.cost_file import read_costs
from preble_jax.errors import ConfigError
from preble_jax.sched.step_costs import KeyCosts, StepCosts, StepKind
from preble_jax.sched.step_fit import PROFILED_ROWS
from preble_jax.sim.cost.base import EngineShape, StepWork

_KV_TOKENS = 65_536  # of a file that does not say


class Crowding(NamedTuple):
    """What steps cost while num_neighbours other groups of the same machine compute."""

    cost: ProfiledCost
    num_neighbours: int


class ProfiledCost:
    """A real engine's steps, by compiled shape and keys. crowding: None where nothing was measured beside others."""

    def __init__(self, *, name: str, engine: EngineShape, steps: StepCosts, crowding: Crowding | None = None) -> None:
        self.name = name
        self.engine = engine
        self.steps = steps
        self.crowding = crowding

    @classmethod
    def read(cls, path: Path, name: str = "") -> ProfiledCost:
        """A file with the schedulers' three costs alone makes a model with nothing else in it. Raises ConfigError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cost: expected a file of `preble-jax profile` at {path}, cannot read it ({error}); make one: "
                f"preble-jax profile --output {path}"
            ) from error
        if not isinstance(content, dict) or content.get("step_costs") is None:
            return cls(name=name or path.stem, engine=_default_engine(), steps=_linear(read_costs(path, "cost")))
        try:
            steps = StepCosts.from_json(content["step_costs"])
            engine = EngineShape(**{key: int(value) for key, value in content["engine"].items()})
            crowding = _crowding(content, name or path.stem, engine)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"cost: expected {path} to have the step_costs and engine that `preble-jax profile` writes, got "
                f"something else ({error!r}); measure again: preble-jax profile --output {path}"
            ) from error
        return cls(name=name or path.stem, engine=engine, steps=steps, crowding=crowding)

    def step_s(self, work: StepWork) -> float:
        num_decode, context, chunks, unique, longest, num_steps = work
        shared = 0.0
        if num_decode > 1 and 0 < unique < context:
            # As if all had one prefix in common: n sequences that share s tokens have (n - 1) s fewer than they count.
            shared = (context - unique) / (num_decode - 1)
        if num_decode and not longest:
            longest = -(-context // num_decode)
        return self.steps.seconds(StepKind(num_decode, context, longest, min(shared, longest), chunks, num_steps))


def _crowding(content: Mapping[str, Any], name: str, engine: EngineShape) -> Crowding | None:
    """Raises as StepCosts.from_json does."""
    num_neighbours = int(content.get("num_neighbours", 0))
    if num_neighbours < 1:
        return None
    steps = StepCosts.from_json(content["crowded_step_costs"])
    return Crowding(ProfiledCost(name=name, engine=engine, steps=steps), num_neighbours)


def _default_engine() -> EngineShape:
    settings = EngineSettings()
    return EngineShape(
        prefill_tokens=settings.prefill_buckets[-1],
        max_prefill_seqs=settings.max_prefill_seqs,
        max_num_seqs=settings.max_num_seqs,
        kv_tokens=_KV_TOKENS,
    )


def _linear(costs: dict[str, float]) -> StepCosts:
    """A step takes the base, and a row or a token its own; as step_fit reads the three costs."""
    engine = _default_engine()
    base_s = max(costs["prefill_base_s"], 1e-9)
    row_s = max(costs["decode_token_s"] - base_s / PROFILED_ROWS, 0.1 * costs["decode_token_s"])
    mixed_s = tuple((num, base_s + num * costs["prefill_token_s"]) for num in range(1, engine.prefill_tokens + 1))
    return StepCosts(decode_s=((engine.max_num_seqs, base_s),), mixed_s=mixed_s, keys=KeyCosts(row_s=row_s))
