"""Child processes: their logs, their fates, and that they do not outlive the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from serve.children import Child

ROOT = Path(__file__).resolve().parents[2]
SCHEDULER = ("scheduler", "--port", "0")


def wait_for(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.02)


def test_a_child_that_fails_tells_why(tmp_path: Path) -> None:
    lines: list[str] = []
    child = Child("sched", (*SCHEDULER, "--config.sched.windows_s=1"), tmp_path / "log", lines.append)
    wait_for(lambda: not child.running)
    assert "sched exited with status 2: sched.windows_s" in child.fate()
    assert "sched.window_s" in child.fate()
    assert (tmp_path / "log").read_text().splitlines() == lines
    assert all(line.startswith("[sched] ") for line in lines)
    child.stop()


def test_a_child_stops_when_asked_and_may_be_killed(tmp_path: Path) -> None:
    for stop in (Child.stop, lambda child: child.process.kill()):
        address = tmp_path / "address"
        child = Child("sched", (*SCHEDULER, "--address-file", str(address)), tmp_path / "log", lambda line: None)
        wait_for(address.exists)
        assert child.running
        stop(child)
        child.stop()
        assert not child.running
        address.unlink()
    assert "was killed by SIGKILL" in child.fate()


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 leaves the parent no time to stop anybody."""
    program = f"""
import time
from pathlib import Path
from serve.children import Child
folder = Path({str(tmp_path)!r})
child = Child("sched", ("scheduler", "--port", "0", "--address-file", str(folder / "address")), folder / "log", print)
(folder / "pid").write_text(str(child.process.pid))
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "address").exists)
        pid = int((tmp_path / "pid").read_text())
        assert is_alive(pid)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not is_alive(pid))
    finally:
        parent.kill()
        parent.wait()


def is_alive(pid: int) -> bool:
    """A zombie that nobody waits for is dead enough."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
