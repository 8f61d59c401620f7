"""What is written down about the machine."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from preble_jax.bench.machine import command_line, describe_machine, git_commit, processor


def test_everything_is_there_and_is_json() -> None:
    machine = json.loads(json.dumps(describe_machine()))
    assert {"cpu", "cores", "cpu_features", "memory_gib", "jax", "jaxlib", "devices", "git_commit", "command"} <= set(
        machine
    )
    assert machine["cores"] >= 1
    assert machine["cpu"] == processor() != ""
    assert machine["devices"] == ["cpu"]


def test_the_commit_is_of_the_checkout_itself(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        own = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *own, *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert git_commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    (tmp_path / "inside").mkdir()
    assert git_commit(tmp_path / "inside") is None, "an installed copy below somebody's repository"


def test_the_command_has_no_folder() -> None:
    assert command_line(["/home/me/.venv/bin/preble-jax", "bench", "engine"]) == "preble-jax bench engine"
