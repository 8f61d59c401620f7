"""How much memory this machine, or the container this process is in, has left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # control groups of version 1 say "no limit" with a number near 2^63


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping: the least of what the kernel calls available and what every control
    group above this process has left. Page cache that can be dropped counts as free. None where nothing tells (no
    /proc).

    root: where /proc and /sys are.
    """
    available = _meminfo(root / "proc/meminfo")
    rooms = [room for room in _control_group_rooms(root) if room is not None]
    if available is not None:
        rooms.append(available)
    return max(0, min(rooms)) if rooms else None


def _meminfo(file: Path) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    value = fields.get("MemAvailable", "").split()
    return int(value[0]) * 1024 if value and value[0].isdigit() else None


def _control_group_rooms(root: Path) -> Iterator[int | None]:
    """A room for each group from this process's own up to the top; inside a container the top is the container's."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = mount / path.lstrip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):  # a path of the host's is not there inside a container: its parents are
                yield _room(folder, *names)


def _room(folder: Path, limit_file: str, usage_file: str, cache_field: str) -> int | None:
    limit, usage = _number(folder / limit_file), _number(folder / usage_file)
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    return limit - usage + _field(folder / "memory.stat", cache_field)


def _number(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None  # "max" is no limit


def _field(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(value) for key, _, value in (line.partition(" ") for line in lines) if key == name), 0)
