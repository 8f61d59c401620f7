"""The README's gRPC example, run as it stands against a deployment."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from fakes.deployment import Deployment

README = Path(__file__).resolve().parents[2] / "README.md"


async def test_grpc_example_runs(deployment: Deployment, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = (block for block in blocks if "Client(" in block)
    assert "127.0.0.1:50050" in example
    program = compile(example.replace("127.0.0.1:50050", deployment.frontend.address), "README.md", "exec")
    await asyncio.to_thread(exec, program, {})
    assert re.search(r"\d+ of \d+ prompt tokens were cached", capsys.readouterr().out)
