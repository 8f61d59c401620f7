"""XLA's calling convention for functions from outside, and work items spread over its threads.

The layout of the structures is that of xla/ffi/api/c_api.h, which jaxlib ships.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from pathlib import Path

import jax

from kernels_pallas.cpu.ir import I32, I64, PTR, VOID, Function, Module, Value

_METADATA, _EXECUTE = 1, 3  # XLA_FFI_Extension_Metadata, XLA_FFI_ExecutionStage_EXECUTE
# Byte offsets.
_FRAME_EXTENSION, _FRAME_API, _FRAME_CONTEXT, _FRAME_STAGE, _FRAME_ARGS, _FRAME_RESULTS = 8, 16, 24, 32, 40, 80
_LOOKS_BEFORE_YIELDING = 4096  # some tens of microseconds
_LIST_ITEMS, _BUFFER_DATA = 32, 24
_EXTENSION_TYPE, _EXTENSION_METADATA = 8, 24
_METADATA_MAJOR, _METADATA_MINOR = 24, 28
_API_SCHEDULE, _API_NUM_THREADS = 48 + 11 * 8, 48 + 12 * 8
# A job: next item, items done, who still holds it, number of items, pointers to the buffers.
_NEXT, _DONE, _HOLDERS, _NUM_ITEMS, _BUFFERS = 0, 8, 16, 24, 64

Buffers = list[Value]
Body = Callable[[Function, Buffers, Value], None]
Count = Callable[[Function, Buffers], Value]


def api_version() -> tuple[int, int]:
    """Of jaxlib's FFI."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    numbers = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", header))
    return int(numbers["MAJOR"]), int(numbers["MINOR"])


def write_handler(module: Module, name: str, num_args: int, num_results: int, body: Body, count: Count) -> None:
    """Exports a function that XLA can call: `body` for each of `count` items, on as many threads as XLA has.

    body(f, buffers, item): writes the work of one item; buffers: pointers to the arguments, then to the results.
    """
    num_buffers = num_args + num_results
    item = module.function(f"{name}.item", [PTR, I64])
    body(item, _buffers(item.args[0], num_buffers), item.args[1])
    item.give()
    _write_job(module, name)
    handler = module.function(name, [PTR], PTR, exported=True)
    frame = handler.args[0]
    _answer_metadata(handler, frame)
    with handler.when(frame.at(_FRAME_STAGE).load(I32).is_("!=", _EXECUTE)):
        handler.give(handler.null())
    module.declare("malloc", PTR, [I64])
    module.declare("free", VOID, [PTR])
    job = handler.call("malloc", PTR, handler.int64(_BUFFERS + 8 * num_buffers))
    for which, first, number in ((_FRAME_ARGS, 0, num_args), (_FRAME_RESULTS, num_args, num_results)):
        items = frame.at(which + _LIST_ITEMS).load(PTR)
        for i in range(number):
            data = items.at(8 * i).load(PTR).at(_BUFFER_DATA).load(PTR)
            job.at(_BUFFERS + 8 * (first + i)).store(data)
    num_items = count(handler, _buffers(job, num_buffers))
    _run_on_threads(handler, frame, job, num_items, name)
    handler.give(handler.null())


def register(name: str, address: int) -> None:
    """Makes the function at `address` callable as `jax.ffi.ffi_call(name, ...)` on the CPU."""
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(name, new_capsule(address, None, None), platform="cpu")


def _buffers(job: Value, number: int) -> Buffers:
    return [job.at(_BUFFERS + 8 * i).load(PTR) for i in range(number)]


def _answer_metadata(f: Function, frame: Value) -> None:
    """XLA asks a function for its version before it calls it."""
    extension = frame.at(_FRAME_EXTENSION).load(PTR)
    with f.when(extension.is_("!=", f.null())), f.when(extension.at(_EXTENSION_TYPE).load(I32).is_("==", _METADATA)):
        metadata = extension.at(_EXTENSION_METADATA).load(PTR)
        major, minor = api_version()
        metadata.at(_METADATA_MAJOR).store(f.constant(major, I32))
        metadata.at(_METADATA_MINOR).store(f.constant(minor, I32))
        f.give(f.null())


def _write_job(module: Module, name: str) -> None:
    """run: takes items until none is left. release: the last holder frees the job. task: both, on another thread."""
    run = module.function(f"{name}.run", [PTR])
    (job,) = run.args
    num_items = job.at(_NUM_ITEMS).load(I64)
    with run.repeat() as again:
        item = run.atomic_add(job.at(_NEXT), 1)
        again.stop_if(item.is_(">=", num_items))
        run.call(f"{name}.item", VOID, job, item)
        run.atomic_add(job.at(_DONE), 1)
    run.give()
    release = module.function(f"{name}.release", [PTR])
    (job,) = release.args
    with release.when(release.atomic_add(job.at(_HOLDERS), -1).is_("==", 1)):
        release.call("free", VOID, job)
    release.give()
    task = module.function(f"{name}.task", [PTR])
    task.call(f"{name}.run", VOID, task.args[0])
    task.call(f"{name}.release", VOID, task.args[0])
    task.give()


def _run_on_threads(f: Function, frame: Value, job: Value, num_items: Value, name: str) -> None:
    """The calling thread takes items like the others, and waits only for items that another has begun: a pool whose
    threads are all busy delays nothing, and a task that starts late finds no item and touches no buffer."""
    api, context = frame.at(_FRAME_API).load(PTR), frame.at(_FRAME_CONTEXT).load(PTR)
    request = f.stack("[5 x i64]")
    num_threads = f.variable(f.int64(1))
    for offset, value in ((0, f.int64(32)), (8, f.null()), (16, context), (24, num_threads.slot)):
        request.at(offset).store(value)
    f.call(api.at(_API_NUM_THREADS).load(PTR), PTR, request)
    threads = num_threads.get().min(num_items).max(1)
    for offset, number in ((_NEXT, f.int64(0)), (_DONE, f.int64(0)), (_HOLDERS, threads), (_NUM_ITEMS, num_items)):
        job.at(offset).store(number)
    task = Value(f, f"@{name}.task", PTR)
    for offset, value in ((0, f.int64(40)), (8, f.null()), (16, context), (24, task), (32, job)):
        request.at(offset).store(value)
    with f.loop(1, threads):
        f.call(api.at(_API_SCHEDULE).load(PTR), PTR, request)
    f.call(f"{name}.run", VOID, job)
    looks = f.variable(f.int64(0))
    with f.repeat() as again:
        done = f.emit(f"load atomic i64, ptr {job.at(_DONE).text} acquire, align 8", I64)
        again.stop_if(done.is_(">=", num_items))
        f.pause()
        looks.set(looks.get() + 1)
        if os.name == "posix":  # where there are fewer cores than threads, the one that is waited for may want this one
            f.module.declare("sched_yield", I32, [])
            with f.when((looks.get() % _LOOKS_BEFORE_YIELDING).is_("==", 0)):
                f.call("sched_yield", I32)
    f.call(f"{name}.release", VOID, job)
