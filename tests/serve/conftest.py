"""A deployment in this process, with fake engines: see tests/fakes/deployment.py."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from fakes.deployment import Deployment


@pytest.fixture
async def deployment() -> AsyncIterator[Deployment]:
    async with Deployment() as deployment:
        yield deployment
