"""The command line: one clear line and exit status 2 for what the user can mend."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from serve.cli import main

ROOT = Path(__file__).resolve().parents[2]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_typo_in_a_setting_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--config.kv.page_sise=32"]) == 2
    assert "kv.page_size" in error_line(capsys)


def test_an_ill_typed_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--config.serve.groups=two"]) == 2
    assert "an integer" in error_line(capsys)


def test_a_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--config", "nowhere.py"]) == 2
    assert "nowhere.py" in error_line(capsys)


def test_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "smollm3"]) == 2
    assert "smollm2-135m-instruct" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--json", "."], "--json: expected a file, got the folder ."),
        (["profile", "--output", "."], "--output: expected a file, got the folder ."),
        (["profile", "--output", "nowhere/costs.json"], "--output: expected a file in a folder that exists"),
        (["profile", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
    ],
)
def test_what_would_be_lost_is_refused_before_anything_is_measured(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--config.model.name=nowhere/none"]) == 2
    assert words in error_line(capsys)


@pytest.mark.parametrize("setting", ["frontend_port", "scheduler_port", "worker_port"])
def test_a_port_that_is_taken_is_found_before_anything_starts(
    setting: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        others = {"frontend_port", "scheduler_port", "worker_port"} - {setting}
        settings = [f"--config.serve.{other}=0" for other in others]
        assert main(["serve", "--run-dir", str(tmp_path / "run"), f"--config.serve.{setting}={port}", *settings]) == 2
    assert f"serve.{setting}" in error_line(capsys)
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["serve", "--config.serve.groups=0"]) == 2
    assert "serve.groups: expected >= 1, got 0" in error_line(capsys)
    assert main(["serve", "--config.serve.host=no.such.host.invalid"]) == 2
    assert "serve.host: expected" in error_line(capsys)
    assert main(["scheduler", "--port", "99999"]) == 2
    assert "99999" in error_line(capsys)
    assert main(["worker", "--scheduler", "127.0.0.1:1", "--cores", "4096"]) == 2
    assert "--cores: expected some of" in error_line(capsys)
    assert main(["demo", "--json", str(tmp_path / "nowhere" / "summary.json")]) == 2
    assert "--json" in error_line(capsys)


def test_more_neighbours_than_the_deployment_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--neighbours", "2"]) == 2
    assert "--neighbours: expected at most" in error_line(capsys)


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_chat_with_nobody_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    assert main(["chat", "--address", "127.0.0.1:1"]) == 2
    assert "preble-jax serve" in error_line(capsys)


def test_scheduler_and_frontend_processes_never_load_jax() -> None:
    """Not only when imported: after they have started, served and stopped."""
    program = """
import asyncio, sys
from fakes.deployment import CONFIG, Deployment
from serve import commands

async def main():
    async with Deployment(num_groups=1) as deployment:
        await deployment.client.generate("hello")

asyncio.run(main())
from preble_jax.model.registry import resolve
heavy = sorted({"jax", "jaxlib", "flax", "orbax", "torch"} & sys.modules.keys())
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
