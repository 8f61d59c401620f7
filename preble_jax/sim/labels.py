"""What a run is called, and what tells runs apart: whatever differs but the seed, and no more of it than is needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from preble_jax.errors import InvalidRequestError
from preble_jax.sim.scenario import Scenario, Source
from preble_jax.sim.settings import SimSettings

Row = dict[str, Any]
# Of a scenario's settings, those that have a label of their own.
_LABELLED = ("workload", "rate", "num_groups", "sched.placement", "queue.policy", "seed")
_PATHS = ("trace", "arrivals")


def labels(scenario: Scenario) -> Row:
    """Of a row of a sweep."""
    return labels_of(json.loads(json.dumps(asdict(scenario))))


def labels_of(settings: Mapping[str, Any]) -> Row:
    """settings: a scenario in JSON. Of the labels, `settings` are all the others that are not as by default. Raises
    InvalidRequestError for what is no scenario."""
    try:
        source, sim = settings["source"], settings["sim"]
        return {
            "workload": source["workload"] or Path(source["trace"]).stem,
            "rate": source["rate"],
            "groups": sim["num_groups"],
            "placement": sim["sched"]["placement"],
            "queue": sim["queue"]["policy"],
            "cost": settings["cost"],
            "seed": sim["seed"],
            "settings": _changed(_flat(source)) | _changed(_flat(sim)),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(
            f"settings: expected what `preble-jax sim --json` writes there, got something else ({error!r}); run the"
            " simulation again"
        ) from error


def distinctions(rows: Sequence[Mapping[str, Any]], known: Sequence[str]) -> list[dict[str, str]]:
    """{name: text} of each row: what tells rows apart that are alike in their labels `known`, the same names in all.

    The names are cost, slo (of the goodput), or some of `settings`; as few as do. "-" is what is as by default.
    Rows from before there were `settings` are taken to be like the others.
    """
    names: list[str] = []
    for name in ("cost", "slo", *dict.fromkeys(name for row in rows for name in row.get("settings", ()))):
        compared = rows if name == "cost" else [row for row in rows if "settings" in row]
        if _count(compared, known, [*names, name]) > _count(compared, known, names):
            names.append(name)
    columns = [[text_of(_value(row, name)) for row in rows] for name in names]
    columns = [_shortened(column) if name in _PATHS else column for name, column in zip(names, columns, strict=True)]
    return [{name: column[number] for name, column in zip(names, columns, strict=True)} for number in range(len(rows))]


def _count(rows: Sequence[Mapping[str, Any]], known: Sequence[str], names: Sequence[str]) -> int:
    """How many they are told apart into."""
    return len(
        {(*(row.get(label) for label in known), *(text_of(_value(row, name)) for name in names)) for row in rows}
    )


def _value(row: Mapping[str, Any], name: str) -> Any:
    if name == "cost":
        return row.get("cost")
    return row.get("summary", {}).get("slo") if name == "slo" else row.get("settings", {}).get(name)


def _shortened(paths: Sequence[str]) -> list[str]:
    """Without the folder that all are in."""
    different = {path for path in paths if path != "-"}
    if len(different) < 2 or len({os.path.isabs(path) for path in different}) > 1:
        return list(paths)
    folder = os.path.commonpath(different) or os.curdir
    return [path if path == "-" else os.path.relpath(path, folder) for path in paths]


def text_of(value: Any) -> str:
    """A label for people, another one for every value."""
    if value in (None, [], {}):
        return "-"
    match value:
        case float():
            return repr(value).removesuffix(".0")
        case {"kind": kind, "group": group, "at_s": at_s}:  # a fault, as --fault has it
            return f"{kind}:{group}@{text_of(at_s)}"
        case dict():
            return " ".join(f"{name}={text_of(each)}" for name, each in value.items())
        case list():
            return " ".join(map(text_of, value))
    return str(value)


def _changed(flat: Row) -> Row:
    defaults = _defaults()
    return {
        name: value
        for name, value in flat.items()
        if name not in _LABELLED and (name not in defaults or value != defaults[name])
    }


@cache
def _defaults() -> Row:
    source = {each.name: each.default for each in fields(Source) if each.default is not MISSING}
    return {**source, **_flat(json.loads(json.dumps(asdict(SimSettings()))))}


def _flat(settings: Mapping[str, Any]) -> Row:
    """{"sched": {"window_s": 60}} is {"sched.window_s": 60}."""
    flat: Row = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        else:
            flat[name] = value
    return flat
