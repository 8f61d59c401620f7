"""README and docs tell the truth where a machine can check it: links, commands, and the worked examples."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from benchmarks.paper.experiment import RESULTS
from benchmarks.paper.tables import PAGE, made
from preble_jax.config_files import load_config
from serve.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
PYTHON_BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_text_exist(page: Path) -> None:
    paths = re.findall(
        r"`((?:preble_jax|kernels_pallas|serve|configs|tests|scripts)/[\w./]+)`", page.read_text("utf-8")
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_tables_of_the_experiments_are_made_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8") + "\n"
    for command, table in made(RESULTS):
        assert f"`python {command}`" in page
        assert f"\n{table}\n\n" in page, "python -m benchmarks.paper.tables"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"\bmake ([a-z]+)", "\n".join(re.findall(r"`[^`]+`|^\$ .*$", README, flags=re.MULTILINE))))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "serve", "test"} <= targets <= known


def test_imports_of_the_examples_exist() -> None:
    for block in PYTHON_BLOCKS:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_config_example_loads(tmp_path: Path) -> None:
    (block,) = (block for block in PYTHON_BLOCKS if "get_config" in block)
    file = tmp_path / "my_config.py"
    file.write_text(block)
    config = load_config(str(file), {"kv.page_size": "32"})
    assert (config.serve.groups, config.kv.page_size, config.model.max_model_len) == (1, 32, 4096)


def test_command_line_arguments_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in sorted(set(re.findall(r"preble-jax ([a-z]+)", README))):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        offered = capsys.readouterr().out
        used = re.findall(rf"preble-jax {command}.*?(--[a-z-]+)\b(?!\.)", README)
        if command == "demo":
            used += re.findall(r'ARGS="(--[a-z-]+)', README)
        assert [argument for argument in used if argument not in offered] == []
