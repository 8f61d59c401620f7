"""The one place that reads environment variables.

PREBLE_HOME         folder for everything that is fetched once and kept (models, compiled programs);
                    default: `preble-jax` in the platform's cache folder
PREBLE_ATTENTION    attention backend, before `engine.attention` of the configuration
PREBLE_CPU_KERNELS  "auto" or "off", before `engine.cpu_kernels` of the configuration
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from preble_jax.errors import ConfigError


def cache_dir() -> Path:
    """Folder for what is fetched once and kept; it need not exist yet."""
    home = os.environ.get("PREBLE_HOME")
    if home:
        return Path(home).expanduser().absolute()
    return _platform_cache_dir() / "preble-jax"


def attention_backend(configured: str) -> str:
    """The attention backend's name, or "auto": what the environment says, or else the configuration."""
    return os.environ.get("PREBLE_ATTENTION") or configured


def cpu_kernels(configured: str) -> bool:
    """Whether the CPU's own kernels may be used: what the environment says, or else the configuration ("auto" or
    "off"). Raises ConfigError for anything else in the environment."""
    setting = os.environ.get("PREBLE_CPU_KERNELS") or configured
    if setting not in ("auto", "off"):
        raise ConfigError(f"PREBLE_CPU_KERNELS: expected auto or off, got {setting!r}")
    return setting == "auto"


def child_environment(overrides: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with some variables set, for a process about to be started."""
    return {**os.environ, **overrides}


def _platform_cache_dir() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) if local else Path.home() / "AppData" / "Local"
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg and Path(xdg).is_absolute():  # the XDG specification: a relative path is to be ignored
        return Path(xdg)
    return Path.home() / ".cache"
