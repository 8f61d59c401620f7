"""Machine code from a module: compiled by LLVM for this processor, kept in memory and, once told where, on disk."""

from __future__ import annotations

import hashlib
import os
import threading
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

from kernels_pallas.cpu.ir import Module

_DIGEST_BYTES = 32

_lock = threading.Lock()  # LLVM's objects here are nobody's to share
_engines: list[Any] = []  # they own their code
_folder: Path | None = None


def keep_code_in(folder: Path) -> None:
    """From now on compiled code is looked for, and kept, in this folder, which need not exist."""
    global _folder
    _folder = folder


@cache
def _llvm() -> Any:
    """Imported when it is first needed: where it is missing, everything but these kernels goes on."""
    llvm = import_module("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # Kernels are written in the order that their registers last for; LLVM would move loads ahead and run out of them.
    llvm.set_option("", "-enable-misched=false")
    return llvm


@cache
def host_features() -> frozenset[str]:
    """What this processor can do, by LLVM's names. Raises ImportError without llvmlite."""
    return frozenset(name for name, has in _llvm().get_host_cpu_features().items() if has)


def compile_function(module: Module, name: str) -> int:
    """The address of an exported function."""
    text, llvm = module.text(), _llvm()
    with _lock:
        code = _read(text) or _write(text, _compile(text))
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        _engines.append(engine)
        address: int = engine.get_function_address(name)
    return address


def _target() -> Any:
    """A new one each time: an execution engine takes what it is given."""
    llvm = _llvm()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
    )


def _compile(text: str) -> bytes:
    llvm, target = _llvm(), _target()
    parsed = llvm.parse_assembly(text)
    parsed.triple = target.triple
    parsed.data_layout = str(target.target_data)
    parsed.verify()
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    code: bytes = target.emit_object(parsed)
    return code


def _place(text: str) -> Path | None:
    if _folder is None:
        return None
    llvm = _llvm()
    machine = (llvm.llvm_version_info, llvm.get_process_triple(), llvm.get_host_cpu_name(), sorted(host_features()))
    return _folder / f"{hashlib.sha256(f'{machine} {text}'.encode()).hexdigest()[:32]}.o"


def _read(text: str) -> bytes | None:
    """None for what is not there, and for what is damaged: it is compiled again."""
    place = _place(text)
    try:
        kept = place.read_bytes() if place is not None else b""
    except OSError:
        return None
    digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() and code else None


def _write(text: str, code: bytes) -> bytes:
    """A folder that cannot be written to costs the next start a second, not this one its life."""
    place = _place(text)
    if place is None:
        return code
    temporary = place.with_suffix(f".{uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(temporary, place)  # whoever reads meanwhile finds all of it or nothing
    except OSError:
        temporary.unlink(missing_ok=True)
    return code
