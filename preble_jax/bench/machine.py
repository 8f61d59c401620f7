"""What a measurement ran on, for the record. Nothing here imports JAX before `describe_machine` is called."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]
# Those of a processor's features that decide how fast matrix products are.
_FEATURES = frozenset(
    {"avx", "avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"}
    | {"amx_tile", "amx_bf16", "amx_int8", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "svebf16"}
)


def describe_machine() -> dict[str, object]:
    """JSON-able. Call it after JAX has been configured; it loads JAX and finds its devices."""
    import jax
    import jaxlib

    return {
        "cpu": processor(),
        "architecture": platform.machine(),
        "cores": num_cores(),
        "cpu_features": cpu_features(),
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "devices": sorted({device.device_kind for device in jax.devices()}),
        "num_devices": len(jax.devices()),
        "git_commit": git_commit(),
        "command": command_line(sys.argv),
    }


def processor() -> str:
    """The CPU's name."""
    name = _cpuinfo().get("model name") or _cpuinfo().get("Processor")
    return name or platform.processor() or platform.machine()


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_features() -> list[str]:
    """Empty where the system does not tell."""
    info = _cpuinfo()
    return sorted(_FEATURES.intersection((info.get("flags") or info.get("Features") or "").split()))


def git_commit(root: Path = _ROOT) -> str | None:
    """The commit this code is of, "-dirty" after it where files have changed; None outside a checkout of it.

    An installed copy is not asked: a repository above its folder would be somebody else's.
    """
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if commit and changed else commit


def command_line(argv: Sequence[str]) -> str:
    """Without the folder of the program."""
    return " ".join([Path(argv[0]).name, *argv[1:]])


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1)
    except (AttributeError, OSError, ValueError):
        return None


def _cpuinfo() -> Mapping[str, str]:
    """The first processor's entry."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
