"""Free memory as the kernel and the control groups tell it, from files made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from preble_jax.host_memory import free_host_bytes

GIB = 1 << 30


def machine(root: Path, files: dict[str, str], available_gib: int = 16) -> Path:
    kib = available_gib * GIB // 1024
    meminfo = f"MemTotal: {2 * kib} kB\nMemFree: 1 kB\nMemAvailable: {kib} kB\nHugePages_Total: 0\n"
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def group_v2(folder: str, limit: str, used: int, cache: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup{folder}"
    return {
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.current": f"{used}\n",
        f"{base}/memory.stat": f"anon 5\ninactive_file {cache}\nactive_file 7\n",
    }


def test_a_plain_machine(tmp_path: Path) -> None:
    assert free_host_bytes(machine(tmp_path, {})) == 16 * GIB


def test_nothing_tells(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None


def test_a_containers_limit_counts_and_its_file_cache_is_free(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **group_v2("", str(4 * GIB), 3 * GIB, GIB)}
    assert free_host_bytes(machine(tmp_path, files)) == 2 * GIB


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/system.slice/engine\n",
        **group_v2("/system.slice/engine", "max", GIB),
        **group_v2("/system.slice", str(6 * GIB), GIB),
    }
    assert free_host_bytes(machine(tmp_path, files)) == 5 * GIB


def test_more_used_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **group_v2("", str(GIB), 2 * GIB)}
    assert free_host_bytes(machine(tmp_path, files)) == 0


@pytest.mark.parametrize(("limit", "expected"), [(3 * GIB, 2 * GIB), (9223372036854771712, 16 * GIB)])
def test_version_1_inside_a_container(tmp_path: Path, limit: int, expected: int) -> None:
    """The process's path is the host's; the mounted tree begins at the container's own group."""
    base = "sys/fs/cgroup/memory"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{base}/memory.stat": f"cache 3\ntotal_inactive_file {GIB}\n",
    }
    assert free_host_bytes(machine(tmp_path, files)) == expected
