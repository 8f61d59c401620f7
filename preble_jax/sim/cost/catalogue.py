"""Cost models by name, from the data files beside this one, and from files that `preble-jax profile` wrote."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from preble_jax.errors import ConfigError
from preble_jax.sim.cost.base import EngineShape, StepCost
from preble_jax.sim.cost.profiled import ProfiledCost
from preble_jax.sim.cost.regression import Attention, BatchRegression, LongChunk, RequestRegression, SharedContext
from preble_jax.sim.cost.roofline import Chip, Efficiency, ModelShape, Roofline

DATA = resources.files("preble_jax.sim.cost") / "data"


def find_cost(name: str) -> StepCost:
    """name: one of COSTS, or the path of a file of `preble-jax profile`. Raises ConfigError."""
    if name in COSTS:
        return COSTS[name]()
    if name.endswith(".json"):
        return ProfiledCost.read(Path(name))
    [near] = difflib.get_close_matches(name, COSTS, n=1, cutoff=0.0)
    raise ConfigError(
        f"cost: expected the path of a .json file that `preble-jax profile` wrote, or one of {', '.join(COSTS)}; "
        f"got {name!r}; the nearest is {near}"
    )


@cache
def _read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DATA / file).read_text(encoding="utf-8"))
    return content


def _regression(name: str) -> StepCost:
    data = dict(_read("regressions.json")[name])
    del data["about"]
    engine = EngineShape(**data.pop("engine"))
    if "chunk_ms" in data:
        decode = data["decode_ms"]
        return RequestRegression(
            name=name,
            engine=engine,
            chunk_ms=tuple(data["chunk_ms"]),
            decode_ms=None if decode is None else (decode["step"], decode["row"], decode["context"]),
        )
    attention = data["attention_ms"]
    if attention is not None:
        shared = SharedContext(**attention["shared"])
        data["attention_ms"] = Attention(**{**attention, "line": tuple(attention["line"]), "shared": shared})
    long_chunk = data.pop("long_chunk")
    data["long_chunk"] = LongChunk(above=long_chunk["above"], ms=tuple(long_chunk["ms"]))
    return BatchRegression(name=name, engine=engine, **data)


def _roofline(name: str) -> StepCost:
    data = _read("rooflines.json")
    group = data["groups"][name]
    return Roofline(
        name=name,
        model=ModelShape(**data["models"][group["model"]]),
        chip=Chip(**data["chips"][group["chip"]]),
        num_chips=group["num_chips"],
        efficiency=Efficiency(**data["efficiency"]),
        **data["engine"],
    )


def _profile(name: str) -> StepCost:
    with resources.as_file(DATA / f"{name}.json") as path:
        return ProfiledCost.read(path, name)


def _catalogue() -> dict[str, Callable[[], StepCost]]:
    found: dict[str, Callable[[], StepCost]] = {}
    for name in _read("regressions.json"):
        found[name] = partial(_regression, name)
    for name in _read("rooflines.json")["groups"]:
        found[name] = partial(_roofline, name)
    for file in DATA.iterdir():
        name = file.name.removesuffix(".json")
        if file.name.endswith(".json") and name not in ("regressions", "rooflines"):
            found[name] = partial(_profile, name)
    return dict(sorted(found.items()))


COSTS: Mapping[str, Callable[[], StepCost]] = _catalogue()
