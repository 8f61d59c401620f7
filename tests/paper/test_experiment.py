"""What the experiments of the papers leave behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from benchmarks.paper.experiment import make_parser, save
from preble_jax.sim.plots import Panel

PANEL = Panel(title="t", bars={"e2": (1.0, 0.1)})


def test_without_matplotlib_the_numbers_are_written_and_the_figure_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_parser(None, num_seeds=3).parse_args(["--results", str(tmp_path / "new")])
    if importlib.util.find_spec("matplotlib"):
        save("some", arguments, {"rows": [{"a": 1}]}, [PANEL])
        assert (tmp_path / "new" / "some.svg").exists()
    save("empty", arguments, {"rows": []}, [])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    save("other", arguments, {"rows": [{"a": 1}]}, [PANEL])
    assert "other.svg needs matplotlib: pip install" in capsys.readouterr().out.splitlines()[-1]
    assert json.loads((tmp_path / "new" / "other.json").read_text())["rows"] == [{"a": 1}]
    assert not (tmp_path / "new" / "other.svg").exists() and not (tmp_path / "new" / "empty.svg").exists()
