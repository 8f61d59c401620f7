"""The committed protobuf code is what the .proto files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "generate_protos.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_protos", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_code_is_current(script: ModuleType) -> None:
    assert script.stale() == [], "run python scripts/generate_protos.py"


def test_a_proto_that_changed_is_noticed(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "preble" / "v1"
    folder.mkdir(parents=True)
    proto = folder / "thing.proto"
    proto.write_text('syntax = "proto3";\npackage preble.v1;\nmessage Thing { string name = 1; }\n')
    for path, text in script.generate(tmp_path).items():
        (tmp_path / path).write_text(text)
    assert script.stale(tmp_path) == []
    proto.write_text(proto.read_text().replace("name = 1", "title = 1"))
    assert script.stale(tmp_path) == ["preble/v1/thing_pb2.py", "preble/v1/thing_pb2.pyi"]
    proto.unlink()
    (folder / "other.proto").write_text('syntax = "proto3";\npackage preble.v1;\n')
    assert "preble/v1/thing_pb2.py" in script.stale(tmp_path)
