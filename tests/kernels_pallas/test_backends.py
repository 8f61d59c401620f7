"""Which backend serves which device, and what is said about it, once."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import pytest

from kernels_pallas import BACKENDS, backends, resolve_backend
from kernels_pallas.cpu import usable


@dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    compute_capability: str = ""


HOPPER = Device("gpu", "NVIDIA H200", "9.0")
BLACKWELL = Device("gpu", "NVIDIA B200", "10.0")


@pytest.fixture(autouse=True)
def nothing_known_yet():
    for known in (backends._log_once, usable.runnable):
        known.cache_clear()
    yield
    for known in (backends._log_once, usable.runnable):
        known.cache_clear()


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("cpu", "cpu"),
        (Device("cpu", "cpu"), "cpu"),
        (Device("tpu", "TPU v6 lite"), "tpu"),
        (HOPPER, "gpu"),
        (BLACKWELL, "jnp"),
        (Device("gpu", "NVIDIA A100", "8.0"), "jnp"),
        ("gpu", "jnp"),
    ],
)
def test_auto(device, chosen, monkeypatch):
    for answer in ("runnable", "has_wide_registers"):
        monkeypatch.setattr(backends, answer, lambda: True)
    assert resolve_backend("auto", device) == chosen
    assert resolve_backend("jnp", device) == "jnp"


def test_the_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(3):
        resolve_backend("auto", BLACKWELL)
    warning, info = caplog.records
    assert warning.levelno == logging.WARNING and info.levelno == logging.INFO
    assert "for Hopper (compute capability 9.0), and gpu (NVIDIA B200) has 10.0" in warning.message
    assert info.message == "attention backend: jnp on gpu (NVIDIA B200)"


def test_a_cpu_without_a_compiler_has_jnp(monkeypatch):
    monkeypatch.setattr(usable, "_obstacle", lambda: "no compiler")
    assert resolve_backend("auto", "cpu") == "jnp"
    with pytest.raises(ValueError, match="'cpu' cannot run here"):
        resolve_backend("cpu", "cpu")


def test_a_compiler_that_cannot_be_imported_is_an_obstacle(monkeypatch):
    def broken():
        raise ImportError("libLLVM.so: no such file")

    monkeypatch.setattr(usable.jit, "host_features", broken)
    assert resolve_backend("auto", "cpu") == "jnp"


def test_a_cpu_with_narrow_registers_has_jnp_unless_told(monkeypatch):
    monkeypatch.setattr(backends, "has_wide_registers", lambda: False)
    assert resolve_backend("auto", "cpu") == "jnp"
    assert resolve_backend("cpu", "cpu") == "cpu"


def test_names_that_cannot_be_served():
    with pytest.raises(
        ValueError, match="expected auto or one of jnp, cpu, tpu, gpu, tpu-interpret, gpu-interpret, got 'cuda'"
    ):
        resolve_backend("cuda", "cpu")
    with pytest.raises(
        ValueError, match=r"'tpu' cannot run on gpu \(NVIDIA H200\); expected auto, jnp, or tpu-interpret"
    ):
        resolve_backend("tpu", HOPPER)
    with pytest.raises(ValueError, match=r"'gpu' is for Hopper .* has 10.0; expected auto or jnp"):
        resolve_backend("gpu", BLACKWELL)
    with pytest.raises(ValueError, match="'gpu' cannot run on cpu"):
        resolve_backend("gpu", "cpu")
    with pytest.raises(ValueError, match=r"'cpu' cannot run on gpu \(NVIDIA H200\); expected auto or jnp"):
        resolve_backend("cpu", HOPPER)
    assert resolve_backend("tpu-interpret", "cpu") == "tpu-interpret"
    with pytest.raises(ValueError, match="expected one of jnp"):
        backends.load("auto")


def test_every_name_can_be_loaded_or_names_what_is_missing():
    for name in BACKENDS:
        backend = backends.load(name)
        assert all(callable(getattr(backend, f)) for f in ("make_schedule", "attend", "write_kv", "check"))
