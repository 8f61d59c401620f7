"""A child process whose output goes to a log file, and which does not outlive its parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from preble_jax.env import child_environment

STOP_TIMEOUT_S = 8.0
_TAIL_LINES = 20
_CODE_ROOT = str(Path(__file__).resolve().parent.parent)


class Child:
    """One process of a deployment: `python -m serve.cli COMMAND ...`, started at once.

    name: what its lines are prefixed with. log_path: where they go.
    on_line: called with every line, from a thread.
    """

    def __init__(self, name: str, arguments: Sequence[str], log_path: Path, on_line: Callable[[str], None]) -> None:
        self.name = name
        self.log_path = log_path
        self._on_line = on_line
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", *arguments, "--exit-with-parent"],
            stdin=subprocess.PIPE,  # never written to: the child watches for its end
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=child_environment({"PYTHONPATH": _CODE_ROOT, "PYTHONUNBUFFERED": "1"}),
            start_new_session=True,  # Ctrl-C is for the launcher, which stops its children in its own way
        )
        self._pump = threading.Thread(target=self._forward, name=f"log-{name}", daemon=True)
        self._pump.start()

    def _forward(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines, self.log_path.open("w", encoding="utf-8") as log:
            for line in lines:
                line = line.rstrip("\n")
                print(f"[{self.name}] {line}", file=log, flush=True)
                self._tail.append(line)
                self._on_line(f"[{self.name}] {line}")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def fate(self) -> str:
        """How a child that is not running ended, in words."""
        code = self.process.wait()
        self._pump.join(1.0)
        if code == -signal.SIGKILL:  # it had no time for last words
            return f"{self.name} was killed by SIGKILL"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        lines = list(self._tail)
        last_words = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        return ": ".join([f"{self.name} {how}", *last_words[-1:]])

    def terminate(self) -> None:
        """Asks it to stop; `stop` makes sure."""
        if self.running:
            self.process.terminate()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Returns when it has ended, by force if it must be. Safe to call twice."""
        self.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._pump.join(1.0)
