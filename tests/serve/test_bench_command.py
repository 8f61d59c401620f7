"""`preble-jax bench engine`: the table, the JSON, and bad input before anything is read or compiled."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.table import Table

from serve.bench import bench_table
from serve.cli import main

TINY_FOLDER = Path(__file__).parent.parent / "goldens" / "tiny_llama3"
SETTINGS = (
    f"--config.model.name={TINY_FOLDER}",
    "--config.model.dtype=float32",
    "--config.kv.num_pages=64",
    "--config.engine.max_num_seqs=8",
    "--config.engine.prefill_buckets=64",
)


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    file = tmp_path / "mine.json"
    prompts = [[*range(40), 100 + i] for i in range(5)]
    file.write_text(json.dumps({"name": "five", "max_tokens": 4, "prompts": prompts}))
    return file


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The persistent compilation cache in a folder of the test's, and off again afterwards."""
    monkeypatch.setenv("PREBLE_HOME", str(tmp_path / "home"))
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)
    compilation_cache.reset_cache()  # it holds on to the folder it was first used with


@pytest.mark.usefixtures("own_cache")
def test_a_table_and_json(workload: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = workload.with_name("out.json")
    arguments = ["bench", "engine", str(workload), "--rounds", "2", "--json", str(output), *SETTINGS]
    monkeypatch.setattr(sys, "argv", ["preble-jax", *arguments])

    def checked_table(*results: Any) -> Table:
        assert output.exists(), "written before anything is printed, for a reader may go away"
        return bench_table(*results)

    monkeypatch.setattr("serve.bench.bench_table", checked_table)
    assert main() == 0
    printed = capsys.readouterr().out
    assert "medians of 2 rounds" in printed
    (row,) = (line.split() for line in printed.splitlines() if line.split()[:1] == ["five"])
    assert len(row) == 13
    assert row[1] == "5"
    assert row[-1] == "0", "nothing was compiled"

    document = json.loads(output.read_text())
    assert document["machine"]["devices"] == ["cpu"]
    assert document["machine"]["command"].startswith("preble-jax bench engine")
    assert document["config"]["kv"]["num_pages"] == document["num_pages"] == 64
    (result,) = document["workloads"]
    assert (result["name"], len(result["rounds"])) == ("five", 2)
    assert result["median"]["output_tokens"] == 20
    assert result["median"]["hit_ratio"] == pytest.approx(4 * 32 / (5 * 41))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["decode9"], "workload: expected one of shared"),
        (["nowhere.json"], "nowhere.json: expected a file"),
        (["decode1", "--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["decode1", "--json", "nowhere/out.json"], "--json: expected a file in a folder that exists"),
        (["decode1", "--json", "."], "--json: expected a file, got the folder ."),
        (["decode1", "--config.kv.memory_gib=much"], "kv.memory_gib: expected a finite number or auto, got 'much'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "engine", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and words in output.err and output.err.count("\n") == 1


def test_only_engines_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "cluster"])
    assert "choose from" in capsys.readouterr().err
