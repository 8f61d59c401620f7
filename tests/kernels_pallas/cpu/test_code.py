"""What CPU kernels are written in, and how XLA calls them: against what Python and NumPy make of the same."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("llvmlite")

from kernels_pallas.cpu import jit
from kernels_pallas.cpu.bf16 import I32S, dot_pairs, zeros
from kernels_pallas.cpu.call import call_kernel
from kernels_pallas.cpu.ir import F32, I64, Function, Module, Value
from kernels_pallas.cpu.jit import compile_function, host_features


def _integer_function(write: Callable[[Function, Value, Value], Value]) -> Callable[[int, int], int]:
    module = Module(host_features())
    f = module.function("f", [I64, I64], I64, exported=True)
    f.give(write(f, *f.args))
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(compile_function(module, "f"))


@pytest.mark.parametrize(
    ("write", "python"),
    [
        (lambda f, a, b: (a + b) * 3 - 1, lambda a, b: (a + b) * 3 - 1),
        (lambda f, a, b: 7 - a, lambda a, b: 7 - a),
        (lambda f, a, b: a // b * 100 + a % b, lambda a, b: a // b * 100 + a % b),
        (lambda f, a, b: (a << 3) | (b & 5), lambda a, b: (a << 3) | (b & 5)),
        (lambda f, a, b: a.min(b) * 10 + a.max(4), lambda a, b: min(a, b) * 10 + max(a, 4)),
        (lambda f, a, b: a.is_("<", b).then(a, b * 2), lambda a, b: a if a < b else b * 2),
        (lambda f, a, b: a.is_("!=", 5).then(1, b), lambda a, b: 1 if a != 5 else b),
    ],
)
@pytest.mark.parametrize("numbers", [(2, 9), (9, 2), (5, 5)])
def test_operators_are_pythons(write, python, numbers):
    assert _integer_function(write)(*numbers) == python(*numbers)


def test_loops_nest_skip_and_stop():
    def write(f: Function, a: Value, b: Value) -> Value:
        total = f.variable(f.int64(0))
        with f.loop(1, a, 2) as i, f.loop(0, i) as j, f.when((i + j).is_(">=", b)):
            total.set(total.get() + i * 10 + j)
        left = f.variable(total.get())
        with f.repeat() as again:
            again.stop_if(left.get().is_("<=", 1000))
            left.set(left.get() - 1000)
        return left.get()

    total = sum(i * 10 + j for i in range(1, 14, 2) for j in range(i) if i + j >= 6)
    assert total > 2000
    assert _integer_function(write)(14, 6) == (total - 1) % 1000 + 1


@pytest.mark.parametrize("damage", [lambda code: code[:100], lambda code: code[:-1] + b"?", lambda code: b""])
def test_code_is_kept_and_damaged_code_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(jit, "_folder", tmp_path / "new")
    compiled = []
    real = jit._compile
    monkeypatch.setattr(jit, "_compile", lambda text: compiled.append(text) or real(text))

    def triple(f: Function, a: Value, b: Value) -> Value:
        return a * 3 + b

    assert [_integer_function(triple)(i, 1) for i in range(3)] == [1, 4, 7]
    assert len(compiled) == 1
    (place,) = (tmp_path / "new").iterdir()
    whole = place.read_bytes()
    place.write_bytes(damage(whole))
    assert _integer_function(triple)(5, 1) == 16
    assert len(compiled) == 2 and place.read_bytes() == whole


@pytest.mark.parametrize("features", [host_features(), frozenset[str]()], ids=["this processor", "any processor"])
def test_pairs_of_bfloat16_are_multiplied_and_added(features):
    module = Module(features)
    f = module.function("f", ["ptr", "ptr", "ptr"], exported=True)
    a, b, out = f.args
    out.store(dot_pairs(f, dot_pairs(f, zeros(f), a.load(I32S), b.load(I32S)), b.load(I32S), b.load(I32S)))
    f.give()
    assert ("dpbf16ps" in module.text()) == ("avx512bf16" in features)
    rng = np.random.default_rng(0)
    a_, b_ = (rng.standard_normal(32).astype(jnp.bfloat16) for _ in range(2))
    got = np.zeros(16, np.float32)
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(compile_function(module, "f"))
    call(a_.ctypes.data, b_.ctypes.data, got.ctypes.data)
    a64, b64 = a_.astype(np.float64), b_.astype(np.float64)
    np.testing.assert_allclose(got, (a64 * b64 + b64 * b64).reshape(16, 2).sum(1), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class _CountVisits:
    """visits[i] += 1 for each item, times[0] items; the array is changed in place."""

    name = "count_visits"
    num_args, num_results = 2, 1

    def count_items(self, f: Function, buffers: list[Value]) -> Value:
        return buffers[0].load(I64)

    def write_item(self, f: Function, buffers: list[Value], item: Value) -> None:
        place = buffers[2].at(item * 4)
        place.store(place.load(F32) + 1.0)


@pytest.mark.parametrize("num_items", [0, 1, 2, 1000])
def test_each_item_is_worked_on_once(num_items):
    @jax.jit
    def visit(number: jax.Array, visits: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(visits.shape, visits.dtype)
        return call_kernel(_CountVisits(), [number, visits], [shape], aliases={1: 0})[0]

    number = jnp.array([num_items, 0], jnp.int32)  # an i64's halves

    def many(_: int) -> np.ndarray:
        visits = jnp.zeros(1000, jnp.float32)
        for _ in range(20):
            visits = visit(number, visits)
        return np.asarray(visits)

    with ThreadPoolExecutor(4) as pool:  # more calls at once than XLA has threads
        for visits in pool.map(many, range(8)):
            assert (visits[:num_items] == 20).all() and (visits[num_items:] == 0).all()
