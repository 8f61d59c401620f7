"""Builds a `Config` from a file under `configs/`, from `--config.section.key=value` arguments, and from keywords.

A config file is Python with a `get_config()` that returns an `ml_collections.ConfigDict` of sections; it names only
what differs from the defaults in `preble_jax.config`. Values are checked against the dataclasses' annotations, whatever
sections those have: an unknown key is refused with the nearest valid one, a value of the wrong type with what was
expected. Nothing here imports JAX.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from preble_jax.config import Config
from preble_jax.cost_file import read_costs
from preble_jax.errors import ConfigError, PrebleError

DEFAULT_CONFIG = "local"
OFFLINE_CONFIG = "offline"
_PREFIX = "--config."


def load_config(file: str | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Reads a deployment.

    file: path of a config file, or the name of one of the shipped ones ("local"); None takes the default deployment.
    overrides: dotted key ("kv.page_size") to value; strings are read as the key's type, as from a command line.
    Raises ConfigError: missing or broken file, unknown key, ill-typed value.
    """
    path = _find(DEFAULT_CONFIG if file is None else file)
    config = _apply(Config(), _read_file(path), f" (in {path})")
    config = _apply(config, overrides or {}, "")
    if config.sched.cost_file:
        costs = {f"sched.{name}": cost for name, cost in read_costs(Path(config.sched.cost_file)).items()}
        config = _apply(config, {**costs, **(overrides or {})}, f" (in {config.sched.cost_file})")
    return config


def parse_overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Splits `--config.a.b=v` arguments from the rest.

    Returns ({"a.b": "v"}, everything else in its order). Of a key given twice the last counts.
    Raises ConfigError when an override has no key or no value.
    """
    overrides: dict[str, str] = {}
    rest: list[str] = []
    for index, argument in enumerate(argv):
        if argument == "--":
            rest.extend(argv[index:])
            break
        if not argument.startswith(_PREFIX):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(_PREFIX).partition("=")
        if not key or not equals:
            raise ConfigError(f"{argument}: expected {_PREFIX}section.key=value, for example {_PREFIX}kv.page_size=32")
        overrides[key] = value
    return overrides, rest


def from_keywords(base: Config, only: Sequence[str] | None = None, /, **keywords: object) -> Config:
    """Applies flat setting names to their sections: `from_keywords(config, page_size=32, tensor=2, dtype="float32")`.

    only: the sections that may be set; None: all. A section's own name takes a mapping: `mesh={"tensor": 2}`.
    Raises ConfigError: unknown name, a name that two sections share, ill-typed value.
    """
    leaves = {key: leaf for key, leaf in _leaves(base).items() if only is None or key.partition(".")[0] in only}
    sections = {key.partition(".")[0] for key in leaves}
    overrides: dict[str, object] = {}
    for name, value in keywords.items():
        if name in sections:
            overrides.update(_flatten(name, value, ""))
            continue
        keys = [key for key in leaves if key.rpartition(".")[2] == name]
        if not keys:
            near = _nearest(name, [key.rpartition(".")[2] for key in leaves])
            raise ConfigError(f"{name}: no such setting; the nearest is {near}")
        if len(keys) > 1:
            raise ConfigError(
                f"{name}: expected a name of one section only, got one of {' and '.join(keys)}; use section=dict(...)"
            )
        overrides[keys[0]] = value
    return _apply(base, overrides, "")


def _find(file: str) -> Path:
    """A path as it is; a bare name is one of the files shipped in the `configs` package."""
    if file.endswith(".py") or "/" in file or "\\" in file:
        return Path(file)
    shipped = _shipped()
    if file not in shipped:
        raise ConfigError(f"config {file!r}: expected a .py file or one of {', '.join(sorted(shipped))}")
    return shipped[file]


def _shipped() -> dict[str, Path]:
    spec = importlib.util.find_spec("configs")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    return {path.stem: path for folder in folders for path in folder.glob("*.py") if path.stem != "__init__"}


def _read_file(path: Path) -> dict[str, object]:
    """Runs a config file and flattens what its get_config() returns to dotted keys."""
    if not path.is_file():
        raise ConfigError(f"{path}: expected a config file, found none; shipped ones: {', '.join(sorted(_shipped()))}")
    spec = importlib.util.spec_from_file_location(f"preble_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: expected a Python file (.py) with a get_config() function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError(
                f"{path}: expected a get_config() function that returns an ml_collections ConfigDict, found none"
            )
        tree = get_config()
    except PrebleError:
        raise
    except Exception as error:
        # The file is the user's program; whatever it raises is an error of the configuration.
        raise ConfigError(f"{path}: running it raised {type(error).__name__}: {error}") from error
    if not isinstance(tree, Mapping) and not hasattr(tree, "items"):
        raise ConfigError(f"{path}: get_config() must return an ml_collections ConfigDict, got {type(tree).__name__}")
    return {key: leaf for name, value in tree.items() for key, leaf in _flatten(name, value, f" (in {path})").items()}


def _flatten(key: str, value: object, where: str) -> dict[str, object]:
    """{"kv": {"page_size": 32}} -> {"kv.page_size": 32}; ConfigDict is no Mapping, hence the look at `items`.

    A mapping that is itself a setting's value (`tenants.weights`) is left whole.
    """
    items = getattr(value, "items", None)
    if items is not None and _is_mapping(_leaves(Config()).get(key)):
        return {key: tuple(items())}
    if items is None:
        section = getattr(Config(), key, None)
        if dataclasses.is_dataclass(section):
            raise ConfigError(f"{key}: expected a section of settings, got {value!r}{where}")
        return {key: value}
    return {leaf: v for name, inner in items() for leaf, v in _flatten(f"{key}.{name}", inner, where).items()}


def _apply(config: Config, settings: Mapping[str, object], where: str) -> Config:
    """A copy of `config` with dotted keys replaced; `where` ends the error messages."""
    leaves = _leaves(config)
    sections: dict[str, dict[str, object]] = {}
    for key, value in settings.items():
        if key not in leaves:
            raise ConfigError(f"{key}: no such setting; the nearest is {_nearest(key, list(leaves))}{where}")
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = _coerce(key, value, leaves[key], where)
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)


def _leaves(config: Config) -> dict[str, Any]:
    """Every dotted key with its annotation, read from the dataclasses."""
    return dict(_walk("", type(config)))


def _walk(prefix: str, section: type) -> Iterator[tuple[str, Any]]:
    for name, annotation in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(annotation):
            yield from _walk(f"{prefix}{name}.", typing.cast(type, annotation))
        else:
            yield f"{prefix}{name}", annotation


def _nearest(name: str, names: Sequence[str]) -> str:
    """The valid name most like `name`; of a dotted one, its last part counts as much as the whole."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(names, key=likeness)


def _coerce(key: str, value: object, annotation: Any, where: str) -> object:
    """`value` as `annotation` wants it: strings are parsed, a list becomes a tuple, an int may stand for a float."""
    try:
        return _convert(value, annotation)
    except (ValueError, OverflowError):
        raise ConfigError(f"{key}: expected {_describe(annotation)}, got {value!r}{where}") from None


def _convert(value: object, annotation: Any) -> object:
    """Raises ValueError when `value` is not, and cannot be read as, an `annotation`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return _one_of(value, arguments)
    if origin in (typing.Union, types.UnionType):
        return _any_of(value, arguments)
    if _is_mapping(annotation):
        return tuple((_convert(k, str), _convert(v, float)) for k, v in _pairs_of(value))
    if origin is tuple:
        return _tuple_of(value, arguments[0])
    if annotation is str and isinstance(value, str):
        return value
    if annotation is bool:
        return (
            value
            if isinstance(value, bool)
            else _one_of_words(value, {"true": True, "1": True, "false": False, "0": False})
        )
    if annotation in (int, float) and not isinstance(value, bool):
        return _number(value, annotation)
    if annotation is type(None) and (value is None or value == "none"):
        return None
    raise ValueError


def _number(value: object, kind: type[int] | type[float]) -> int | float:
    if isinstance(value, str) or (kind is float and isinstance(value, int)):
        value = kind(value)
    if not isinstance(value, kind) or not math.isfinite(value):
        raise ValueError
    return value


def _one_of(value: object, choices: tuple[Any, ...]) -> object:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return choice
        if isinstance(value, str) and value == str(choice):
            return choice
    raise ValueError


def _one_of_words(value: object, words: Mapping[str, bool]) -> bool:
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError
    return words[value.lower()]


def _any_of(value: object, annotations: tuple[Any, ...]) -> object:
    for annotation in sorted(annotations, key=lambda a: a is not type(None)):
        try:
            return _convert(value, annotation)
        except ValueError:
            continue
    raise ValueError


def _tuple_of(value: object, annotation: Any) -> tuple[object, ...]:
    """From a sequence, or from text: "64,256", "(64, 256)", "()"."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("(", "[")):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, TypeError):
                raise ValueError from None
        else:
            value = [part.strip() for part in text.split(",")] if text else []
    if not isinstance(value, list | tuple):
        raise ValueError
    return tuple(_convert(item, annotation) for item in value)


def _is_mapping(annotation: Any) -> bool:
    """A setting that maps names to numbers: pairs in the frozen dataclass, a mapping in a file."""
    return bool(annotation == tuple[tuple[str, float], ...])


def _pairs_of(value: object) -> Iterator[tuple[object, object]]:
    """From a mapping, from pairs, or from text: "gold:2,free:1", "{'gold': 2}", "(('gold', 2.0),)"."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith(("(", "[", "{")):
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, TypeError):
                raise ValueError from None
        else:
            value = [part.strip().rpartition(":")[::2] for part in text.split(",")] if text else []
    if isinstance(value, Mapping):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        raise ValueError
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not pair[0]:
            raise ValueError
        yield pair[0], pair[1]


def _describe(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if _is_mapping(annotation):
        return "names with numbers (name:number,name:number)"
    if origin is tuple:
        return f"a list of {_describe(arguments[0]).removeprefix('an ').removeprefix('a ')}s"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", type(None): "none"}
    return words.get(annotation, str(annotation))
