"""Who may import whom. Arrows go one way, from the top of a request's road to the bottom; deciding needs no JAX.

ROOMS has one rule a folder; the longest matching prefix counts. Imports inside functions are held to it too;
those under `if TYPE_CHECKING:` are not, because nothing is loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OWN = ("preble_jax", "kernels_pallas", "serve", "configs")

# Plain data and small services that every room of preble_jax may use.
COMMON = frozenset(
    f"preble_jax.{name}"
    for name in (
        *("config", "config_files", "cost_file", "env", "errors", "host_memory", "progress", "request"),
        "sampling_params",
    )
)
ARRAYS = frozenset({"jax", "jaxlib", "numpy", "flax"})
# Sockets, threads, processes and clocks: what a machine of events has handed to it instead.
OUTSIDE_WORLD = frozenset(
    {"asyncio", "concurrent", "datetime", "http", "multiprocessing", "os", "queue", "selectors", "signal", "socket"}
    | {"socketserver", "subprocess", "threading", "time", "urllib"}
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """own: packages or modules of this repository, besides the room itself. third_party: top-level names; None: any.

    no_stdlib: modules of the standard library that are refused.
    """

    own: frozenset[str] = frozenset()
    third_party: frozenset[str] | None = frozenset()
    no_stdlib: frozenset[str] = frozenset()


ROOMS = {
    "kernels_pallas": Rule(own=frozenset({"kernels_pallas.cpu"}), third_party=ARRAYS - {"flax"}),
    "kernels_pallas.cpu": Rule(own=frozenset({"kernels_pallas"}), third_party=ARRAYS - {"flax"} | {"llvmlite"}),
    "preble_jax.model": Rule(
        own=COMMON | {"kernels_pallas"},
        third_party=ARRAYS | {"gguf", "jinja2", "orbax", "safetensors", "tokenizers", "ml_dtypes"},
    ),
    "preble_jax.kv": Rule(own=COMMON, no_stdlib=OUTSIDE_WORLD),
    "preble_jax.kv.device": Rule(own=COMMON | {"kernels_pallas"}, third_party=ARRAYS),
    "preble_jax.sched": Rule(own=COMMON | {"preble_jax.kv"}, no_stdlib=OUTSIDE_WORLD),
    "preble_jax.engine": Rule(
        own=COMMON | {"kernels_pallas", "preble_jax.model", "preble_jax.kv", "preble_jax.sched"}, third_party=ARRAYS
    ),
    "preble_jax.sim": Rule(
        own=COMMON | {"preble_jax.sched", "preble_jax.kv", "preble_jax.sim.plots"}, third_party=frozenset({"numpy"})
    ),
    "preble_jax.sim.plots": Rule(own=COMMON, third_party=frozenset({"matplotlib"})),
    # Beside the engine: what a frontend does for a client (tokens, text, salts) happens here too.
    "preble_jax.batch": Rule(
        own=COMMON | {"preble_jax.model", "preble_jax.engine", "preble_jax.kv.hashing", "serve.client"},
        third_party=frozenset({"numpy"}),
    ),
    "preble_jax.bench": Rule(
        own=COMMON | {"preble_jax.engine", "preble_jax.kv", "preble_jax.sched"}, third_party=ARRAYS
    ),
    # The common modules and the package's own public face.
    "preble_jax": Rule(own=COMMON | {"preble_jax.batch"}, third_party=frozenset({"ml_collections", "rich"})),
    "serve": Rule(
        own=frozenset({"preble_jax"}),
        third_party=frozenset({"google", "grpc", "grpc_health", "grpc_reflection", "rich"}),
    ),
    "configs": Rule(own=COMMON, third_party=frozenset({"ml_collections"})),
}

# What the scheduler and frontend processes load, and what anybody may import without waiting for JAX.
LIGHT_ROOMS = ("preble_jax.sched", "preble_jax.kv")
LIGHT_MODULES = (
    "preble_jax",
    "preble_jax.model.chat",
    "preble_jax.model.config",
    "preble_jax.model.registry",
    "preble_jax.model.text",
    "preble_jax.model.tokenizer",
    "serve",
    "serve.cli",
    "serve.client",
    "serve.frontend",
    "serve.scheduler",
)


def modules() -> Iterator[tuple[str, Path]]:
    for package in OWN:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    return max((room for room in ROOMS if inside(module, room)), key=len)


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import that runs. `from a import b` counts as both a and a.b, since b may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from imports(ast.Module(body=[child], type_ignores=[]))
        elif isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        else:
            yield from imports(node)


def refused(module: str, imported: str) -> bool:
    room = room_of(module)
    rule = ROOMS[room]
    top = imported.partition(".")[0]
    if top in OWN:
        if inside(imported, room) and room_of(imported) == room:
            return False
        return not any(inside(imported, allowed) for allowed in rule.own)
    if top in sys.stdlib_module_names:
        return top in rule.no_stdlib
    return rule.third_party is not None and top not in rule.third_party


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}"
        for module, path in modules()
        if room_of(module) == room
        for imported, line in imports(ast.parse(path.read_text(encoding="utf-8")))
        if refused(module, imported)
    ]
    assert not wrong, "\n".join(["arrows that go the wrong way:", *wrong])


def test_the_rules_can_refuse() -> None:
    assert refused("preble_jax.sched.forest", "jax.numpy")
    assert refused("preble_jax.sched.forest", "time.monotonic")
    assert refused("preble_jax.sched.forest", "preble_jax.engine.service")
    assert refused("preble_jax.kv.radix", "preble_jax.kv.device")
    assert refused("preble_jax.model.decoder", "preble_jax.kv.pool")
    assert refused("kernels_pallas.api", "preble_jax.errors")
    assert refused("preble_jax.engine.loop", "serve.worker")
    assert refused("configs.local", "jax")
    assert not refused("preble_jax.sched.forest", "preble_jax.kv.events")
    assert not refused("preble_jax.kv.device", "kernels_pallas")
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\ndef f():\n    import grpc.aio\n"
    assert [name for name, _ in imports(ast.parse(source))] == ["typing.TYPE_CHECKING", "grpc.aio"]


def test_randomness_in_decisions_is_seeded() -> None:
    """sched may use random.Random(seed), never the generator that the whole process shares."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: random.{node.attr}"
        for module, path in modules()
        if inside(module, "preble_jax.sched")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]
    assert not wrong, "\n".join(wrong)


def test_deciding_and_routing_load_no_jax() -> None:
    """In a fresh interpreter, because this one has long loaded JAX."""
    light = [
        module
        for module, _ in modules()
        if module in LIGHT_MODULES
        or (any(inside(module, room) for room in LIGHT_ROOMS) and module != "preble_jax.kv.device")
    ]
    program = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = sorted({"jax", "jaxlib", "flax", "orbax"} & sys.modules.keys())
    if heavy:
        sys.exit(f"importing {name} loaded {', '.join(heavy)}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *light], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert light
