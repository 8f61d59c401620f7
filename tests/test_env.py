"""Where things are kept, by platform and environment."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from preble_jax import env
from preble_jax.errors import ConfigError

NAMES = ("PREBLE_HOME", "XDG_CACHE_HOME", "LOCALAPPDATA")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {}, "~/.cache/preble-jax"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/preble-jax"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "~/.cache/preble-jax"),
        ("darwin", {"XDG_CACHE_HOME": "/x"}, "~/Library/Caches/preble-jax"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/preble-jax"),
        ("win32", {}, "~/AppData/Local/preble-jax"),
        ("linux", {"PREBLE_HOME": "/here", "XDG_CACHE_HOME": "/x"}, "/here"),
        ("win32", {"PREBLE_HOME": "~/there"}, "~/there"),
        ("linux", {"PREBLE_HOME": ""}, "~/.cache/preble-jax"),
    ],
)
def test_cache_folder(platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert env.cache_dir() == Path(expected).expanduser()


def test_child_environment_adds_and_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREBLE_TEST_A", "1")
    child = env.child_environment({"PREBLE_TEST_A": "2", "PREBLE_TEST_B": "3"})
    assert (child["PREBLE_TEST_A"], child["PREBLE_TEST_B"]) == ("2", "3")
    assert "PATH" in child


def test_the_attention_backend_of_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREBLE_ATTENTION", raising=False)
    assert env.attention_backend("auto") == "auto"
    monkeypatch.setenv("PREBLE_ATTENTION", "jnp")
    assert env.attention_backend("auto") == "jnp"
    monkeypatch.setenv("PREBLE_ATTENTION", "")
    assert env.attention_backend("tpu") == "tpu"


def test_cpu_kernels_of_the_environment_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREBLE_CPU_KERNELS", raising=False)
    assert env.cpu_kernels("auto") and not env.cpu_kernels("off")
    monkeypatch.setenv("PREBLE_CPU_KERNELS", "off")
    assert not env.cpu_kernels("auto")
    monkeypatch.setenv("PREBLE_CPU_KERNELS", "of")
    with pytest.raises(ConfigError, match="PREBLE_CPU_KERNELS: expected auto or off, got 'of'"):
        env.cpu_kernels("auto")
