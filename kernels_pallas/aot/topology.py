"""Compiling for a TPU on a machine that has none.

libtpu holds the whole TPU compiler, Mosaic included, and compiles for a *topology*: chips of a generation in a shape.
What it refuses there (a block that VMEM cannot hold, a layout that Mosaic does not know) it would refuse on the chip,
and the program it makes says how much VMEM each kernel takes, how much HBM the program needs and which arrays it
copies. It says nothing about a kernel's time.

    report = TpuTopology.of("v6e").compile(f, jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16))
    report.vmem_used_bytes, report.temp_bytes

Best in a process of its own: libtpu is half a gigabyte and stays loaded.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels_pallas.aot.report import CompileReport, copies_of, kernels_of

# The smallest shape that libtpu describes for each generation; a chip of TPU7x is two devices.
GENERATIONS = {"v5e": "2x2", "v6e": "2x2", "tpu7x": "2x2x1"}

# `make test` puts libtpu here, outside the environment's own packages: JAX tries to start a TPU in every process that
# can import it, which costs time and prints errors where there is none.
BESIDE_PACKAGES = Path("aot", "libtpu", "libtpu.so")

# libtpu looks for a TPU VM's metadata, complains where there are none, and logs into the temporary folder. It keeps a
# lock there too, so that no two processes share a chip; compiling takes no chip.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}


class LibtpuMissingError(RuntimeError):
    """libtpu is not installed, or does not load here."""


class TpuCompileError(RuntimeError):
    """The compiler refused the program; the message says why, without the program."""


@dataclass(frozen=True, kw_only=True)
class TpuTopology:
    """TPU devices that can be compiled for. `devices` go into a Mesh like real ones; nothing can run on them."""

    generation: str
    shape: str
    devices: tuple[Any, ...]

    @classmethod
    def of(cls, generation: str, shape: str | None = None) -> TpuTopology:
        """generation: v5e, v6e or TPU7x; shape: chips, as in "4x4" (TPU7x: "2x2x1"); default: the smallest.

        Raises ValueError for a generation or shape that libtpu does not know, LibtpuMissingError without libtpu.
        """
        name = generation.lower()
        if name not in GENERATIONS:
            raise ValueError(f"TPU generation: expected one of {', '.join(GENERATIONS)}, got {generation!r}")
        chips = GENERATIONS[name] if shape is None else shape
        with _libtpu_environment():
            try:
                devices = topologies.get_topology_desc(platform="tpu", topology_name=f"{name}:{chips}").devices
            except (jax.errors.JaxRuntimeError, OSError) as error:
                if shape is None:
                    raise LibtpuMissingError(f"{find_libtpu()} does not load: {_first_line(error)}") from error
                raise ValueError(
                    f"topology: expected chips of {name} in a shape like {GENERATIONS[name]!r}, got {chips!r} "
                    f"({_first_line(error)})"
                ) from error
        return cls(generation=name, shape=chips, devices=tuple(devices))

    def mesh(self, axes: dict[str, int]) -> Mesh:
        """The first devices as a mesh, `{"tensor": 4}` for instance. ValueError where there are too few."""
        count = math.prod(axes.values())
        if not 1 <= count <= len(self.devices):
            raise ValueError(
                f"mesh: expected up to the {len(self.devices)} devices of {self.generation}:{self.shape}, got {axes}; "
                "name a larger shape"
            )
        return Mesh(np.array(self.devices[:count]).reshape(tuple(axes.values())), tuple(axes))

    def compile(
        self,
        function: Callable[..., Any],
        *args: Any,
        mesh: Mesh | None = None,
        specs: Sequence[Any] | None = None,
        donate_argnums: tuple[int, ...] = (),
    ) -> CompileReport:
        """Compiles `function` for these devices, without running it.

        args: pytrees of jax.ShapeDtypeStruct (or arrays, of which only shape and dtype count). With a mesh (see
        `mesh`), specs has a PartitionSpec for each of args, for all its leaves; without specs, all are replicated.
        Code that asks `pltpu.get_tpu_info()` sees this generation. Raises TpuCompileError where the compiler refuses
        the program, and whatever tracing `function` raises.
        """
        specs = [PartitionSpec()] * len(args) if specs is None else list(specs)
        if len(specs) != len(args):
            raise ValueError(f"specs: expected one for each of the {len(args)} arguments, got {len(specs)}")
        if mesh is None:
            sharding: Any = SingleDeviceSharding(self.devices[0])
            abstract = AbstractMesh((), (), abstract_device=AbstractDevice(self.devices[0].device_kind, 1, "tpu"))
            placed = [_placed(arg, sharding) for arg in args]
        else:
            abstract = mesh.abstract_mesh
            placed = [_placed(arg, NamedSharding(mesh, spec)) for arg, spec in zip(args, specs, strict=True)]
        with _no_persistent_cache(), jax.sharding.use_abstract_mesh(abstract):
            info = pltpu.get_tpu_info()
            started = time.perf_counter()
            lowered = jax.jit(function, donate_argnums=donate_argnums).lower(*placed)
            lowered_at = time.perf_counter()
            try:
                compiled = lowered.compile()
            except jax.errors.JaxRuntimeError as error:
                raise TpuCompileError(f"{self.generation}:{self.shape}: {_without_program(str(error))}") from error
            done = time.perf_counter()
        memory: Any = compiled.memory_analysis()
        cost = compiled.cost_analysis() or {}
        optimal_s = cost.get("optimal_seconds", -1.0)  # an operation without a number counts -1
        program = compiled.as_text() or ""
        return CompileReport(
            generation=self.generation,
            topology=self.shape,
            num_devices=1 if mesh is None else mesh.size,
            kernels=tuple(kernels_of(program)),
            copies=tuple(copies_of(program)),
            vmem_capacity_bytes=info.vmem_capacity_bytes,
            hbm_capacity_bytes=info.hbm_capacity_bytes,
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes,
            flops=cost.get("flops"),
            optimal_s=optimal_s if optimal_s > 0 else None,
            lower_s=lowered_at - started,
            compile_s=done - lowered_at,
        )


def find_libtpu() -> Path:
    """The libtpu.so to compile with: of TPU_LIBRARY_PATH, of the environment's packages, or where `make test` put it.

    Raises LibtpuMissingError, which says what to install.
    """
    named = os.environ.get("TPU_LIBRARY_PATH")
    if named is not None:
        if not Path(named).is_file():
            raise LibtpuMissingError(
                f"TPU_LIBRARY_PATH: expected a libtpu.so, got {named!r}, which is no file; unset it"
            )
        return Path(named)
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / "libtpu.so"
    beside = Path(sys.prefix) / BESIDE_PACKAGES
    if beside.is_file():
        return beside
    raise LibtpuMissingError(
        "compiling for a TPU: expected libtpu, which is not installed; pip install 'preble-jax[aot]' (Linux, "
        "x86-64), or make libtpu in the repository"
    )


@contextmanager
def _libtpu_environment() -> Iterator[None]:
    """The variables that libtpu reads while it is loaded; taken back, since a real TPU needs its own."""
    wanted = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    wanted["TPU_LIBRARY_PATH"] = str(find_libtpu())
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Programs for a TPU that is not there must not be serialised: libtpu is known to crash."""
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # added at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # whether there is one was decided at the first compilation
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _without_program(message: str) -> str:
    """A compiler's message without the kernel it quotes, which can be megabytes of base64."""
    return re.sub(r'backend_config=\{.*?\}(?=[,.\s]|$)|"body":"[^"]*"', "...", message)[:2000]
