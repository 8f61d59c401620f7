"""The scheduler is killed with SIGKILL under load and started again: a real process; fake engines behind workers."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fakes.deployment import CONFIG, Deployment, until
from preble_jax.sampling_params import SamplingParams
from serve.children import Child
from serve.client import Completion

NUM_CALLERS = 12
FAMILIES = "abcdefgh"
GREEDY = SamplingParams(max_tokens=3, temperature=0.0)


class SchedulerProcess:
    """`preble-jax scheduler` as a child, always at the same port."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = 0
        self.address = ""

    async def start(self) -> None:
        file = self._folder / "address"
        file.unlink(missing_ok=True)
        command = f"scheduler --port {self._port} --address-file {file} --config.kv.page_size={CONFIG.kv.page_size}"
        self.child = Child("scheduler", command.split(), self._folder / "log", lambda line: None)
        await until(file.exists, 20.0)
        self.address = file.read_text()
        self._port = int(self.address.rpartition(":")[2])

    def kill(self) -> None:
        self.child.process.send_signal(signal.SIGKILL)
        self.child.process.wait()
        self.child.stop()


@pytest.fixture
async def scheduler(tmp_path: Path) -> AsyncIterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path)
    await process.start()
    yield process
    process.child.stop()


@dataclass
class Load:
    """Callers that ask one request after the other until told to stop. answers: (family, answer), as they ended."""

    deployment: Deployment
    answers: list[tuple[str, Completion]] = field(default_factory=list)
    stopped: bool = False

    async def call(self, caller: int) -> None:
        number = 0
        while not self.stopped:
            family = FAMILIES[(caller + number) % len(FAMILIES)]
            prompt = f"{family * 60} {caller} {number}"
            self.answers.append((family, await self.deployment.client.generate(prompt, GREEDY)))
            number += 1

    async def more(self, count: int) -> None:
        """Returns when so many more have ended."""
        end = len(self.answers) + count
        await until(lambda: len(self.answers) >= end, 20.0)


async def test_a_scheduler_killed_under_load_costs_no_request(scheduler: SchedulerProcess) -> None:
    async with Deployment(scheduler_address=scheduler.address) as deployment, asyncio.TaskGroup() as callers:
        load = Load(deployment)
        for caller in range(NUM_CALLERS):
            callers.create_task(load.call(caller))
        await load.more(100)
        assert deployment.frontend._router.num_fallbacks == 0

        scheduler.kill()
        await load.more(100)  # served without a scheduler
        assert deployment.frontend._router.num_fallbacks >= 50

        await scheduler.start()
        holds = {group: len(engine._stored) for group, engine in deployment.engines.items()}
        await deployment.until_state(
            lambda groups: groups.keys() == holds.keys() and all(groups[g].held_pages >= n for g, n in holds.items())
        )
        before = len(load.answers)
        await load.more(100)
        fallbacks = deployment.frontend._router.num_fallbacks
        await load.more(100)
        assert deployment.frontend._router.num_fallbacks == fallbacks, "the new scheduler places again"
        load.stopped = True

    # A request that had failed would have ended its caller, and the test.
    assert all(answer.text == family * 3 for family, answer in load.answers)
    later = load.answers[before + NUM_CALLERS :]
    hits = sum(answer.usage.cached_tokens >= 60 for _, answer in later)
    assert hits > 0.9 * len(later), "but for some that balance the load, requests go where their family is"
