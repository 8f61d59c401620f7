"""Machine code from a module: compiled for this processor by LLVM, kept for as long as the process lives."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from kernels_pallas.cpu.ir import Module


@cache
def _llvm() -> Any:
    """Imported when it is first needed: where it is missing, everything but these kernels goes on."""
    return import_module("llvmlite.binding")


@cache
def _target() -> Any:
    llvm = _llvm()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )


@cache
def host_features() -> frozenset[str]:
    return frozenset(name for name, has in _llvm().get_host_cpu_features().items() if has)


_loaded: list[Any] = []  # engines own their code


def compile_function(module: Module, name: str) -> int:
    """The address of an exported function."""
    llvm = _llvm()
    parsed = llvm.parse_assembly(module.text())
    parsed.verify()
    passes = llvm.create_pass_builder(_target(), llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, _target())
    engine.finalize_object()
    _loaded.append(engine)
    address: int = engine.get_function_address(name)
    return address
